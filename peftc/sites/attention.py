"""Attention sub-layers: the whole, its heads, and its four projections."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest

from torch import fx

from peftc.graph.aten import features, static_shape
from peftc.graph.program import Value, scope_of
from peftc.sites import fused, sublayer
from peftc.sites.cores import Core, cores, missed
from peftc.sites.dataflow import next_linear, projections, runs
from peftc.sites.index import Index
from peftc.sites.linear import linear_site, ports_of
from peftc.sites.site import NoSite, Place, Site
from peftc.sites.view import Columns, Part, Port, View, channels_last

SIDES = ("q", "k", "v")
_ALL = ("attention", "attention.heads", *(f"attention.{side}" for side in (*SIDES, "o")))


@dataclass(frozen=True)
class Attention:
    """A core with the linears around it. `columns` has the slices of those that are fused. `downs` are the first of
    two linears, one after another, that make one side (multi-head latent attention, DeepSeek-V2)."""

    core: Core
    linears: Mapping[str, fx.Node]
    columns: Mapping[str, Columns | None]
    downs: Mapping[str, fx.Node]

    @property
    def kind(self) -> str:
        """Self attention projects queries and keys from one value."""
        q, k = self.first("q"), self.first("k")
        return "self" if q is k or q.args[0] is k.args[0] else "cross"

    def first(self, side: str) -> fx.Node:
        """The linear that reads the sub-layer's input."""
        return self.downs.get(side, self.linears[side])

    @property
    def dims(self) -> dict[str, int]:
        """Sizes by name; heads that share an axis with the batch have no number."""
        heads, _, head_dim = static_shape(self.core.q.node)[-3:]
        kv_heads, value_dim = static_shape(self.core.k.node)[-3], static_shape(self.core.v.node)[-1]
        sizes = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
        sizes |= {"kv": kv_heads * head_dim, "d": features(self.linears["o"])[1]}
        return {name: size for name, size in sizes.items() if size > 0}

    def has(self, side: str) -> bool:
        """Whether a side is a site of its own: not when its linear makes another side too and no slice is its."""
        alone = [*self.linears.values()].count(self.linears[side]) == 1
        return alone or self.columns[side] is not None


def attentions(index: Index) -> Iterator[Attention]:
    """The attention sub-layers whose projections are one linear each, in graph order. Columns are those of all cores of
    a module: some split the heads of one value over two."""
    found = [one for one in index.once(_tried) if isinstance(one, Attention)]
    for one in found:
        me = one.core.scope, one.linears
        same = [other.columns for other in found if (other.core.scope, other.linears) == me]
        united = {
            side: fused.united([columns[side] for columns in same], features(linear)[1])
            for side, linear in one.linears.items()
        }
        yield replace(one, columns=united)


def wholes(index: Index) -> Iterator[Attention]:
    """Those of them that are the whole of their module: where another core is not known (ProphetNet's two streams), the
    projections are sites, and the whole is none."""
    halves = {scope for scope, _ in missed(index)}
    yield from (one for one in index.once(attentions) if one.core.scope not in halves)


def _tried(index: Index) -> Iterator[Attention | NoSite]:
    """What each core is the middle of, and why what looks like one is none."""
    yield from map(_attention, index.once(cores))
    reason = "a softmax is multiplied here, of a '{}' that is no product of queries and keys as they are known"
    yield from (NoSite(_ALL, scope, reason.format(op)) for scope, op in missed(index))


def _attention(core: Core) -> Attention | NoSite:
    found = {side: _last(projections(getattr(core, side).node)) for side in SIDES}
    for side, linears in found.items():
        if len(linears) != 1:
            several = f"{len(linears)} linears ({', '.join(map(scope_of, linears))})"
            fact = f"its {_NAMES[side]} come from {several if linears else 'no linear'}"
            return NoSite(_ALL, core.scope, fact)
    single = {side: one for side, (one,) in found.items()}
    out = next_linear(core.h, single["v"])
    if out is None:
        return NoSite(_ALL, core.scope, "its result goes into no linear")
    columns = {side: fused.columns(getattr(core, side).node, one) for side, one in single.items()}
    downs = {side: down for side, one in single.items() if (down := _down(core, one))}
    return Attention(core, {**single, "o": out}, {**columns, "o": None}, downs)


def _last(linears: tuple[fx.Node, ...]) -> tuple[fx.Node, ...]:
    """Of linears that a value is computed from those that none of the others is computed from."""
    if len(linears) < 2:
        return linears
    before = {behind for one in linears for behind in _before(one)}
    return tuple(one for one in linears if one not in before)


