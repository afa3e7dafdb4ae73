"""Normalize: remove what export leaves behind and nothing computes with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import TURN, VIEW
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import value_of

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)

# Ops that keep the elements and their order.
_RESHAPE = (
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True)
class Normalize:
    """Drop metadata assertions, casts to the dtype and device a value already has, reshapes of a parameter
    to the shape it is stored in, updates of running statistics, and dead code; write a product with a turned
    weight as the linear that it is."""

    name: str = "normalize"

    def run(self, program: Program) -> int:
        removed = written = 0
        for node in list(program.graph.nodes):
            same = node.args[0] if _is_idle_cast(node) else _stored(program, node)
            if same is not None:
                node.replace_all_uses_with(same)
            if same is not None or is_call(node, *_ASSERTS) or _is_count(program, node):
                program.graph.erase_node(node)
                removed += 1
            elif _is_linear(program, node):
                node.target = aten.linear.default
                node.update_arg(1, node.args[1].args[0])
                written += 1
            elif is_call(node, aten.addmm.default) and _is_turned(program, node):
                _write_linear(program, node)
                written += 1
            elif is_call(node, aten.batch_norm.default) and _is_buffer(program, node.args[3]):
                written += node.args[5] is not False
                node.update_arg(5, False)
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code()
        return written + removed + before - len(program.graph.nodes)


def _is_linear(program: Program, node: fx.Node) -> bool:
    """Whether this is `x @ W.T` of a parameter W [out, in]."""
    if not is_call(node, aten.matmul.default):
        return False
    turned = node.args[1]
    if not is_call(turned, *TURN):
        return False
    assert isinstance(turned, fx.Node)
    weight = turned.args[0]
    return program.parameter(weight) is not None and len(weight.meta["val"].shape) == 2  # type: ignore[union-attr]


def _is_turned(program: Program, addmm: fx.Node) -> bool:
    """Whether this is `b + x @ W` of a parameter W [in, out], as GPT-2 has it."""
    return addmm.kwargs == {} and program.parameter(addmm.args[2]) is not None


def _write_linear(program: Program, addmm: fx.Node) -> None:
    """`addmm(b, x, W)` as the linear of W turned, of x as the model has it: around addmm it is flattened to two
    axes and given its own back."""
    bias, x, weight = addmm.args
    users = list(addmm.users)
    flat = is_call(x, *VIEW) and len(users) == 1 and is_call(users[0], *VIEW)
    source, result = (x.args[0], users[0]) if flat else (x, addmm)  # type: ignore[union-attr]
    with program.graph.inserting_before(addmm):
        turned = _made(program, addmm, aten.transpose.int, (weight, 0, 1))
        linear = _made(program, addmm, aten.linear.default, (source, turned, bias))
    result.replace_all_uses_with(linear)


def _made(program: Program, like: fx.Node, op: Any, args: tuple[Any, ...]) -> fx.Node:
    """A node that stands for what `like` computes, with its module and its own value."""
    node = program.graph.call_function(op, args)
    node.meta = {**like.meta, "val": value_of(program.graph, op, args, {})}
    return node


def _is_count(program: Program, node: fx.Node) -> bool:
    """Whether `node` counts batches. A frozen backbone's statistics stay: deltas are saved without them."""
    return is_call(node, aten.add_.Tensor) and _is_buffer(program, node.args[0]) and not node.users


def _is_buffer(program: Program, node: object) -> bool:
    slot = program.slot(node) if isinstance(node, fx.Node) else None
    return slot is not None and slot.kind == "buffer"


def _stored(program: Program, node: fx.Node) -> fx.Node | None:
    """The parameter that `node` is again (Mamba squeezes its kernels and takes it back)."""
    source = node
    while is_call(source, *_RESHAPE):
        source = source.args[0]  # type: ignore[assignment]
    if source is node or not program.parameter(source):
        return None
    return source if source.meta["val"].shape == node.meta["val"].shape else None


def _is_idle_cast(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (aten.to.dtype, aten.to.dtype_layout):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or "val" not in source.meta or node.args[3:]:
        return False
    before, after = source.meta["val"], node.meta["val"]
    same = isinstance(before, torch.Tensor) and before.dtype == after.dtype
    return same and before.device == after.device and before.layout == after.layout
