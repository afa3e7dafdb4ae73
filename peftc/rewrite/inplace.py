"""In place: what a model writes into a value, or into a part of one, becomes a value of its own."""

from __future__ import annotations

from typing import Any

from torch import fx
from torch._ops import OpOverload

from peftc.graph.aten import SOFTMAX, shares
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.nodes import made

# A part of a value, and the op that gives the value with another part.
_PARTS: dict[Any, Any] = {
    aten.slice.Tensor: aten.slice_scatter.default,
    aten.select.int: aten.select_scatter.default,
    aten.transpose.int: None,  # its own inverse
}


def write_out(program: Program) -> int:
    """Let who reads a value after it was written to read what it is then, so that the data flow shows it, and what a
    gradient needs stay as it was: a softmax's result (SEW-D writes into it, in a function with a gradient of its own). A
    graph keeps `relu_(x)` whose result alone is read on; and what is written into a buffer, or into a value of which another view
    is read afterwards, stays as it is."""
    order = {node: place for place, node in enumerate(program.graph.nodes)}
    count = 0
    for node in [*order]:
        op = _apart(node)
        if op is not None:
            count += _write(program, node, op, order)
    return count


def _apart(node: fx.Node) -> Any:
    """The op that gives what `node` writes into its first argument; None where it writes nothing, or there is none."""
    op = node.target
    if not isinstance(op, OpOverload) or not op._schema.is_mutable or not node.args:
        return None
    packet = getattr(aten, op._schema.name.removeprefix("aten::").rstrip("_"), None)
    return getattr(packet, op._overloadname, None)


def _write(program: Program, node: fx.Node, op: Any, order: dict[fx.Node, int]) -> int:
    dest, parts = node.args[0], list[fx.Node]()
    assert isinstance(dest, fx.Node)
    base = dest
    while is_call(base, *_PARTS):
        parts.append(base)
        base = base.args[0]  # type: ignore[assignment]
    later = [user for user in base.users if order.get(user, len(order)) > order[node]]
    needed = later or is_call(base, *SOFTMAX)
    if base.op == "placeholder" or not needed or any(_seen_later(base, parts, order, node)):
        return 0
    with program.graph.inserting_before(node):
        value = (
            _copied(program, node)
            if is_call(node, aten.copy_.default)
            else made(program, node, op, node.args, node.kwargs)
        )
        whole = value
        for part in parts:
            scatter = _PARTS[part.target]
            if scatter is None:
                whole = made(program, node, part.target, (whole, *part.args[1:]))
            else:
                whole = made(
                    program, node, scatter, (part.args[0], whole, *part.args[1:]), part.kwargs
                )
    for user in later:
        user.replace_input_with(base, whole)
    node.replace_all_uses_with(value)
    program.graph.erase_node(node)
    return 1


def _copied(program: Program, node: fx.Node) -> fx.Node:
    """What stands in a part once another value was copied there: in its type, as wide as it."""
    part, value = node.args[0], node.args[1]
    assert isinstance(part, fx.Node) and isinstance(value, fx.Node)
    old, new = part.meta["val"], value.meta["val"]
    if old.dtype != new.dtype:
        value = made(program, node, aten.to.dtype, (value, old.dtype))
    if old.shape != new.shape:
        value = made(program, node, aten.expand_as.default, (value, part))
    return value


def _seen_later(
    base: fx.Node, parts: list[fx.Node], order: dict[fx.Node, int], node: fx.Node
) -> Any:
    """For each view of `base` made before, whether it is read behind `node`."""
    for view in base.users:
        if view is not node and shares(view) and order.get(view, len(order)) < order[node]:
            yield any(order.get(user, len(order)) > order[node] for user in view.users)
