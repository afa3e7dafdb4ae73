"""Linears: those of attention and feed-forwards, of the task head, and any by its module's path."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import fx

from peftc.graph.aten import (
    LINEAR,
    bias_of,
    features,
    groups,
    is_convolution,
    static_shape,
    weight_of,
)
from peftc.graph.program import Read, Value, is_call, op_name, scope_of
from peftc.sites.index import Index
from peftc.sites.site import NoSite, Place, Site
from peftc.sites.view import Columns, Part, Port, View, Weight, channels_last, kernels, whole

# Products of matrices that are no linear: experts in one batch, `x @ W` with W as it is.
_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "_grouped_mm")


def linear_site(
    index: Index,
    linear: fx.Node,
    at: str,
    scope: str,
    kind: str = "",
    dims: Mapping[str, int] | None = None,
    columns: Columns | None = None,
    found_by: Mapping[str, Weight] | None = None,
) -> Site | NoSite:
    """The site `at` of a linear, or of some of its columns; NoSite where the graph computes its weight."""
    weights = index.weights(linear, View(columns=columns))
    if not weights:
        return computed(at, scope_of(linear), linear)
    n_in, n_out = features(linear)
    sizes = {**(dims or {}), "in": n_in, "out": columns.count if columns else n_out}
    sizes.setdefault("d", sizes["out"])
    if is_convolution(linear) and groups(linear) > 1:  # in one, it is a linear
        sizes["groups"] = groups(linear)
    absent = {} if "b" in weights else {"b": "this linear has no bias"}
    return Site(at, scope, sizes, {**weights, **(found_by or {})}, kind, absent=absent)


def computed(at: str, path: str, linear: fx.Node) -> NoSite:
    """None `at` a linear whose weight is nothing that a spec could change, and why."""
    weight, reason = weight_of(linear), "this weight is no parameter"
    if weight.op == "call_function":
        reason = f"'{op_name(weight)}' computes this weight in the graph"
    return NoSite((at,), path, reason)


def ports_of(linear: fx.Node, columns: Columns | None = None) -> dict[str, Port]:
    """x, h, W as [out, in] and b; of a slice of a fused projection, that slice of each. A convolution's x and h have
    their channels last, its W has the kernel flattened."""
    if is_convolution(linear):
        return _ports_of_convolution(linear)
    result, weight = Value(linear), Read(linear, 1)
    ports: dict[str, Port] = {"x": Read(linear, 0), "h": result, "W": weight}
    if bias_of(linear) is not None:
        ports["b"] = Read(linear, 2)
    if columns is not None:
        ports["h"] = Part(result, View(columns=columns, axis=-1))
        ports |= {p: Part(whole(ports[p]), View(columns=columns)) for p in ("W", "b") if p in ports}
    return ports


def _ports_of_convolution(conv: fx.Node) -> dict[str, Port]:
    kernel = static_shape(weight_of(conv))[1:]
    last = View(channels_last(len(kernel) - 1), axis=-1)
    ports: dict[str, Port] = {
        "x": Part(Read(conv, 0), last),
        "h": Part(Value(conv), last),
        "W": Part(Read(conv, 1), View(kernels(kernel))),
    }
    if bias_of(conv) is not None:
        ports["b"] = Read(conv, 2)
    return ports


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Once for each time that a linear of this weight runs, in graph order."""
    weight = site.weights["W"]
    return tuple(
        Place(ports_of(node, weight.view.columns)) for node in index.multiplying(weight.path)
    )


def used(index: Index, site: Site) -> Iterator[str]:
    """The site's own weight, where a linear of this graph multiplies by it."""
    if index.multiplying(site.weights["W"].path):
        yield site.weights["W"].path


def find_all(index: Index) -> Iterator[Site | NoSite]:
    """Every linear by the path of its module, and the matrices that no linear reads."""
    for node in index.linears:
        yield linear_site(index, node, "linear", scope_of(node))
    for node, path in index.parameters:
        if len(static_shape(node)) > 1 and (op := _other_product(index, path)):
            yield NoSite(_OF_LINEARS, path, f"'{op}' reads this weight, and it is no linear")


# A matrix that no linear reads may be any of these: the data flow around it was not understood.
_OF_LINEARS = ("linear", "ffn", "ffn.up", "ffn.gate", "ffn.down", "ffn.linear", "ffn.hidden")


def _other_product(index: Index, path: str) -> str:
    """The op outside torch, or else the product, that reads a matrix and is no linear."""
    readers = [one for one in index.readers(path) if not is_call(one, *LINEAR)]
    outside = [one for one in readers if not str(one.target).startswith("aten.")]
    products = [one for one in readers if op_name(one) in _PRODUCTS]
    return next((op_name(one) for one in [*outside, *products]), "")


def find_head(taken: Callable[[Index], Iterable[fx.Node]], index: Index) -> Iterator[Site | NoSite]:
    """The linears outside the pretrained body that are not `taken` by a sub-layer."""
    known = set(index.once(taken))
    for node in index.linears:
        if node not in known and index.is_head(scope_of(node)):
            yield linear_site(index, node, "head", scope_of(node))
