"""Feed-forwards: the whole, what is after the activation, and the two or three projections."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import (
    CONV,
    CUT,
    DROPOUT,
    LINEAR,
    MOVE,
    NORM,
    features,
    is_nonlinear,
    is_pointwise,
    projects,
)
from peftc.graph.program import aten, behind, is_call, scope_of
from peftc.language.ops import OPS, Op
from peftc.sites import attention, fused, mixture, sublayer
from peftc.sites.dataflow import activated, before, residual_add
from peftc.sites.index import Index
from peftc.sites.linear import computed, linear_site, ports_of
from peftc.sites.site import Hidden, NoSite, Place, Site, innermost
from peftc.sites.view import Columns, Part


@dataclass(frozen=True)
class FeedForward:
    """`down(act(up(x)))` that ends in a residual add; `gate` is set when two projections multiply. `halves` are
    the columns of up and gate where one linear is both."""

    up: fx.Node
    gate: fx.Node | None
    down: fx.Node
    halves: tuple[Columns, Columns] | None = None

    @property
    def parts(self) -> Iterator[tuple[str, fx.Node, Columns | None]]:
        """(part, linear, its columns)"""
        if self.halves is not None:
            yield from zip(("up", "gate"), (self.up,) * 2, self.halves, strict=True)
        else:
            yield "up", self.up, None
        yield "down", self.down, None
        if self.gate is not None:
            yield "gate", self.gate, None

    @property
    def scope(self) -> str:
        """The innermost module that all its projections are in."""
        return innermost(scope_of(linear) for _, linear, _ in self.parts)


def feed_forwards(index: Index) -> Iterator[FeedForward]:
    """The feed-forwards of a graph, by their last linear; attention's own linears and single experts are none."""
    taken = set(index.once(attention.linears_of))
    mixed = tuple(f"{one.scope}." for one in index.once(mixture.mixtures))
    for linear in index.projections:
        one = _feed_forward(index, linear, taken)
        if one is not None and not one.scope.startswith(mixed):
            yield one


def linears_of(index: Index) -> Iterator[fx.Node]:
    """The linears that belong to attention or a feed-forward."""
    yield from index.once(attention.linears_of)
    for one in index.once(feed_forwards):
        yield from (linear for _, linear, _ in one.parts)


def _feed_forward(index: Index, down: fx.Node, taken: set[fx.Node]) -> FeedForward | None:
    """The feed-forward that ends in the linear `down`. A classifier's head looks like one, but ends in no
    residual add."""
    if down in taken or residual_add(down) is None:
        return None
    inner = _inner(index, down.args[0], _BETWEEN if is_call(down, *LINEAR) else _PLAIN)
    if not inner or len(inner) > 2 or not taken.isdisjoint(inner):
        return None
    if len(inner) == 1:
        return FeedForward(inner[0], None, down, fused.gated_halves(down.args[0], inner[0]))
    gate = next((one for one in inner if activated(one)), inner[0])
    up = inner[0] if inner[1] is gate else inner[1]
    return FeedForward(up, gate, down)


# What may be between the linears beside what is pointwise: a norm, a convolution over the neighbours.
_NORMED = (*NORM, aten.mean.dim, aten.linalg_vector_norm.default)
_BETWEEN = (*MOVE, *CUT, *DROPOUT, *_NORMED, *CONV, aten.glu.default)
# And between convolutions, of which some are no feed-forward, but look around (a Conformer's).
_PLAIN = (*MOVE, *DROPOUT)


def _inner(index: Index, start: Any, between: Sequence[Any]) -> tuple[fx.Node, ...]:
    """The projections that `start` is a nonlinear function of, with parameters; none when anything else flows in."""

    def stops(one: fx.Node) -> bool:
        passes = is_pointwise(one) or is_call(one, *between)
        return not passes or projects(one) or _is_fixed(index, one)

    made_of = behind(start, stops)
    found = tuple(filter(projects, made_of))
    rest = [one for one in made_of if not projects(one) and not _is_fixed(index, one)]
    bends = any(is_nonlinear(one) or is_call(one, aten.glu.default) for one in rest)
    return found if bends and not any(map(stops, rest)) else ()


