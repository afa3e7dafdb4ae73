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

# Of a matrix these are its transpose.
_TURNS = (aten.numpy_T.default, aten.t.default, aten.transpose.int, aten.permute.default)


@dataclass(frozen=True)
class Normalize:
    """Drop metadata assertions, casts to the dtype and device a value already has, and dead code; write a
    product with a turned weight as the linear that it is."""

    name: str = "normalize"

    def run(self, program: Program) -> int:
        removed = 0
        for node in list(program.graph.nodes):
            if node.op == "call_function" and node.target in _ASSERTS:
                program.graph.erase_node(node)
                removed += 1
            elif _is_idle_cast(node):
                node.replace_all_uses_with(node.args[0])
                program.graph.erase_node(node)
                removed += 1
            elif _is_linear(program, node):
                node.target = aten.linear.default
                node.update_arg(1, node.args[1].args[0])
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code()
        return removed + before - len(program.graph.nodes)


def _is_linear(program: Program, node: fx.Node) -> bool:
    """Whether this is `x @ W.T` of a parameter W [out, in]."""
    if not is_call(node, aten.matmul.default):
        return False
    turned = node.args[1]
    if not is_call(turned, *_TURNS):
        return False
    assert isinstance(turned, fx.Node)
    weight = turned.args[0]
    return program.parameter(weight) is not None and len(weight.meta["val"].shape) == 2  # type: ignore[union-attr]


def _is_idle_cast(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (aten.to.dtype, aten.to.dtype_layout):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or "val" not in source.meta or node.args[3:]:
        return False
    before, after = source.meta["val"], node.meta["val"]
    same = isinstance(before, torch.Tensor) and before.dtype == after.dtype
    return same and before.device == after.device and before.layout == after.layout
