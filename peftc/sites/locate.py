"""Places: where a site's ports are in one Program, found again by what names the site."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import zip_longest

from torch import fx

from peftc.graph.program import (
    TURNED,
    Form,
    Keys,
    Part,
    Port,
    Program,
    Read,
    Value,
    aten,
    is_call,
    scope_of,
)
from peftc.sites import dataflow as flow
from peftc.sites.attention import Core, cores
from peftc.sites.fused import SiteError
from peftc.sites.site import Site

Ports = Mapping[str, Port]


@dataclass(frozen=True)
class Place:
    """A site in one Program: its ports, and of an attention what follows its number of keys."""

    ports: Ports
    keys: Keys | None = None


def locate(program: Program, site: Site) -> tuple[Place, ...]:
    """The site in this Program: once for each time its module runs here, maybe never."""
    if site.at == "attention.heads":
        return tuple(_core(c) for c in cores(program) if c.scope == site.scope)
    return tuple(Place(ports) for ports in _ports(program, site))


def _ports(program: Program, site: Site) -> tuple[Ports, ...]:
    if site.at == "attention":
        return _between(program, site.anchors["q"], site.anchors["o"])
    if site.at == "ffn":
        return _between(program, site.anchors["up"], site.anchors["down"])
    if site.at == "ffn.hidden":
        return tuple({"h": flow.input_of(n)} for n in consumers(program, site.anchors["down"]))
    if site.at == "norm":
        return tuple(_norm_ports(one) for one in flow.norms(program) if _is(program, one, site))
    if site.at == "embedding":
        return tuple(_embedding_ports(n) for n in _embeddings(program, site))
    if site.at == "conv":
        return tuple(_convolution_ports(n, site.kernel) for n in _convolutions(program, site))
    places = [_linear_ports(n, site) for n in consumers(program, site.anchors["W"])]
    if "input" not in site.anchors:
        return tuple(places)
    linears = consumers(program, site.anchors["W"])
    if site.at == "attention.o":
        queries: Iterable[fx.Node] = _starts(program, site.anchors["input"], linears)
    else:  # a key may run without its query (cross attention's, once for a whole generation)
        queries = consumers(program, site.anchors["input"])
    return tuple(
        {**one, "input": flow.input_of(query)} if query is not None else one
        for one, query in zip_longest(places, list(queries)[: len(places)])
    )


def consumers(program: Program, weight: str) -> list[fx.Node]:
    """The linears that multiply by this weight, in graph order."""
    return [
        n
        for n in program.graph.nodes
        if is_call(n, *flow.LINEAR) and program.parameter(flow.weight_of(n)) == weight
    ]


def weights_used(program: Program, site: Site) -> list[str]:
    """The weights of the site that this Program computes with, in the way that the site is about."""
    if site.at != "conv":
        return [weight for weight in site.weights if consumers(program, weight)]
    slots = {program.parameter(n) for n in program.graph.nodes if n.op == "placeholder" and n.users}
    return [weight for weight in site.weights if weight in slots]


def _convolutions(program: Program, site: Site) -> Iterator[fx.Node]:
    for node in program.graph.nodes:
        if flow.is_convolution(node) and (
            program.parameter(flow.weight_of(node)) == site.anchors["W"]
        ):
            yield node


def _embeddings(program: Program, site: Site) -> Iterator[fx.Node]:
    for node in program.graph.nodes:
        if is_call(node, aten.embedding.default) and scope_of(node) == site.scope:
            if program.parameter(node.args[0]) == site.anchors["W"]:  # tied ones are several sites
                yield node


def _embedding_ports(node: fx.Node) -> Ports:
    return {"ids": Read(node, 1), "h": Value(node), "W": Read(node, 0)}


def _is(program: Program, norm: flow.Norm, site: Site) -> bool:
    return program.parameter(norm.weight.node) == site.anchors["W"]


def _norm_ports(norm: flow.Norm) -> Ports:
    ports: dict[str, Port] = {"h": Value(norm.h), "W": norm.weight}
    if norm.bias is not None:
        ports["b"] = norm.bias
    return ports


def _core(core: Core) -> Place:
    ports: Ports = {"q": core.q, "k": core.k, "v": core.v, "h": Value(core.h)}
    return Place(ports, Keys(core.masks, core.sized))


def _between(program: Program, first: str, last: str) -> tuple[Ports, ...]:
    """Ports of a sub-layer that starts at one linear and ends at another."""
    found = []
    ends = consumers(program, last)
    for start, end in zip(_starts(program, first, ends), ends, strict=True):
        ports: dict[str, Port] = {"x": flow.input_of(start), "h": Value(flow.result_of(end))}
        residual = flow.residual_add(end)
        if residual is not None:
            ports["residual"] = residual
        found.append(ports)
    return tuple(found)


def _starts(program: Program, first: str, ends: list[fx.Node]) -> Iterator[fx.Node]:
    """For each end the earliest use of `first` since the end before: a query may also project positions."""
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    starts, since = consumers(program, first), -1
    for end in ends:
        mine = [one for one in starts if since < order[one] <= order[end]]
        if not mine:
            raise SiteError(f"entry '{program.entry}': '{first}' does not run before {end.name}")
        yield mine[0]
        since = order[end]


def _linear_ports(linear: fx.Node, site: Site) -> Ports:
    """x, h, W as [out, in] and b; of a slice of a fused projection, that slice of each."""
    transposed = linear.target is aten.addmm.default
    result, cut = Value(flow.result_of(linear)), site.columns
    weight, bias = Read(linear, 2 if transposed else 1), Read(linear, 0 if transposed else 2)
    ports: dict[str, Port] = {
        "x": flow.input_of(linear),
        "h": Part(result, -1, cut) if cut else result,
    }
    form = TURNED if transposed else None
    ports["W"] = Part(weight, 0, cut, form) if cut or form else weight
    if flow.bias_of(linear) is not None:
        ports["b"] = Part(bias, 0, cut) if cut else bias
    return ports


def _convolution_ports(conv: fx.Node, kernel: tuple[int, ...]) -> Ports:
    """x and h with their channels last, W [out, in] with the kernel flattened, and b."""
    axis = -len(kernel)
    last = Form(aten.movedim.int, (axis, -1), aten.movedim.int, (-1, axis), "last")
    flat = Form(aten.flatten.using_ints, (1,), aten.unflatten.int, (1, kernel), "flat")
    ports: dict[str, Port] = {
        "x": Part(Read(conv, 0), -1, form=last),
        "h": Part(Value(conv), -1, form=last),
        "W": Part(Read(conv, 1), form=flat),
    }
    if flow.bias_of(conv) is not None:
        ports["b"] = Read(conv, 2)
    return ports
