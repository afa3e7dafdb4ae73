"""Normalize: remove what export leaves behind and nothing computes with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc.program import Program, aten, is_call

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
    to the shape it is stored in, and dead code."""

    name: str = "normalize"

    def run(self, program: Program) -> int:
        removed = 0
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target in _ASSERTS:
                program.graph.erase_node(node)
                removed += 1
            elif (stored := _stored(program, node)) is not None:
                node.replace_all_uses_with(stored)
                program.graph.erase_node(node)
                removed += 1
            elif _is_idle_cast(node):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                removed += 1
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code()
        return removed + before - len(program.graph.nodes)


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
