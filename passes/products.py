"""Products: what is added to a product of matrices, and the number that scales it, are part of the product."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftc.graph.aten import CUT, LINEAR, MATMUL, MOVE, VIEW, lies_flat
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made

# What autocast computes in its own type, so that a sum with it is of that type too.
_LOWERED = (*LINEAR, *MATMUL, aten.addmm.default)


@dataclass(frozen=True)
class Products:
    """Of what was inserted, `h + c * (u @ W)` and `u @ W + b` are one kernel each, `addmm` and `linear`: LoRA is two
    kernels a site, and a bottleneck three. Where h is no product itself it stays, for autocast would round it."""

    name: str = "products"

    def run(self, program: Program) -> int:
        known: Known = {}
        sums = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        return sum(_fused(program, node, known) for node in sums if "delta" in node.meta)


def _fused(program: Program, node: fx.Node, known: Known) -> bool:
    """Write a sum with a product as one `addmm`."""
    left: Any
    right: Any
    (left, right), alpha = node.args, node.kwargs.get("alpha", 1)
    for product, other, scales in (
        (right, left, {"alpha": alpha}),
        (left, right, {"beta": alpha}),
    ):
        apart = other is not product
        if apart and _is_product(product) and _may_be_added(other, product, node):
            _write(program, node, product, other, scales if alpha != 1 else {}, known)
            return True
    return False


def _is_product(node: Any) -> bool:
    """Whether `node` is a product with a matrix that was inserted and that nothing else reads."""
    if not is_call(node, aten.matmul.default) or "delta" not in node.meta or len(node.users) > 1:
        return False
    left, right = (one.meta["val"] for one in node.args)
    return bool(right.ndim == 2 and left.ndim >= 2 and left.dtype == right.dtype)


def _may_be_added(other: Any, product: fx.Node, node: fx.Node) -> bool:
    """Whether `other` is a bias of the product, or a result of the same kind that lies as flat as it."""
    if not isinstance(other, fx.Node):
        return False
    value, result = other.meta["val"], node.meta["val"]
    if value.dtype != product.meta["val"].dtype or value.shape[-1] != result.shape[-1]:
        return False
    if value.ndim == 1:
        return True
    same = value.ndim == result.ndim and all(
        statically_known_true(a == b) for a, b in zip(value.shape, result.shape)
    )
    return same and lies_flat(value) and is_call(_source(other), *_LOWERED)


def _source(node: fx.Node) -> Any:
    """What a value is, behind moves and cuts."""
    found: Any = node
    while is_call(found, *MOVE, *CUT):
        found = found.args[0]
    return found


def _write(
    program: Program,
    node: fx.Node,
    product: fx.Node,
    other: fx.Node,
    scales: dict[str, Any],
    known: Known,
) -> None:
    left, right = product.args
    assert isinstance(left, fx.Node)
    deep = left.meta["val"].ndim > 2

    def make(op: Any, *args: Any, name: str, **kwargs: Any) -> fx.Node:
        return made(program, node, op, args, kwargs, f"{node.name}_{name}", known)

    with program.graph.inserting_before(node):
        if other.meta["val"].ndim == 1 and not scales:
            turned = make(aten.transpose.int, right, 0, 1, name="transpose")
            return _replace(
                program,
                node,
                product,
                make(aten.linear.default, left, turned, other, name="product"),
            )
        rows = make(aten.flatten.using_ints, left, 0, -2, name="rows") if deep else left
        wide = deep and other.meta["val"].ndim > 1
        added = make(aten.flatten.using_ints, other, 0, -2, name="base") if wide else other
        result = make(aten.addmm.default, added, rows, right, name="product", **scales)
        flat = result
        if wide:
            result = make(aten.view_as.default, result, other, name="shaped")
        elif deep:
            sizes = _leading(program, left, make)
            result = make(aten.view.default, result, [*sizes, -1], name="shaped")
    _replace(program, node, product, result)
    for user in list(result.users):
        if result is not flat and is_call(user, *VIEW):  # of the same numbers in the same order
            user.replace_input_with(result, flat)
    if not result.users:
        program.graph.erase_node(result)


def _replace(program: Program, node: fx.Node, product: fx.Node, result: fx.Node) -> None:
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
    program.graph.erase_node(product)


def _leading(program: Program, node: fx.Node, make: Any) -> list[Any]:
    """The sizes of all axes but the last."""
    shape = node.meta["val"].shape[:-1]
    return [
        n if isinstance(n, int) else make(aten.sym_size.int, node, i, name=f"size_{i}")
        for i, n in enumerate(shape)
    ]
