"""Rows: what is read in rows is computed in rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from peftc.graph.aten import LINEAR, lies_flat
from peftc.graph.program import Program, aten, is_call, scope_of
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made
from peftc.sites.site import layer_of

_FLATTEN = aten.flatten.using_ints


@dataclass(frozen=True)
class Rows:
    """`flatten(x @ W)`, which a delta reads, is `flatten(x) @ W`: the sites that read one x share its rows, and what
    is added to an own linear, and then cut into heads, was never anything else. One view a product less."""

    name: str = "rows"

    def run(self, program: Program) -> int:
        known: Known = {}
        rows: dict[tuple[fx.Node, int | None], fx.Node] = {}
        found = program.graph.find_nodes(op="call_function", target=_FLATTEN)
        found = [n for n in found if "delta" in n.meta and n.args[1:] == (0, -2) and _moves(n)]
        for node in sorted(found, key=lambda one: one.args[0]):
            _write(program, node, rows, known)
        return len(found)


def _moves(node: fx.Node) -> bool:
    """Whether this reads a product with a matrix that nothing else reads."""
    product: Any = node.args[0]
    if not is_call(product, *LINEAR, aten.matmul.default) or set(product.users) != {node}:
        return False
    x, matrix = (one.meta["val"] for one in product.args[:2])
    return bool(x.ndim > 2 and matrix.ndim == 2 and lies_flat(x))


def _write(
    program: Program,
    node: fx.Node,
    rows: dict[tuple[fx.Node, int | None], fx.Node],
    known: Known,
) -> None:
    product: Any = node.args[0]
    x: Any = product.args[0]
    key = x, layer_of(scope_of(product))
    with program.graph.inserting_before(product):
        if key not in rows:
            rows[key] = made(
                program, node, _FLATTEN, (x, 0, -2), name=f"{x.name}_rows", known=known
            )
        args = (rows[key], *product.args[1:])
        name = f"{product.name}_rows"
        flat = made(program, product, product.target, args, product.kwargs, name, known)
    node.replace_all_uses_with(flat)
    program.graph.erase_node(node)
    program.graph.erase_node(product)
