"""Feed-forwards of experts: from what the router reads to what is added to the residual, whatever the experts are."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from peftc.graph.aten import ADD, DROPOUT, MOVE, MUL, VIEW, weight_of
from peftc.graph.facts import Stacks
from peftc.graph.program import Read, Value, is_call, scope_of
from peftc.sites import router
from peftc.sites.index import Index
from peftc.sites.linear import computed
from peftc.sites.site import NoSite, Place, Site, innermost, layer_of


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


def mixtures(index: Index) -> tuple[Mixture, ...]:
    """The mixtures of experts of a graph, in its order."""
    found = (_mixture(index, one) for one in index.once(router.scoring))
    return tuple(one for one in found if one is not None)


def _mixture(index: Index, scores: fx.Node) -> Mixture | None:
    nodes, before = list(index.order), _before(scores, set())
    start: Any = scores.args[0]
    while is_call(start, *MOVE):
        start = start.args[0]
    behind = {scores}
    for node in nodes[index.order[scores] + 1 :]:
        sources = node.all_input_nodes
        if not behind.intersection(sources):
            continue
        if is_call(node, *ADD) and len(sources) == 2:
            past = next((i for i in (0, 1) if _passes(node.args[i], start, before, behind)), None)
            if past is not None:
                h: fx.Node = node.args[1 - past]  # type: ignore[assignment]
                while is_call(h, *DROPOUT):
                    h = h.args[0]  # type: ignore[assignment]
                x = _as_long(Read(scores, 0), h)
                one = _before_streams(h, x, behind)
                return Mixture(scores, x, one, Read(node, past) if one is h else None)
        behind.add(node)
    return None


def _before(node: fx.Node, but: set[fx.Node]) -> set[fx.Node]:
    """All values that a node is computed from, not through those in `but`."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        for one in stack.pop().all_input_nodes:
            if one not in found and one not in but and one.op == "call_function":
                found.add(one)
                stack.append(one)
    return found


def _passes(other: Any, start: fx.Node, before: set[fx.Node], behind: set[fx.Node]) -> bool:
    """Whether what is added is none of the experts': it is what their input is made of, alone or with the results of
    others. A shared expert reads their input only."""
    if not isinstance(other, fx.Node) or other in behind:
        return False
    scaled: Any = other
    while scaled is not start and is_call(scaled, *MOVE, *MUL):
        scaled = scaled.args[0]
    return other in before or scaled is start or bool(_before(other, {start}) & before)


def _as_long(x: Read, h: fx.Node) -> Read:
    """The input before its tokens were laid in one row, where the result has them apart."""
    while is_call(x.node, *VIEW) and x.node.meta["val"].ndim < h.meta["val"].ndim:
        x = Read(x.node, 0)
    return x


def _before_streams(h: fx.Node, x: Read, behind: set[fx.Node]) -> fx.Node:
    """What is spread over several residual streams, where hyper-connections do that."""
    one = h
    while one.meta["val"].ndim > x.node.meta["val"].ndim and is_call(one, *MOVE, *MUL, *VIEW):
        one = next(read for read in one.all_input_nodes if read in behind)
    return one if one.meta["val"].ndim == x.node.meta["val"].ndim else h


def find(index: Index, stacks: Stacks) -> Iterator[Site | NoSite]:
    """Found by the router, whose weight stands for the first projection's."""
    for one in index.once(mixtures):
        weight = index.weights(one.router).get("W")
        if weight is None:
            yield NoSite(("ffn",), one.scope, computed(weight_of(one.router)))
            continue
        size = int(one.h.meta["val"].shape[-1])
        dims = {"in": int(one.x.node.meta["val"].shape[-1]), "out": size, "d": size}
        stack, layer = stacks.of(one.scope), layer_of(one.scope)
        absent = {} if one.residual else {"residual": "it is added to several residual streams"}
        weights = {"up": replace(weight, also="")}
        yield Site("ffn", one.scope, stack, "", layer, dims, weights, absent=absent)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that the router runs."""
    return tuple(
        Place(
            {"x": one.x, "h": Value(one.h), **({"residual": one.residual} if one.residual else {})}
        )
        for one in index.once(mixtures)
        if one.router in index.multiplying(site.weights["up"].path)
    )
