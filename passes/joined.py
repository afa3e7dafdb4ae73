"""Joined: in evaluation, the narrow products of one value with several matrices are one product, cut."""

from __future__ import annotations

from collections.abc import Collection, Hashable
from dataclasses import dataclass
from operator import getitem
from typing import Any

from torch import fx

from peftc.graph.aten import MOVE, is_pointwise, static_shape
from peftc.graph.program import Program, aten, is_call, scope_of
from peftc.rewrite.constants import alone
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made
from peftc.sites.site import layer_of


@dataclass(frozen=True)
class Joined:
    """`x @ A` and `x @ B` are the parts of `x @ [A, B]`: LoRA at q, k and v reads x once. Of n products of a layer n - 1
    are saved, for a view and the same FLOPs: the joined matrix is a constant of evaluation. Where it is none (with
    gradients, layer by layer, under a tracer) it is made at each call, one kernel, and never more than are saved. It is
    a copy, so what together is wider than x stays; so does a product with a bias. A step of decoding is left alone: of
    one row a matrix nothing is saved by reading it once (measured)."""

    name: str = "joined"

    def run(self, program: Program) -> int:
        if program.training or program.entry == "decode":
            return 0
        constant = alone(program)
        groups: dict[Hashable, list[fx.Node]] = {}
        for node in program.graph.find_nodes(op="call_function", target=aten.matmul.default):
            if "delta" in node.meta and _may_join(node, constant):
                groups.setdefault(_key(node), []).append(node)
        known: Known = {}
        count = sum(_join(program, group, known) for group in groups.values())
        if count:
            program.graph.eliminate_dead_code()
        return count


def _may_join(product: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether this is a product of data with a constant matrix, which all readers may read as part of a wider one."""
    x, factor = product.args
    return (
        x not in constant
        and factor in constant
        and len(static_shape(factor)) == 2
        and all(_strided(user) and user.args[0] is product for user in product.users)
    )


def _strided(user: fx.Node) -> bool:
    """Whether an op reads the rows of a wider matrix without a copy."""
    return is_pointwise(user) or is_call(user, aten.matmul.default, aten.flatten.using_ints)


def _key(product: fx.Node) -> Hashable:
    """What products have in common that may be joined: x, the layer, the type."""
    x, factor = product.args
    return _value(x), layer_of(scope_of(product)), factor.meta["val"].dtype  # type: ignore[union-attr]


def _value(x: Any) -> Hashable:
    """A node, or how it moves or casts another: each site does so for itself."""
    if is_call(x, *MOVE) and "delta" in x.meta:
        return x.target, _value(x.args[0]), str(x.args[1:]), str(x.kwargs)
    return x  # type: ignore[no-any-return]


def _join(program: Program, group: list[fx.Node], known: Known) -> int:
    """Write the products as one, before the first of them. Those whose factor is made later stay."""
    first = group[0]
    of: dict[fx.Node, Any] = {one: one.args[1] for one in group if first > one.args[1]}  # type: ignore[operator]
    factors = list(dict.fromkeys(of.values()))
    widths = [static_shape(one)[1] for one in factors]
    if len(of) < 2 or sum(widths) > static_shape(factors[0])[0]:
        return 0

    def make(op: Any, *args: Any, name: str) -> fx.Node:
        return made(program, first, op, args, name=f"joined_{name}", known=known)

    flat = all(map(_is_flattened, of))
    with program.graph.inserting_before(first):
        matrix = make(aten.cat.default, factors, -1, name="factors") if factors[1:] else factors[0]
        whole = make(aten.matmul.default, first.args[0], matrix, name="product")
        if flat:
            whole = make(aten.flatten.using_ints, whole, 0, -2, name="rows")
        parts = {factors[0]: whole}
        if factors[1:]:
            cut = make(aten.split_with_sizes.default, whole, widths, -1, name="cut")
            parts = {one: make(getitem, cut, i, name="part") for i, one in enumerate(factors)}
    for one, factor in of.items():
        for old in list(one.users) if flat else [one]:
            old.replace_all_uses_with(parts[factor])
            program.graph.erase_node(old)
    return len(of)


def _is_flattened(product: fx.Node) -> bool:
    """Whether all axes but the last become one in all readers: then that is done once, before the cut."""
    flat = aten.flatten.using_ints
    return all(is_call(user, flat) and user.args[1:] == (0, -2) for user in product.users)
