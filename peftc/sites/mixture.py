"""Feed-forwards of experts: from what the router reads to what is added to the residual, whatever the experts are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from peftc.graph.aten import ADD, DROPOUT, MOVE, MUL, VIEW
from peftc.graph.program import Read, Value, behind, is_call, scope_of
from peftc.sites import router
from peftc.sites.dataflow import before
from peftc.sites.index import Index
from peftc.sites.linear import computed
from peftc.sites.site import NoSite, Place, Site, innermost


@dataclass(frozen=True)
class Mixture:
    """A router with all that is computed of it until `residual` is added to the result `h`."""

    router: fx.Node
    x: Read
    h: fx.Node
    residual: Read | None  # None where there are several

    @property
    def scope(self) -> str:
        """The innermost module that has the router and the result."""
        return innermost((scope_of(self.router), scope_of(self.h)))


def mixtures(index: Index) -> Iterable[Mixture]:
    """The mixtures of experts of a graph, in its order."""
    return filter(None, (_mixture(index, one) for one in index.once(router.scoring)))


def _mixture(index: Index, scores: fx.Node) -> Mixture | None:
    nodes = list(index.order)
    earlier = {one for one in behind(scores) if one.op == "call_function"} - {scores}
    start = before(scores.args[0], *MOVE)
    later = {scores}
    for node in nodes[index.order[scores] + 1 :]:
        sources = node.all_input_nodes
        if not later.intersection(sources):
            continue
        if is_call(node, *ADD) and len(sources) == 2:
            past = next((i for i in (0, 1) if _passes(node.args[i], start, earlier, later)), None)
            if past is not None:
                h = before(node.args[1 - past], *DROPOUT)
                x = _as_long(Read(scores, 0), h)
                one = _before_streams(h, x, later)
                return Mixture(scores, x, one, Read(node, past) if one is h else None)
        later.add(node)
    return None


def _passes(other: Any, start: fx.Node, earlier: set[fx.Node], later: set[fx.Node]) -> bool:
    """Whether what is added is none of the experts': it is what their input is made of, alone or with the results of
    others. A shared expert reads their input only."""
    if not isinstance(other, fx.Node) or other in later:
        return False
    scaled: Any = other
    while scaled is not start and is_call(scaled, *MOVE, *MUL):
        scaled = scaled.args[0]
    made_of = behind(other, lambda one: one is start).keys() - {start}
    return scaled is start or not earlier.isdisjoint(made_of)


def _as_long(x: Read, h: fx.Node) -> Read:
    """The input before its tokens were laid in one row, where the result has them apart."""
    while is_call(x.node, *VIEW) and x.node.meta["val"].ndim < h.meta["val"].ndim:
        x = Read(x.node, 0)
    return x


def _before_streams(h: fx.Node, x: Read, later: set[fx.Node]) -> fx.Node:
    """What is spread over several residual streams, where hyper-connections do that."""
    one = h
    while one.meta["val"].ndim > x.node.meta["val"].ndim and is_call(one, *MOVE, *MUL, *VIEW):
        one = next(read for read in one.all_input_nodes if read in later)
    return one if one.meta["val"].ndim == x.node.meta["val"].ndim else h


def find(index: Index) -> Iterator[Site | NoSite]:
    """Found by the router, whose weight stands for the first projection's."""
    for one in index.once(mixtures):
        weight = index.weights(one.router).get("W")
        if weight is None:
            yield computed("ffn", one.scope, one.router)
            continue
        size = int(one.h.meta["val"].shape[-1])
        dims = {"in": int(one.x.node.meta["val"].shape[-1]), "out": size, "d": size}
        absent = {} if one.residual else {"residual": "it is added to several residual streams"}
        weights = {"up": replace(weight, also="")}
        yield Site("ffn", one.scope, dims, weights, absent=absent)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that the router runs."""
    return tuple(
        Place(
            {"x": one.x, "h": Value(one.h), **({"residual": one.residual} if one.residual else {})}
        )
        for one in index.once(mixtures)
        if one.router in index.multiplying(site.weights["up"].path)
    )
