"""Fused projections: which features of one linear a value is made of, by following labels through views."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from peftc.graph.aten import CUT, DROPOUT, MOVE, hint, is_nonlinear, static_shape
from peftc.graph.program import aten, behind, is_call
from peftc.sites.dataflow import before
from peftc.sites.view import Columns

# What treats each feature by itself, all rows of it together.
_BY_FEATURE = (aten.batch_norm.default,)

# What takes the shape of a value alone.
_SHAPED = (
    aten.sym_size.int,
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
)

# Moves that take of another value its shape alone.
_AS = (aten.reshape_as.default, aten.view_as.default)

_CASTS = (aten.to.dtype, aten.to.dtype_layout, aten.to.device, aten.type_as.default)


def columns(node: fx.Node, linear: fx.Node) -> Columns | None:
    """The features of `linear` that `node` is computed from; None when it is all of them, or no pattern."""
    between = behind(node, lambda one: one is linear)
    if not any(is_call(one, *CUT) for one in between):
        return None
    width = static_shape(linear)[-1]
    seen: set[int] = set()
    for labels in _reaching(node, linear, width, between):
        seen |= set(labels.flatten().tolist())
    return _pattern(seen, width) if 0 < len(seen) < width else None


def united(several: Sequence[Columns | None], width: int) -> Columns | None:
    """The features of one linear that are in any of several slices of it; None when they are all, or no pattern."""
    known = [one for one in several if one is not None]
    features = {feature for one in known for feature in one.index().tolist()}
    whole = len(known) < len(several) or len(features) == width
    return None if whole else _pattern(features, width)


def gated_halves(start: Any, linear: fx.Node) -> tuple[Columns, Columns] | None:
    """(up, gate) of a feed-forward whose two first projections are one product: `start` is `up * act(gate)`."""
    node = before(start, *MOVE, *DROPOUT)
    if not is_call(node, aten.mul.Tensor):
        return None
    sides = [one for one in node.args if isinstance(one, fx.Node)]
    found = [columns(one, linear) for one in sides]
    if len(found) != 2 or None in found:
        return None
    first, second = found
    made_of = behind(sides[0], lambda one: one is linear)
    activated = any(map(is_nonlinear, made_of))
    return (second, first) if activated else (first, second)  # type: ignore[return-value]


def _reaching(
    node: fx.Node, linear: fx.Node, width: int, between: Iterable[fx.Node]
) -> Iterator[torch.Tensor]:
    """The labels that leave the moves behind `linear` on their way to `node`."""
    shape = [hint(n) for n in linear.meta["val"].shape]
    labels: dict[fx.Node, Any] = {linear: torch.arange(width).expand(shape)}
    for one in sorted(between):
        sources = [source for source in one.all_input_nodes if source in labels]
        if one is linear or not sources or is_call(one, *_SHAPED):
            continue
        moved = _moved(one, labels)
        if moved is None:
            yield from (labels[source] for source in sources)
        elif one is node:
            yield moved
        else:
            labels[one] = moved


def _moved(node: fx.Node, labels: dict[fx.Node, Any]) -> Any:
    """What a move makes of labels; None when it needs a tensor that carries none, or is no move. No op sees a traced
    value: it would ask for its sizes, and the graph would be one for these."""
    if is_call(node, *_BY_FEATURE, *_CASTS):
        return labels.get(node.args[0])  # type: ignore[arg-type]
    if not is_call(node, *MOVE, *CUT):
        return None
    unknown = []

    def value(one: fx.Node) -> Any:
        if one in labels:
            return labels[one]
        val = _constant(one)
        if isinstance(val, FakeTensor):
            unknown.append(one)
            return torch.empty([hint(n) for n in val.shape])
        return hint(val) if isinstance(val, torch.SymInt) else val

    args = fx.map_arg(node.args, value)
    if unknown and not is_call(node, *_AS):
        return None
    try:
        return node.target(*args, **node.kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError):
        return None


def _constant(node: fx.Node) -> Any:
    """The value of a constant of the graph; of all else what is known while tracing."""
    source = before(node, aten.lift_fresh_copy.default, *MOVE)
    return source.meta.get("constant", node.meta.get("val"))


def _pattern(features: set[int], width: int) -> Columns | None:
    """The same run of columns in each of equally wide groups; contiguous columns are one group."""
    starts = sorted(one for one in features if one - 1 not in features)
    period, rest = divmod(width, len(starts))
    stop = starts[0] + len(features) // len(starts)
    found = Columns(len(starts), starts[0], stop, period)
    return found if not rest and found.index().tolist() == sorted(features) else None
