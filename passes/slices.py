"""Slices: what changes a slice of a fused result is put behind the split, where that slice is read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from math import prod
from operator import getitem
from typing import Any

from torch import fx

from peftc.graph.aten import VIEW
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made

_PUT = aten.slice_scatter.default
_SPLITS = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
)
_RESHAPE = (*VIEW, aten.unflatten.int)


@dataclass(frozen=True)
class Span:
    """The part [start, stop) of an axis, which is counted from the end."""

    axis: int
    start: int
    stop: int


@dataclass(frozen=True)
class Slices:
    """A part of what a slice was put into is that slice, or a part of what was there before. Without this, each
    changed slice copies the whole result of a fused projection."""

    name: str = "slices"

    def run(self, program: Program) -> int:
        if not program.graph.find_nodes(op="call_function", target=_PUT):
            return 0
        made_here = _Maker(program)
        count = sum(_one(made_here, node) for node in list(program.graph.nodes))
        program.graph.eliminate_dead_code()
        return count


@dataclass
class _Maker:
    """Makes nodes before the one that is looked at."""

    program: Program
    known: Known = field(default_factory=dict)

    def __call__(self, like: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return made(self.program, like, op, args, kwargs, known=self.known)


def _one(make: _Maker, node: fx.Node) -> bool:
    """Rewrite a reader of a put, or move the put behind a view of it."""
    graph, source = make.program.graph, node.args[0] if node.args else None
    if is_call(node, *_RESHAPE) and is_call(source, aten.flatten.using_ints):
        groups = source.args[0]  # type: ignore[union-attr]
        if is_call(groups, _PUT) and is_call(node, *VIEW):
            node.update_arg(0, groups)  # a view of a view
        elif is_call(groups, _PUT) and _sizes(groups) == _sizes(node):
            node.replace_all_uses_with(groups)  # type: ignore[arg-type]
            return True
        source = node.args[0]
    if not is_call(source, _PUT):
        return False
    assert isinstance(source, fx.Node)
    with graph.inserting_before(node):
        if is_call(node, aten.transpose.int, *VIEW):
            result = _moved(make, source, node)
        elif is_call(node, aten.slice.Tensor, aten.select.int):
            result = _read(make, source, node)
        elif is_call(node, *_SPLITS):
            return _split(make, source, node)
        else:
            return False
    if result is None:
        return False
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return True


def _sizes(node: Any) -> list[str]:
    return [str(n) for n in node.meta["val"].shape]


def _span(node: fx.Node, source: Any) -> Span | None:
    """The part of an axis of known size that a slice, a selection or a put has of `source`."""
    args: tuple[Any, ...] = node.args[2:] if is_call(node, _PUT) else node.args[1:]
    defaults: tuple[Any, ...] = (0, None, None, 1)
    axis, start, stop, step = args + defaults[len(args) :]
    value = source.meta["val"]
    axis = axis if axis < 0 else axis - value.ndim
    size = value.shape[axis]
    if is_call(node, aten.select.int):
        start = start if start < 0 or not isinstance(size, int) else start - size
        stop = start + 1 or None
    bounds = (0 if start is None else start, size if stop is None else stop)
    if step != 1 or not all(isinstance(n, int) for n in (size, *bounds)):
        return None
    first, last, _ = slice(*bounds).indices(size)
    return Span(axis, first, last)


def _puts(node: Any, axis: int) -> Iterator[tuple[fx.Node, Span]]:
    """The puts along an axis that `node` is made of, the latest first."""
    while is_call(node, _PUT):
        span = _span(node, node)
        if span is None or span.axis != axis:
            return
        yield node, span
        node = node.args[0]


# ---- puts behind views


def _moved(make: _Maker, put: fx.Node, view: fx.Node) -> fx.Node | None:
    """The put of what the view makes of both, where it keeps the axis or splits it evenly."""
    span = _span(put, put)
    how = span and (_turned(span, view) if is_call(view, aten.transpose.int) else _even(span, view))
    if not how:
        return None
    axis, scale, arguments = how
    whole, part = put.args[0], put.args[1]
    below = _moved(make, whole, view) if is_call(whole, _PUT) else None  # type: ignore[arg-type]
    below = below or make(view, view.target, whole, *view.args[1:])
    piece = make(view, view.target, part, *arguments)
    assert span is not None
    return make(put, _PUT, below, piece, axis, span.start // scale, span.stop // scale)


# The axis of a put behind a view, by what its bounds are divided, the arguments of the view of its part.
_How = tuple[int, int, tuple[Any, ...]]


def _turned(span: Span, view: fx.Node) -> _How | None:
    rank = view.meta["val"].ndim
    axes = [a if a < 0 else a - rank for a in view.args[1:]]  # type: ignore[operator]
    if span.axis in axes:
        return None
    return span.axis, 1, tuple(view.args[1:])


def _even(span: Span, view: fx.Node) -> _How | None:
    """A view that splits the last axis, where the part is whole pieces of it."""
    before, after = _sizes(view.args[0]), view.meta["val"].shape
    lead = len(before) - 1
    inner = after[lead + 1 :]
    if span.axis != -1 or len(after) <= lead or _sizes(view)[:lead] != before[:lead]:
        return None
    if not all(isinstance(n, int) for n in after[lead:]):
        return None
    scale = prod(inner)
    if span.start % scale or span.stop % scale:
        return None
    sizes: Any = view.args[1]
    count = (span.stop - span.start) // scale
    return -1 - len(inner), scale, ([*sizes[:lead], count, *map(int, inner)],)


# ---- readers


def _read(make: _Maker, put: fx.Node, node: fx.Node) -> fx.Node | None:
    """A slice or selection of what was put, or of what was there before anything was put elsewhere."""
    span = _span(node, put)
    if span is None:
        return None
    source: Any = put
    for last, one in _puts(put, span.axis):
        if one.start <= span.start and span.stop <= one.stop:
            source = last.args[1]
            span = Span(span.axis, span.start - one.start, span.stop - one.start)
            break
        if span.start < one.stop and one.start < span.stop:
            break  # some of it
        source = last.args[0]
    if source is put:
        return None
    if is_call(node, aten.select.int):
        return make(node, node.target, source, span.axis, span.start)
    if (span.start, span.stop) == (0, source.meta["val"].shape[span.axis]):
        return source  # type: ignore[no-any-return]
    return make(node, node.target, source, span.axis, span.start, span.stop)


def _split(make: _Maker, put: fx.Node, node: fx.Node) -> bool:
    """Split what was there before anything was put into it; each part is then what was put there last."""
    axis, sizes = _parts(put, node)
    puts = list(_puts(put, axis))
    bounds = [Span(axis, *pair) for pair in pairwise(accumulate(sizes, initial=0))]
    users = list(node.users)
    if not puts or any(span not in bounds for _, span in puts):
        return False
    if not all(is_call(user, getitem) for user in users):
        return False
    root: Any = puts[-1][0].args[0]
    with make.program.graph.inserting_before(node if root.op == "placeholder" else root.next):
        parts = make(node, node.target, root, *node.args[1:], **node.kwargs)
        pieces = [make(node, getitem, parts, i) for i in range(len(sizes))]
    unbound = is_call(node, aten.unbind.int)
    for user in list(root.users):  # what was changed reads its piece, too
        mine = None if unbound or not is_call(user, aten.slice.Tensor) else _span(user, root)
        if mine in bounds:
            user.replace_all_uses_with(pieces[bounds.index(mine)])
    for user in users:
        place: Any = user.args[1]
        found = next((last.args[1] for last, one in puts if one == bounds[place]), None)
        with make.program.graph.inserting_before(user):
            if found is not None and unbound:
                found = make(user, aten.select.int, found, axis, 0)
        user.replace_all_uses_with(pieces[place] if found is None else found)  # type: ignore[arg-type]
    return True


def _parts(source: fx.Node, node: fx.Node) -> tuple[int, list[int]]:
    """The axis of a split, counted from the end, and the sizes of its parts."""
    value, unbound = source.meta["val"], is_call(node, aten.unbind.int)
    place = 1 if unbound else 2
    axis: Any = node.args[place] if len(node.args) > place else node.kwargs.get("dim", 0)
    axis = axis if axis < 0 else axis - value.ndim
    return axis, [1 if unbound else one.shape[axis] for one in node.meta["val"]]
