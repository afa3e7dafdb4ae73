"""Attention cores of a captured graph: each scaled dot-product attention, fused or written out."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import (
    ADD,
    DROPOUT,
    FILL,
    MATMUL,
    MOVE,
    MUL,
    SDPA,
    SOFTMAX,
    VIEW,
    WHERE,
    hint,
    is_pointwise,
    operand,
    static_shape,
)
from peftc.graph.program import Read, aten, behind, is_call, op_name, scope_of
from peftc.sites.dataflow import before, projections
from peftc.sites.index import Index

_BIASED = aten.baddbmm.default
_SLICE = aten.slice.Tensor


@dataclass(frozen=True)
class Mask:
    """What scores or probabilities meet on the way, and the value of it that leaves them as they are, None where there
    is none. A `bias` is added, and hangs on places alone: on no input but for its sizes."""

    read: Read
    visible: float | bool | None
    bias: bool = False


@dataclass(frozen=True)
class Core:
    """One attention: its operands [batch, heads, length, head_dim] as edges, its result, its module path.

    Keys and values are taken before they are repeated for grouped queries. `masks` may be the fused op's own; `sized` are the views whose list of sizes has the number
    of keys at that place. `softmax` is the op of the probabilities, or the fused one. Keys may have their `features_first`,
    [batch, heads, head_dim, length].
    """

    q: Read
    k: Read
    v: Read
    masks: tuple[Mask, ...]
    sized: tuple[tuple[fx.Node, int], ...]
    h: fx.Node
    scope: str
    softmax: fx.Node
    features_first: bool = False

    @property
    def counts_back(self) -> bool:
        """Whether keys have a bias that is the same at every query (MPT's ALiBi, counted from the last key): what is
        added to all of them does nothing, so that no number of it stands for none."""
        biases = [one.read.node.meta["val"].shape for one in self.masks if one.bias]
        return bool(biases) and all(
            [hint(n) for n in shape[-2:-1]] in ([], [1]) for shape in biases
        )


def cores(index: Index) -> Iterator[Core]:
    """Attention cores in graph order. Where a module has several, of queries that come from linears of different modules
    (LiLT's of text and layout), each goes by the module of its own; and scores of one that are added to those of another
    are no mask, but as wide as they."""
    found = tuple(_cores(index))
    queries: dict[str, set[str]] = {}
    for one in found:
        queries.setdefault(one.scope, set()).add(_queried(one))
    written = [one for one in found if is_call(one.softmax, *SOFTMAX)]
    products = {one: _product(one.softmax.args[0]) for one in written}
    for one in found:
        scope = _queried(one) if len(queries[one.scope]) > 1 else one.scope
        others = {*products.values()} - {products.get(one), None}
        masks = (m for m in one.masks if _product(m.read.node) not in others)
        biased = tuple(replace(m, bias=_is_bias(index, m)) for m in masks)
        yield replace(one, scope=scope, masks=biased)


def _is_bias(index: Index, mask: Mask) -> bool:
    if not is_call(mask.read.user, *ADD, SDPA, _BIASED) or type(mask.visible) is not float:
        return False
    made_of = behind(mask.read.node, lambda one: not isinstance(one.meta.get("val"), torch.Tensor))
    return not any(map(index.program.input, made_of))


def _product(node: object) -> fx.Node | None:
    """The product of queries and keys that scores are made of."""
    found = _scores(node, _Way())
    return None if found is None else found[0].user


def _queried(core: Core) -> str:
    """The module of the linear that a core's queries come from; its own where there is none, or are several."""
    linears = projections(core.q.node)
    return scope_of(linears[0]) if len(linears) == 1 else core.scope


def missed(index: Index) -> Iterator[tuple[str, str]]:
    """The module of each softmax that something is multiplied by and that is no core, and the op that is not
    understood."""
    found = {one.softmax for one in index.once(cores)}
    for node in index.calls(*SOFTMAX):
        if node not in found and _value_product(node, _Way()) is not None:
            yield scope_of(node), _stops(node)


def _stops(node: fx.Node) -> str:
    """The op, on the way back from a softmax, behind which no product of queries and keys is found."""
    while node.all_input_nodes and (is_pointwise(node) or is_call(node, *SOFTMAX, *MOVE)):
        node = node.all_input_nodes[0]
    return op_name(node) if node.op == "call_function" else node.name


@dataclass
class _Way:
    """What is met on the way from a product of queries and keys to that with the values."""

    masks: list[Mask] = field(default_factory=list)
    sized: list[tuple[fx.Node, int]] = field(default_factory=list)

    def through(self, op: fx.Node, place: int) -> None:
        """Scores or probabilities are the operand `place` of an op."""
        for other, value in enumerate(op.args):
            if other != place and isinstance(value, fx.Node) and not is_call(op, *MOVE):
                if isinstance(value.meta["val"], torch.Tensor):
                    self.masks.append(_mask(op, other))
        if is_call(op, *VIEW):
            self.sized.append((op, -1))


def _cores(index: Index) -> Iterator[Core]:
    for node in index.calls(SDPA, *SOFTMAX):
        way = _Way()
        if is_call(node, SDPA):
            if operand(node, 3) is not None:
                way.masks.append(_mask(node, 3))
            yield _core(Read(node, 0), Read(node, 1), Read(node, 2), way, node, node)
        elif core := _written_out(node, way):
            yield core


def _written_out(softmax: fx.Node, way: _Way) -> Core | None:
    found, values = _scores(softmax.args[0], way), _value_product(softmax, way)
    is_last = softmax.args[1] in (-1, len(static_shape(softmax)) - 1)
    if found is None or values is None or not is_last:
        return None
    q, k = found
    while is_call(k.node, *MUL):
        k = Read(k.node, 0)
    if not {len(static_shape(k.node)), len(static_shape(values))} <= {3, 4}:
        return None
    turned = is_call(k.node, aten.transpose.int, aten.permute.default)
    k = Read(k.node, 0) if turned else k
    core = _core(q, k, Read(values, 1), way, values, softmax)
    return replace(core, features_first=not turned)


def _core(q: Read, k: Read, v: Read, way: _Way, h: fx.Node, anchor: fx.Node) -> Core:
    k, v = _before_repeat(k, way), _before_repeat(v, way)
    q = _unflattened(q)
    packed = _packed(q)
    q, h = (packed, next(iter(h.users))) if packed else (q, _four_axes(h))
    return Core(q, k, v, tuple(way.masks), tuple(way.sized), h, scope_of(anchor), anchor)


def _packed(read: Read) -> Read | None:
    """The queries with all their heads, where those of one token stand as tokens behind the keys' heads."""
    source = read.node.args[0] if is_call(read.node, *VIEW) else None
    if not isinstance(source, fx.Node):
        return None
    all_, heads = static_shape(source), static_shape(read.node)
    return Read(read.node, 0) if len(all_) == len(heads) == 4 and all_[1] > heads[1] else None


def _before_repeat(read: Read, way: _Way) -> Read:
    """The operand with the heads it was projected to: behind `repeat_kv` it has one for each query head."""
    flat, read = read, _unflattened(read)
    if read is not flat:
        way.sized.append((flat.node, -2))
    expanded: Any = read.node.args[0] if is_call(read.node, *VIEW) else None
    repeated = is_call(expanded, aten.expand.default)
    first: Any = before(expanded.args[0], _SLICE) if repeated else None
    if not is_call(first, aten.unsqueeze.default):
        return read
    while is_call(first.args[0], _SLICE):
        first = first.args[0]
    way.sized += ((read.node, -2), (expanded, -2))
    return Read(first, 0)


def _unflattened(read: Read) -> Read:
    """The operand with four axes, where `bmm` has batch and heads in one."""
    flat = is_call(read.node, *VIEW) and len(static_shape(read.node)) == 3
    return Read(read.node, 0) if flat else read


def _four_axes(h: fx.Node) -> fx.Node:
    users = list(h.users)
    if len(static_shape(h)) == 3 and len(users) == 1 and is_call(users[0], *VIEW):
        return users[0]
    return h


def _scores(node: Any, way: _Way) -> tuple[Read, Read] | None:
    """Walk back from a softmax through masks, scales, soft caps and sinks to queries and keys, as their product reads
    them."""
    if is_call(node, *MATMUL):
        return Read(node, 0), Read(node, 1)
    if is_call(node, _BIASED):
        way.masks.append(_mask(node, 0))
        return Read(node, 1), Read(node, 2)
    if is_call(node, aten.cat.default):  # with a sink behind the keys
        return _scores(node.args[0][0], way)
    if is_pointwise(node) or is_call(node, *MOVE):
        for place, value in enumerate(node.args):
            if found := _scores(value, way):
                way.through(node, place)
                return found
    return None


# What stands in a mask where it changes no score, by the op that reads it.
_VISIBLE: dict[Any, float | bool] = {
    **dict.fromkeys(FILL, False),
    **dict.fromkeys(MUL, 1.0),
    **dict.fromkeys((*ADD, aten.sub.Tensor), 0.0),
}


def _mask(op: fx.Node, place: int) -> Mask:
    read = Read(op, place)
    visible = _VISIBLE.get(op.target)
    if is_call(op, *WHERE):  # the condition, or what is there instead of scores
        visible = _product(op.args[1]) is not None if place == 0 else 0.0
    if is_call(op, SDPA, _BIASED):
        visible = True if read.node.meta["val"].dtype == torch.bool else 0.0
    while is_call(read.node, aten.expand_as.default):  # as wide as the scores, whatever they are
        read = Read(read.node, 0)
    return Mask(read, visible)


def _value_product(softmax: fx.Node, way: _Way) -> fx.Node | None:
    """The product of the probabilities with the values."""
    node = softmax
    while True:
        users = [one for one in node.users if one.args[:1] == (node,)]
        product = next((one for one in users if is_call(one, *MATMUL)), None)
        onward = next((one for one in users if is_call(one, *_ONWARD)), None)
        if product is not None or onward is None:
            return product
        way.through(onward, 0)
        node = onward


_ONWARD = (*DROPOUT, *MOVE, *FILL, *MUL, _SLICE)
