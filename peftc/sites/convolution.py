"""Convolutions: the weight a matrix [out, in], x and h with their channels last."""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from torch import fx

from peftc.graph.aten import features, groups, static_shape, weight_of
from peftc.graph.program import aten, op_name, scope_of
from peftc.sites.index import Index
from peftc.sites.linear import computed, ports_of
from peftc.sites.site import NoSite, Place, Site

_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)


def find(index: Index) -> Iterator[Site | NoSite]:
    """Convolutions by their module's path; those whose weight is computed, and transposed ones, are none."""
    for node in index.convolutions:
        if index.weights(node):
            yield _site(index, node)
        else:
            yield computed("conv", f"{scope_of(node)}.weight", node)
    for node in index.calls(*_TRANSPOSED):
        if node not in index.convolutions:
            reason = f"'{op_name(node)}' reads this weight, and it is a transposed convolution"
            yield NoSite(("conv",), f"{scope_of(node)}.weight", reason)


def _site(index: Index, conv: fx.Node) -> Site:
    n_out, *kernel = static_shape(weight_of(conv))
    weights = index.weights(conv)
    scope = weights["W"].path.rpartition(".")[0]  # Mamba calls it from outside its module
    dims = {"in": prod(kernel), "out": n_out, "d": n_out}
    dims |= {"channels": features(conv)[0], "groups": groups(conv)}
    lengths = {"inputs": static_shape(conv.args[0])[-1], "outputs": static_shape(conv)[-1]}
    dims |= {name: size for name, size in lengths.items() if size > 0}
    absent = {} if "b" in weights else {"b": "this convolution has no bias"}
    return Site("conv", scope, dims, weights, absent=absent)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that these kernels are applied."""
    return tuple(
        Place(ports_of(node))
        for node in index.convolutions
        if (weight := index.stored(weight_of(node))) and weight.path == site.weights["W"].path
    )
