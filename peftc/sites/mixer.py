"""Mixers: sub-layers that let tokens meet without a softmax (state spaces, linear attention), and their projections."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import fx

from peftc.graph.aten import CONV, MATMUL, MOVE, features, is_pointwise
from peftc.graph.program import aten, is_call, scope_of
from peftc.sites import feed_forward, sublayer
from peftc.sites.dataflow import before, residual_add
from peftc.sites.index import Index
from peftc.sites.linear import linear_site
from peftc.sites.site import NoSite, Site

# What lets tokens meet; a loop over them is many of these.
_MEETS = (*MATMUL, *CONV, aten.cumsum.default, aten.stack.default, aten.cat.default)


@dataclass(frozen=True)
class Mixer:
    """The linear `out`, whose result is added to the residual, and those of its module that read the input."""

    ins: tuple[fx.Node, ...]
    out: fx.Node

    @property
    def scope(self) -> str:
        return scope_of(self.out).rpartition(".")[0]


def mixers(index: Index) -> Iterable[Mixer]:
    """The mixers of a graph, in its order: what ends in a residual add, and is neither attention nor feed-forward."""
    taken = set(index.once(feed_forward.linears_of))
    inside: dict[str, list[fx.Node]] = {}
    for node in index.order:
        if node.op == "call_function":
            inside.setdefault(scope_of(node).rpartition(".")[0], []).append(node)
            inside.setdefault(scope_of(node), []).append(node)
    found = (_mixer(index, one, inside) for one in index.linears if one not in taken)
    return filter(None, found)


def _mixer(index: Index, out: fx.Node, inside: dict[str, list[fx.Node]]) -> Mixer | None:
    scope = scope_of(out).rpartition(".")[0]
    if not scope or residual_add(out) is None:
        return None
    within = inside.get(scope, [])
    linears = [one for one in index.linears if scope_of(one).rpartition(".")[0] == scope]
    ins = tuple(one for one in linears if one is not out and _is_first(one, scope))
    sources = {before(one.args[0], *MOVE) for one in ins}
    meets = any(is_call(one, *_MEETS) for one in within)
    return Mixer(ins, out) if ins and len(sources) == 1 and meets else None


def _is_first(linear: fx.Node, scope: str) -> bool:
    """Whether nothing of the module but what is pointwise (a mask) is before a linear."""
    node: Any = linear.args[0]
    while _is_inside(node, scope) and (is_pointwise(node) or is_call(node, *MOVE)):
        node = node.args[0]
    return not _is_inside(node, scope)


def _is_inside(node: object, scope: str) -> bool:
    return isinstance(node, fx.Node) and f"{scope_of(node)}.".startswith(f"{scope}.")


def find(index: Index) -> Iterator[Site | NoSite]:
    """Whole sub-layers, found by their first and last projection."""
    for one in index.once(mixers):
        yield sublayer.find(index, "mixer", one.scope, (one.ins[0], one.out), "in")


locate = partial(sublayer.locate, "in")


def find_side(side: str, index: Index) -> Iterator[Site | NoSite]:
    """The projections that read the input (`in`), or the one whose result is added to the residual (`out`)."""
    for one in index.once(mixers):
        dims = {"d": features(one.out)[1]}
        for linear in one.ins if side == "in" else (one.out,):
            scope = scope_of(linear)
            yield linear_site(index, linear, f"mixer.{side}", scope, "", dims)
