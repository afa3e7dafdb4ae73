"""Fused projections: which slice of one linear's features a value is, and where it is cut out."""

from __future__ import annotations

import operator

from torch import fx

from peftc import dataflow as flow
from peftc.errors import PeftcError
from peftc.program import aten, is_call


class SiteError(PeftcError):
    """A planned site that another entry of the model does not have in the same form."""


def columns(node: fx.Node, linear: fx.Node) -> tuple[int, int] | None:
    """The slice [start, stop) of a fused projection's features that `node` is computed from."""
    part = _cut(node, linear)
    if part is None:
        return None
    start = 0
    if is_call(part, aten.slice.Tensor):
        return int(part.args[2]), int(part.args[3])  # type: ignore[arg-type]
    source, index = part.args
    assert isinstance(source, fx.Node) and isinstance(index, int)
    sizes = [one.shape[-1] for one in source.meta["val"]]
    start = sum(sizes[:index])
    return start, start + sizes[index]


def _cut(node: fx.Node, linear: fx.Node) -> fx.Node | None:
    """The node between `linear` and `node` that cuts the last axis of the linear's own layout."""
    stack, seen = [node], set()
    while stack:
        one = stack.pop()
        if one in seen or one is linear or one.op != "call_function":
            continue
        seen.add(one)
        width = flow.features(linear)[1]
        if one.target is operator.getitem:
            source = one.args[0]
            if is_call(
                source, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default
            ):
                assert isinstance(source, fx.Node) and isinstance(source.args[0], fx.Node)
                if flow.static_shape(source.args[0])[-1] == width:
                    return one
        if is_call(one, aten.slice.Tensor):
            source = one.args[0]
            assert isinstance(source, fx.Node)
            last = one.args[1] in (-1, len(flow.static_shape(source)) - 1)
            if (
                last
                and flow.static_shape(source)[-1] == width
                and flow.static_shape(one)[-1] != width
            ):
                return one
        stack += one.all_input_nodes
    return None


def part(linear: fx.Node, wanted: tuple[int, int]) -> fx.Node:
    """The node that cuts the columns `wanted` out of a fused projection's result."""
    stack, seen = list(linear.users), set()
    while stack:
        one = stack.pop(0)
        if one in seen or one.op != "call_function":
            continue
        seen.add(one)
        if _cut(one, linear) is one and columns(one, linear) == wanted:
            return one
        if is_call(
            one, *flow.MOVE, aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default
        ):
            stack += list(one.users)
    raise SiteError(f"the slice {wanted} of a fused projection is not cut in this entry")
