"""Mixers: sub-layers that let tokens meet without a softmax (state spaces, linear attention), and their projections."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from peftc.graph.aten import CONV, MATMUL, MOVE, features, is_pointwise, weight_of
from peftc.graph.facts import Stacks
from peftc.graph.program import Read, Value, aten, is_call, scope_of
from peftc.sites import attention, feed_forward
from peftc.sites.dataflow import residual_add
from peftc.sites.index import Index
from peftc.sites.linear import computed, linear_site
from peftc.sites.site import NoSite, Place, Site, layer_of

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


def mixers(index: Index) -> tuple[Mixer, ...]:
    """The mixers of a graph, in its order: what ends in a residual add, and is neither attention nor feed-forward."""
    taken = index.once(feed_forward.linears_of)
    inside: dict[str, list[fx.Node]] = {}
    for node in index.order:
        if node.op == "call_function":
            inside.setdefault(scope_of(node).rpartition(".")[0], []).append(node)
            inside.setdefault(scope_of(node), []).append(node)
    found = (_mixer(index, one, inside) for one in index.linears if one not in taken)
    return tuple(one for one in found if one is not None)


def _mixer(index: Index, out: fx.Node, inside: dict[str, list[fx.Node]]) -> Mixer | None:
    scope = scope_of(out).rpartition(".")[0]
    if not scope or residual_add(out) is None:
        return None
    within = inside.get(scope, [])
    linears = [one for one in index.linears if scope_of(one).rpartition(".")[0] == scope]
    ins = tuple(one for one in linears if one is not out and _is_first(one, scope))
    sources = {_unmoved(one.args[0]) for one in ins}
    meets = any(is_call(one, *_MEETS) for one in within)
    return Mixer(ins, out) if ins and len(sources) == 1 and meets else None


def _is_first(linear: fx.Node, scope: str) -> bool:
    """Whether nothing of the module but what is pointwise (a mask) is before a linear."""
    stack: list[object] = [linear.args[0]]
    while stack:
        node = stack.pop()
        if isinstance(node, fx.Node) and _is_inside(node, scope):
            if not (is_pointwise(node) or is_call(node, *MOVE)):
                return False
            stack += [node.args[0]]
    return True


def _unmoved(node: object) -> object:
    while is_call(node, *MOVE):
        node = node.args[0]  # type: ignore[attr-defined]
    return node


def _is_inside(node: object, scope: str) -> bool:
    return isinstance(node, fx.Node) and f"{scope_of(node)}.".startswith(f"{scope}.")


def find(index: Index, stacks: Stacks) -> Iterator[Site | NoSite]:
    """Whole sub-layers, found by their first and last projection."""
    for one in index.once(mixers):
        first, last = index.weights(one.ins[0]), index.weights(one.out)
        if not (first and last):
            yield NoSite(
                ("mixer",), one.scope, computed(weight_of(one.out if first else one.ins[0]))
            )
            continue
        size, width = features(one.ins[0])[0], features(one.out)[1]
        dims = {"in": size, "out": width, "d": width}
        stack, layer = stacks.of(one.scope), layer_of(one.scope)
        yield Site("mixer", one.scope, stack, "", layer, dims, {**last, "in": first["W"]})


def find_side(side: str, index: Index, stacks: Stacks) -> Iterator[Site | NoSite]:
    """The projections that read the input (`in`), or the one whose result is added to the residual (`out`)."""
    for one in index.once(mixers):
        dims = {"d": features(one.out)[1]}
        for linear in one.ins if side == "in" else (one.out,):
            scope = scope_of(linear)
            yield linear_site(index, stacks, linear, f"mixer.{side}", scope, "", dims)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """From the input of the first projection to the result of the last."""
    ends = index.multiplying(site.weights["W"].path)
    starts = attention.between(index, site, site.weights["in"].path, ends)
    return tuple(
        Place({"x": Read(start, 0), "h": Value(end)})
        for start, end in zip(starts, ends, strict=True)
    )
