"""Lengths: sizes that a trace wrote as numbers, though they are the length of what an edit makes longer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftc.graph.aten import MOVE, VIEW, is_pointwise
from peftc.graph.program import aten, is_call


def release(value: fx.Node, axis: int, users: Iterable[fx.Node]) -> None:
    """Let what `users` compute of `value` take the size of this axis from it, where that is written as a number: a graph
    that was traced for one length (a step behind a single token, where eager code asks) has no other name for it."""
    todo = [(value, axis % value.meta["val"].ndim, [*users])]
    while todo:
        node, at, readers = todo.pop()
        for user in readers:
            moved = _moved(user, node, at)
            if moved is not None:
                todo.append((user, moved, [*user.users]))


def _moved(user: fx.Node, node: fx.Node, axis: int) -> int | None:
    """Where the axis is behind one op; None where the op is none that keeps it."""
    shape = node.meta["val"].shape
    if user.args[:1] != (node,) and not is_pointwise(user):
        return None
    if is_call(user, aten.unsqueeze.default):
        return axis + int(_axis(user.args[1], len(shape) + 1) <= axis)
    if is_call(user, aten.transpose.int):
        one, other = (_axis(given, len(shape)) for given in user.args[1:])
        return int({one: other, other: one}.get(axis, axis))
    if is_call(user, aten.permute.default):
        order: list[int] = user.args[1]  # type: ignore[assignment]
        return [_axis(given, len(shape)) for given in order].index(axis)
    if is_call(user, aten.expand.default):
        sizes: Any = user.args[1]
        return _unsized(user, axis + len(sizes) - len(shape))
    if is_call(user, *VIEW):
        return _viewed(user, shape, axis)
    if is_pointwise(user) or is_call(user, *MOVE):
        return axis + int(user.meta["val"].ndim) - len(shape)
    return None


def _axis(given: Any, rank: int) -> int:
    return int(given) % rank


def _viewed(user: fx.Node, shape: torch.Size, axis: int) -> int | None:
    """The axis of a view that has as much before it, and is as long."""
    after: Sequence[Any] = user.meta["val"].shape
    for at, size in enumerate(after):
        same = statically_known_true(math.prod(after[:at]) == math.prod(shape[:axis]))
        if same and statically_known_true(size == shape[axis]):
            return _unsized(user, at)
    return None


def _unsized(user: fx.Node, at: int) -> int:
    """Leave a size that is a number to the op, which knows it; a view knows one."""
    sizes: Any = list(user.args[1])  # type: ignore[arg-type]
    known = is_call(user, aten.expand.default) or -1 not in sizes
    if isinstance(sizes[at], int) and known:
        sizes[at] = -1
        user.update_arg(1, sizes)
    return at
