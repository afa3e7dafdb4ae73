"""Convolutions: the weight a matrix [out, in], x and h with their channels last."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import fx

from peftc.graph.aten import bias_of, static_shape, weight_of
from peftc.graph.facts import Stacks
from peftc.graph.program import Read, Value, aten, op_name, scope_of
from peftc.sites.index import Index
from peftc.sites.linear import computed
from peftc.sites.site import NoSite, Place, Site, layer_of
from peftc.sites.view import Part, Port, View, channels_last, kernels

_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)


def find(index: Index, stacks: Stacks) -> Iterator[Site | NoSite]:
    """Convolutions by their module's path; those whose weight is computed, and transposed ones, are none."""
    for node in index.convolutions:
        weights = index.weights(node, View(kernels(static_shape(weight_of(node))[1:])))
        if weights:
            yield _site(index, stacks, node)
        else:
            yield NoSite(("conv",), f"{scope_of(node)}.weight", computed(weight_of(node)))
    for node in index.calls(*_TRANSPOSED):
        if node not in index.convolutions:
            reason = f"'{op_name(node)}' reads this weight, and it is a transposed convolution"
            yield NoSite(("conv",), f"{scope_of(node)}.weight", reason)


def _site(index: Index, stacks: Stacks, conv: fx.Node) -> Site:
    n_out, *kernel = static_shape(weight_of(conv))
    weights = index.weights(conv, View(kernels(tuple(kernel))))
    scope = weights["W"].path.rpartition(".")[0]  # Mamba calls it from outside its module
    channels = static_shape(conv.args[0])[-len(kernel)]
    dims = {"in": prod(kernel), "out": n_out, "d": n_out}
    dims |= {"channels": channels, "groups": channels // kernel[0]}
    lengths = {"inputs": static_shape(conv.args[0])[-1], "outputs": static_shape(conv)[-1]}
    dims |= {name: size for name, size in lengths.items() if size > 0}
    absent = {} if "b" in weights else {"b": "this convolution has no bias"}
    stack, layer = stacks.of(scope), layer_of(scope)
    return Site("conv", scope, stack, "", layer, dims, weights, absent=absent)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that these kernels are applied."""
    return tuple(
        Place(_ports(node))
        for node in index.convolutions
        if (weight := index.stored(weight_of(node))) and weight.path == site.weights["W"].path
    )


def _ports(conv: fx.Node) -> dict[str, Port]:
    """x and h with their channels last, W [out, in] with the kernel flattened, and b."""
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


def used(index: Index, site: Site) -> Iterator[str]:
    """Its kernels, where anything in this graph reads them."""
    yield from (one.path for one in site.weights.values() if index.reads(one.path))