def _before(linear: fx.Node) -> tuple[fx.Node, ...]:
    source = linear.args[0]
    assert isinstance(source, fx.Node)
    return projections(source)


def _down(core: Core, linear: fx.Node) -> fx.Node | None:
    """The linear of the same module whose result, normed perhaps, is all that this one reads."""
    before = _before(linear)
    inside = before and f"{scope_of(before[0])}.".startswith(f"{core.scope}.")
    return before[0] if len(before) == 1 and inside else None


_NAMES = {"q": "queries", "k": "keys", "v": "values"}


def linears_of(index: Index) -> Iterator[fx.Node]:
    """The linears that belong to attention."""
    for one in index.once(attentions):
        yield from (*one.linears.values(), *one.downs.values())


def find(index: Index) -> Iterator[Site | NoSite]:
    """Whole sub-layers, found by their query and output projections; and what is none."""
    yield from (one for one in index.once(_tried) if isinstance(one, NoSite))
    for one in index.once(wholes):
        ends = one.first("q"), one.linears["o"]
        yield sublayer.find(index, "attention", one.core.scope, ends, "q", one.dims, one.kind)


locate = partial(sublayer.locate, "q")


def find_heads(index: Index) -> Iterator[Site | NoSite]:
    """Cores, found by their module's path."""
    for one in index.once(wholes):
        scope, size = one.core.scope, features(one.first("q"))[0]
        dims = {**one.dims, "in": size, "out": one.dims["d"]}
        counts = one.core.counts_back
        yield Site("attention.heads", scope, dims, {}, one.kind, counts_back=counts)


def find_side(side: str, index: Index) -> Iterator[Site | NoSite]:
    """One projection of each sub-layer; its `input` is found by the query's weight."""
    for one in index.once(attentions):
        if not one.has(side):
            continue
        query = index.weights(one.first("q")).get("W")
        found = linear_site(
            index,
            one.linears[side],
            f"attention.{side}",
            one.core.scope,
            one.kind,
            one.dims,
            one.columns[side],
            {"q": query} if query else None,
        )
        reason = ""
        if query is None:
            reason = "the graph computes the weight of its queries"
        elif one.kind == "cross" and side in ("k", "v"):
            reason = "the sub-layer's input is as long as the queries, not as what is attended to"
        if reason and isinstance(found, Site):
            found = replace(found, absent={**found.absent, "input": reason})
        yield found


def find_down(side: str, index: Index) -> Iterator[Site | NoSite]:
    """The first of two projections of a side, where there are two."""
    for one in index.once(attentions):
        if side in one.downs:
            at, scope = f"attention.{side}_down", one.core.scope
            yield linear_site(index, one.downs[side], at, scope, one.kind, one.dims)


def locate_heads(index: Index, site: Site) -> tuple[Place, ...]:
    """The cores in this module."""
    found = (one for one in index.once(cores) if one.scope == site.scope)
    return tuple(_core(one, site.counts_back) for one in found)


def _core(core: Core, counts_back: bool) -> Place:
    keys = Part(core.k, View(channels_last(1))) if core.features_first else core.k
    ports: dict[str, Port] = {"q": core.q, "k": keys, "v": core.v, "h": Value(core.h)}
    masks = tuple(replace(one, bias=one.bias and counts_back) for one in core.masks)
    return Place(ports, core=replace(core, masks=masks))


def locate_side(index: Index, site: Site) -> tuple[Place, ...]:
    """As a linear, with the sub-layer's `input`, which the query reads. A key may run without its query: cross
    attention's, once for a whole generation."""
    ends, queries = _ends(index, site)
    return _with_input(site, ends, queries[: len(ends)])


def locate_output(index: Index, site: Site) -> tuple[Place, ...]:
    """As `locate_side`; the query that starts the sub-layer is the one before each output."""
    ends, queries = _ends(index, site)
    return _with_input(site, ends, runs(queries, ends, index.order))


def _ends(index: Index, site: Site) -> tuple[list[fx.Node], list[fx.Node]]:
    queries = index.multiplying(site.weights["q"].path) if "q" in site.weights else []
    return index.multiplying(site.weights["W"].path), queries


def _with_input(site: Site, ends: list[fx.Node], queries: list[fx.Node]) -> tuple[Place, ...]:
    columns = site.weights["W"].view.columns
    return tuple(
        Place(ports_of(end, columns) | ({"input": ports_of(query)["x"]} if query else {}))
        for end, query in zip_longest(ends, queries)
    )


PROJECTIONS = {**dict.fromkeys(SIDES, locate_side), "o": locate_output}
