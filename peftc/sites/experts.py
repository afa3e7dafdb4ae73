"""Experts: products of rows that were routed with the matrix of the expert that each was routed to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftc.graph.aten import ADD, static_shape
from peftc.graph.program import Read, Value, aten, behind, is_call, op_name
from peftc.sites import fused
from peftc.sites.dataflow import activated
from peftc.sites.index import Index
from peftc.sites.site import NoSite, Place, Routed, Site
from peftc.sites.view import Columns, Form, Part, Port, View, Weight

# Stored [experts, in, out], where a spec sees [experts, out, in].
_TURNED = Form(aten.transpose.int, (-2, -1), aten.transpose.int, (-2, -1), "turned")


@dataclass(frozen=True)
class Product:
    """One product: rows x, the experts' weight and who reads it, its result h with a bias where it has one, and how
    rows are routed."""

    x: Read
    weight: Weight
    read: Read
    bias: Weight | None
    h: fx.Node
    routed: Routed

    @property
    def features(self) -> int:
        return static_shape(self.h)[-1]

    @property
    def module(self) -> str:
        return self.weight.path.rpartition(".")[0]


def products(index: Index) -> Iterator[Product]:
    """The products of a graph with experts' matrices, in its order."""
    for node in index.order:
        if one := _grouped(index, node) or _gathered(index, node) or _batched(index, node):
            yield one


def _grouped(index: Index, node: fx.Node) -> Product | None:
    if node.op != "call_function" or "grouped_mm" not in op_name(node) or len(node.args) < 3:
        return None
    found, by = _matrices(index, Read(node, 1), turned=True), node.args[2]
    if found is None or not isinstance(by, fx.Node):
        return None
    h, bias = _biased(index, node)
    return Product(Read(node, 0), *found, bias, h, Routed("grouped", by, node, node.target))


def _gathered(index: Index, node: fx.Node) -> Product | None:
    """`bmm(W[ids], x[:, :, None])[:, :, 0]` or `bmm(x[:, None], W[ids])[:, 0]`."""
    if not is_call(node, aten.bmm.default) or len(node.users) != 1:
        return None
    (result,) = node.users
    for place, turned in ((0, False), (1, True)):
        chosen, x = node.args[place], node.args[1 - place]
        if not (is_call(chosen, aten.index.Tensor) and is_call(x, aten.unsqueeze.default)):
            continue
        found = _matrices(index, Read(chosen, 0), turned)  # type: ignore[arg-type]
        ids: Any = chosen.args[1]  # type: ignore[union-attr]
        if found is not None and len(ids) == 1 and is_call(result, aten.squeeze.dim):
            h, bias = _biased(index, result)
            return Product(Read(x, 0), *found, bias, h, Routed("gathered", ids[0], node))  # type: ignore[arg-type]
    return None


def _batched(index: Index, node: fx.Node) -> Product | None:
    if not is_call(node, aten.bmm.default, aten.matmul.default):
        return None
    found = _matrices(index, Read(node, 1), turned=True)
    if found is None or len(static_shape(node.args[0])) != 3:
        return None
    return Product(Read(node, 0), *found, None, node, Routed("batched", None, node))


def _matrices(index: Index, read: Read, turned: bool) -> tuple[Weight, Read] | None:
    """The parameter [experts, ...] that an operand is, and who reads it; `turned`: as [in, out] of each expert."""
    if not isinstance(read.user.args[read.index], fx.Node):
        return None
    form, node = _TURNED if turned else None, read.node
    if is_call(node, aten.transpose.int) and {*node.args[1:]} in ({-2, -1}, {1, 2}):
        read, form = Read(node, 0), None if turned else _TURNED
    path = index.program.parameter(read.node)
    if path is None or len(static_shape(read.node)) != 3:
        return None
    return Weight(path, View(form, axis=-2)), read


def _biased(index: Index, node: fx.Node) -> tuple[fx.Node, Weight | None]:
    """The sum with the experts' biases, where that is all that a product goes into."""
    users = list(node.users)
    if len(users) == 1 and is_call(users[0], *ADD):
        for other in users[0].args:
            chosen = other.args[0] if is_call(other, aten.index.Tensor) else None  # type: ignore[union-attr]
            path = index.program.parameter(chosen)
            if path is not None:
                return users[0], Weight(path)
    return node, None


def parts(index: Index) -> Iterator[tuple[str, Product, Columns | None]]:
    """(kind, product, its columns): the last is down; those that it is computed from up and gate, or both in one."""
    found = index.once(products)
    for down in found:
        before = [one for one in found if _feeds(one, down, found)]
        if not before or len(before) > 2:
            continue
        yield "experts.down", down, None
        if len(before) == 2:
            gate = before[0] if activated(before[0].h) else before[1]
            up = before[1] if gate is before[0] else before[0]
            yield from (("experts.up", up, None), ("experts.gate", gate, None))
            continue
        halves = fused.gated_halves(down.x.node, before[0].h)
        if halves is None:
            yield "experts.up", before[0], None
        else:
            yield from zip(("experts.up", "experts.gate"), before * 2, halves, strict=True)


def _feeds(one: Product, down: Product, all_: tuple[Product, ...]) -> bool:
    """Whether the rows of one product are all that those of another are computed from."""
    if one is down or one.module != down.module:
        return False
    ends = {other.h for other in all_}
    return one.h in behind(down.x.node, ends.__contains__)


def find(at: str, index: Index) -> Iterator[Site | NoSite]:
    """Products that are of this kind: all of them, whole, are `experts`."""
    whole = (("experts", one, None) for one in index.once(products))
    for name, one, columns in whole if at == "experts" else index.once(parts):
        if name == at:
            yield _site(index, at, one, columns)


def _site(index: Index, at: str, one: Product, columns: Columns | None) -> Site:
    scope = one.weight.path if at == "experts" else one.module  # a module has several products
    form = one.weight.view.form
    weights = {"W": Weight(one.weight.path, View(form, columns, -2))}
    if one.bias is not None:
        weights["b"] = Weight(one.bias.path, View(columns=columns))
    stored = next(node for node, path in index.parameters if path == one.weight.path)
    n_in = static_shape(one.x.node)[-1]
    n_out = columns.count if columns else one.features
    dims = {"in": n_in, "out": n_out, "d": n_out, "experts": static_shape(stored)[0]}
    return Site(at, scope, dims, weights)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """Each time that rows are multiplied by this weight."""
    path, columns = site.weights["W"].path, site.weights["W"].view.columns
    return tuple(_place(one, columns) for one in index.once(products) if one.weight.path == path)


def _place(one: Product, columns: Columns | None) -> Place:
    weight = Part(one.read, View(one.weight.view.form, columns, -2))
    ports: dict[str, Port] = {"x": one.x, "h": Value(one.h), "W": weight}
    if columns is not None:
        ports["h"] = Part(Value(one.h), View(columns=columns, axis=-1))
    return Place(ports, routed=one.routed)


def used(index: Index, site: Site) -> Iterator[str]:
    path = site.weights["W"].path
    if any(one.weight.path == path for one in index.once(products)):
        yield path
