"""Sub-layers: from what a first linear reads to what a last one gives."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from peftc.graph.aten import features
from peftc.sites.dataflow import runs
from peftc.sites.index import Index
from peftc.sites.linear import computed, ports_of
from peftc.sites.site import NoSite, Place, Site, SiteError


def find(
    index: Index,
    at: str,
    scope: str,
    ends: tuple[fx.Node, fx.Node],
    role: str,
    dims: Mapping[str, int] | None = None,
    kind: str = "",
) -> Site | NoSite:
    """The site between two linears, found by the weight of the first as `role`; NoSite where the graph computes one."""
    first, last = (index.weights(one) for one in ends)
    if not (first and last):
        return computed(at, scope, ends[1] if first else ends[0])
    n_in, n_out = features(ends[0])[0], features(ends[1])[1]
    sizes = {**(dims or {}), "in": n_in, "out": n_out, "d": n_out}
    return Site(at, scope, sizes, {**last, role: first["W"]}, kind)


def locate(role: str, index: Index, site: Site) -> tuple[Place, ...]:
    """From the input of the first linear to the result of the last, each time that the module runs."""
    return tuple(
        Place({"x": ports_of(start)["x"], "h": ports_of(end)["h"]})
        for start, end in between(index, site, role)
    )


def between(index: Index, site: Site, role: str) -> list[tuple[fx.Node, fx.Node]]:
    """The first and the last linear of each run. Raises SiteError."""
    first, ends = site.weights[role].path, index.multiplying(site.weights["W"].path)
    starts = runs(index.multiplying(first), ends, index.order)
    if len(starts) < len(ends):
        raise SiteError(
            f"entry '{index.program.entry}': '{first}' does not run before {ends[len(starts)].name} "
            f"of {site.name}"
        )
    return list(zip(starts, ends, strict=True))