def _is_fixed(index: Index, node: fx.Node) -> bool:
    """Whether a value is none of the tokens': a parameter, a constant, a size."""
    source = before(node, *MOVE)
    is_stored = not source.all_input_nodes and not index.program.input(source)
    return is_stored or isinstance(node.meta.get("val"), int | torch.SymInt)


def find(index: Index) -> Iterator[Site | NoSite]:
    """Whole sub-layers, found by their first and last projection, or by the router of their experts."""
    yield from mixture.find(index)
    for one in index.once(feed_forwards):
        site = sublayer.find(index, "ffn", one.scope, (one.up, one.down), "up")
        if isinstance(site, Site):
            read = {part: index.weights(linear).get("W") for part, linear, _ in one.parts}
            others = {part: weight for part, weight in read.items() if weight and part != "down"}
            site = replace(site, weights={**others, **site.weights}, hidden=_hidden(index, one))
        yield site


def _hidden(index: Index, one: FeedForward) -> Hidden | None:
    """What is between the linears, where it is one op and nothing else."""
    node = before(one.down.args[0], *DROPOUT)
    named = (op.name for op in OPS.values() if _is_of(node, op))
    op = next(named, "") if isinstance(node, fx.Node) else ""
    if not op or node.args[0] is not one.up or not is_call(one.up, *LINEAR):
        return None
    bias = index.weights(one.up).get("b")
    return Hidden(op, "" if bias is None else bias.path)


def _is_of(node: fx.Node, op: Op) -> bool:
    """Whether a node is what an op of one argument is lowered to."""
    same = str(node.target) == op.lowering and op.arity == 1
    return same and (node.args[1:], node.kwargs) == (op.args, op.options)


def used(index: Index, site: Site) -> Iterator[str]:
    """The last projection's weight, or the router's, where a linear of this graph multiplies by it."""
    own = site.weights.get("W") or site.weights["up"]
    if index.multiplying(own.path):
        yield own.path


def find_hidden(index: Index) -> Iterator[Site | NoSite]:
    """What the last projection reads."""
    for one in index.once(feed_forwards):
        weights, (hidden, n_out) = index.weights(one.down), features(one.down)
        dims = {"in": hidden, "out": hidden, "d": n_out}
        if weights:
            yield Site("ffn.hidden", one.scope, dims, weights)
        else:
            yield computed("ffn.hidden", one.scope, one.down)


def find_part(wanted: str, index: Index) -> Iterator[Site | NoSite]:
    """The projection `wanted` (up, gate, down) of each feed-forward."""
    for one in index.once(feed_forwards):
        dims = {"d": features(one.down)[1]}
        for part, linear, columns in one.parts:
            if part == wanted:
                yield linear_site(index, linear, f"ffn.{part}", one.scope, "", dims, columns)


def find_any(index: Index) -> Iterator[Site | NoSite]:
    """Every projection by the path of its own module; halves of one linear are told apart by their part."""
    for one in index.once(feed_forwards):
        dims = {"d": features(one.down)[1]}
        for part, linear, columns in one.parts:
            scope = f"{scope_of(linear)}.{part}" if columns else scope_of(linear)
            yield linear_site(index, linear, "ffn.linear", scope, "", dims, columns)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """From the first projection's input to the last one's result, with the residual that is added to it."""
    if "W" not in site.weights:
        return mixture.locate(index, site)
    return tuple(_place(start, end) for start, end in sublayer.between(index, site, "up"))


def _place(start: fx.Node, end: fx.Node) -> Place:
    x, h = ports_of(start)["x"], ports_of(end)["h"]
    residual = residual_add(end)
    if residual is None:
        return Place({"x": x, "h": h})
    added = replace(h, whole=residual) if isinstance(h, Part) else residual
    return Place({"x": x, "h": h, "residual": added})


def locate_hidden(index: Index, site: Site) -> tuple[Place, ...]:
    """The last projection's operand."""
    ends = index.multiplying(site.weights["W"].path)
    return tuple(Place({"h": ports_of(end)["x"]}) for end in ends)
