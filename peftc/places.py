"""Places: where a site's ports are in one Program, found again by what names the site."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from peftc import dataflow as flow
from peftc.fused import SiteError, part
from peftc.program import Port, Program, Read, Value, aten, is_call
from peftc.sites import Site

Ports = Mapping[str, Port]


def locate(program: Program, site: Site) -> tuple[Ports, ...]:
    """The site's ports in this Program: one mapping for each time its module runs here, maybe none."""
    if site.at == "attention.heads":
        return tuple(_core_ports(c) for c in flow.cores(program) if c.scope == site.scope)
    if site.at == "attention":
        return _between(program, site.anchors["q"], site.anchors["o"])
    if site.at == "ffn":
        return _between(program, site.anchors["up"], site.anchors["down"])
    if site.at == "ffn.hidden":
        return tuple({"h": flow.input_of(n)} for n in consumers(program, site.anchors["down"]))
    if site.at in ("norm", "embedding"):
        return tuple({"h": Value(n)} for n in _owners(program, site))
    return tuple(_linear_ports(n, site) for n in consumers(program, site.anchors["W"]))


def consumers(program: Program, weight: str) -> list[fx.Node]:
    """The linears that multiply by this weight, in graph order."""
    return [
        n
        for n in program.graph.nodes
        if is_call(n, *flow.LINEAR) and program.parameter(flow.weight_of(n)) == weight
    ]


def _owners(program: Program, site: Site) -> Iterator[fx.Node]:
    place = 0 if site.at == "embedding" else 2
    for node in program.graph.nodes:
        kinds = (aten.embedding.default, aten.layer_norm.default, aten.rms_norm.default)
        if is_call(node, *kinds) and len(node.args) > place:
            if program.parameter(node.args[place]) == site.anchors["W"]:
                yield node


def _core_ports(core: flow.Core) -> Ports:
    ports: dict[str, Port] = {"q": core.q, "k": core.k, "v": core.v, "h": Value(core.h)}
    if core.mask is not None:
        ports["mask"] = core.mask
    return ports


def _between(program: Program, first: str, last: str) -> tuple[Ports, ...]:
    """Ports of a sub-layer that starts at one linear and ends at another."""
    starts, ends = consumers(program, first), consumers(program, last)
    if len(starts) != len(ends):
        raise SiteError(
            f"entry '{program.entry}': '{first}' runs {len(starts)} times but '{last}' {len(ends)} times"
        )
    found = []
    for start, end in zip(starts, ends, strict=True):
        ports: dict[str, Port] = {"x": flow.input_of(start), "h": Value(flow.result_of(end))}
        residual = flow.residual_add(end)
        if residual is not None:
            ports["residual"] = residual
        found.append(ports)
    return tuple(found)


def _linear_ports(linear: fx.Node, site: Site) -> Ports:
    result = flow.result_of(linear) if site.columns is None else part(linear, site.columns)
    ports: dict[str, Port] = {"x": flow.input_of(linear), "h": Value(result)}
    if site.columns is None:
        transposed = linear.target is aten.addmm.default
        ports["W"] = Read(linear, 2 if transposed else 1)
        if flow.bias_of(linear) is not None:
            ports["b"] = Read(linear, 0 if transposed else 2)
    return ports
