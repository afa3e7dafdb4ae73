"""The kinds of sites: how each is found in a model, where it is in a graph, what a change of it folds into.

A kind is a row here, its ports in `peftc.language.ports`, and a file beside this one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

from peftc.graph.facts import Stacks
from peftc.graph.program import Program
from peftc.sites import (
    attention,
    convolution,
    embedding,
    experts,
    feed_forward,
    linear,
    mixer,
    norm,
    router,
)
from peftc.sites.index import Index
from peftc.sites.site import NoSite, Place, Site


@dataclass(frozen=True)
class Folds:
    """What a change of a site's ports is to the map that its weights W and b make.

    `ports` names the role of each port there: x, W, b or h. `by` says how W makes h of x: "linear" (x @ W.T + b),
    "table" (the rows of W that ids name), "kernels" (W sees more of x than one position) or "vector" (W and b
    are used element by element). `owns` says that every parameter of its sort is at one site of this kind.
    """

    by: str = "linear"
    ports: Mapping[str, str] = field(default_factory=lambda: {"h": "h"})
    owns: bool = False


@dataclass(frozen=True)
class Kind:
    """One kind of site. `find` yields every site of a model's `forward`, or why something like it is none;
    `locate` gives its places in a graph; `used` names what a graph reads of a site, which must then have a
    place there; `folds` is None where no change of it is one of a weight. `operands` are the ports that are what
    another linear reads, each with the role that this linear's weight has in the site."""

    name: str
    find: Callable[[Index], Iterable[Site | NoSite]]
    locate: Callable[[Index, Site], tuple[Place, ...]]
    used: Callable[[Index, Site], Iterable[str]] = linear.used
    folds: Folds | None = None
    operands: Mapping[str, str] = field(default_factory=dict)


_WHOLE = Folds()
_HIDDEN = Folds(ports={"h": "x"})
_LINEAR = Folds("linear", {"x": "x", "h": "h", "W": "W", "b": "b"})
_EXPERTS = Folds("linear", {"x": "x", "h": "h", "W": "W"})
_TABLE = Folds("table", {"ids": "x", "h": "h", "W": "W"}, owns=True)
_KERNELS = Folds("kernels", _LINEAR.ports, owns=True)
_VECTOR = Folds("vector", {"W": "W", "b": "b"}, owns=True)


def _linear(
    name: str,
    find: Callable[[Index], Iterable[Site | NoSite]],
    locate: Callable[[Index, Site], tuple[Place, ...]] = linear.locate,
    operands: Mapping[str, str] | None = None,
) -> Kind:
    return Kind(name, find, locate, folds=_LINEAR, operands=operands or {})


def _nothing(index: Index, site: Site) -> Iterator[str]:
    """A core has no weight of its own: where its module runs no attention, nothing is missed."""
    yield from ()


def _read(index: Index, site: Site) -> Iterator[str]:
    """Its parameters that anything in this graph reads."""
    yield from (one.path for one in site.weights.values() if index.readers(one.path))


KINDS: dict[str, Kind] = {
    row.name: row
    for row in (
        Kind("attention", attention.find, attention.locate, folds=_WHOLE, operands={"x": "q"}),
        Kind("attention.heads", attention.find_heads, attention.locate_heads, _nothing),
        *(
            _linear(f"attention.{side}", partial(attention.find_side, side), locate, {"input": "q"})
            for side, locate in attention.PROJECTIONS.items()
        ),
        *(
            _linear(f"attention.{side}_down", partial(attention.find_down, side))
            for side in attention.SIDES
        ),
        Kind("ffn", feed_forward.find, feed_forward.locate, feed_forward.used, _WHOLE, {"x": "up"}),
        Kind("ffn.hidden", feed_forward.find_hidden, feed_forward.locate_hidden, folds=_HIDDEN),
        *(
            _linear(f"ffn.{part}", partial(feed_forward.find_part, part))
            for part in ("up", "gate", "down")
        ),
        _linear("ffn.linear", feed_forward.find_any),
        Kind("mixer", mixer.find, mixer.locate, folds=_WHOLE, operands={"x": "in"}),
        *(_linear(f"mixer.{side}", partial(mixer.find_side, side)) for side in ("in", "out")),
        _linear("router", router.find),
        *(
            Kind(name, partial(experts.find, name), experts.locate, experts.used, _EXPERTS)
            for name in ("experts", "experts.up", "experts.gate", "experts.down")
        ),
        Kind("linear", linear.find_all, linear.locate, folds=replace(_LINEAR, owns=True)),
        _linear("head", partial(linear.find_head, feed_forward.linears_of)),
        Kind("norm", norm.find, norm.locate, _read, _VECTOR),
        Kind("embedding", embedding.find, embedding.locate, embedding.used, _TABLE),
        Kind("conv", convolution.find, convolution.locate, _read, _KERNELS),
    )
}


@dataclass(frozen=True)
class Survey:
    """What a model has to offer: its sites, kind by kind in graph order, and what is none, with the reason."""

    sites: tuple[Site, ...]
    none: tuple[NoSite, ...]

    @staticmethod
    def of(program: Program, stacks: Stacks) -> Survey:
        """Every site of a normalised `forward` Program."""
        index = Index(program, stacks.is_head)
        sites: dict[object, Site] = {}
        none: dict[NoSite, None] = {}
        for kind in KINDS.values():
            for one in kind.find(index):
                if isinstance(one, NoSite):
                    none[one] = None
                    continue
                one = replace(one, stack=stacks.of(one.scope))
                if (same := sites.setdefault(_identity(one), one)).weights != one.weights:
                    path = one.weights["W"].path
                    none[NoSite((one.at,), path, f"{same.name} is another of its module")] = None
        return Survey(tuple(sites.values()), tuple(none))


def _identity(site: Site) -> object:
    """A module that runs several times (shared layers) is one site; slices of one linear are several."""
    columns = site.weights["W"].view.columns if "W" in site.weights else None
    return site.at, site.scope, columns
