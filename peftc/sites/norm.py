"""Norms: layer norms and RMS norms with a learned scale, as one op or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from peftc.graph.aten import ADD, MOVE, NORM, static_shape
from peftc.graph.program import Read, Value, aten, is_call, scope_of
from peftc.sites.dataflow import before
from peftc.sites.index import Index
from peftc.sites.site import NoSite, Place, Site
from peftc.sites.view import Port, Weight


@dataclass(frozen=True)
class Norm:
    """Where its scale and shift are read, and its result."""

    weight: Read
    bias: Read | None
    h: fx.Node


def norms(index: Index) -> Iterator[Norm]:
    """Normalisations with a learned scale, in graph order."""
    parameter = index.program.parameter
    for node in index.calls(*NORM, aten.mul.Tensor):
        if is_call(node, *NORM):
            # aten.layer_norm(input, normalized_shape, weight, bias, ...)
            if len(node.args) > 2 and parameter(node.args[2]):
                shifted = len(node.args) > 3 and parameter(node.args[3])
                yield Norm(Read(node, 2), Read(node, 3) if shifted else None, node)
            continue
        for i in (0, 1):
            scale = _scale(index, node, i)
            if scale is not None and _is_normalised(node.args[1 - i]):
                yield Norm(scale, None, node)


def _scale(index: Index, mul: fx.Node, i: int) -> Read | None:
    """The read of a learned scale: the parameter itself, or 1 + it."""
    node, parameter = mul.args[i], index.program.parameter
    if parameter(node):
        return Read(mul, i)
    if isinstance(node, fx.Node) and is_call(node, *ADD) and parameter(node.args[0]):
        return Read(node, 0)
    return None


def _is_normalised(node: object) -> bool:
    """Whether `node` is x * rsqrt(...), perhaps cast."""
    value = before(node, *MOVE)
    return is_call(value, aten.mul.Tensor) and any(
        is_call(arg, aten.rsqrt.default) for arg in value.args
    )


def find(index: Index) -> Iterator[Site | NoSite]:
    for norm in index.once(norms):
        scope, size = scope_of(norm.h), static_shape(norm.h)[-1]
        weights = {"W": Weight(index.program.parameter(norm.weight.node) or "")}
        if norm.bias is not None:
            weights["b"] = Weight(index.program.parameter(norm.bias.node) or "")
        absent = {} if norm.bias is not None else {"b": "this norm has no bias"}
        dims = {"in": size, "out": size, "d": size}
        yield Site("norm", scope, dims, weights, absent=absent)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that this scale is applied."""
    return tuple(
        Place(_ports(one))
        for one in index.once(norms)
        if index.program.parameter(one.weight.node) == site.weights["W"].path
    )


def _ports(norm: Norm) -> dict[str, Port]:
    ports: dict[str, Port] = {"h": Value(norm.h), "W": norm.weight}
    return ports if norm.bias is None else {**ports, "b": norm.bias}
