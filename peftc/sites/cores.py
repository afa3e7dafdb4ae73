"""Attention cores of a captured graph: each scaled dot-product attention, fused or written out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

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
    static_shape,
)
from peftc.graph.program import Read, aten, is_call, op_name, scope_of
from peftc.sites.dataflow import before, projections
from peftc.sites.index import Index

_BIASED = aten.baddbmm.default
Sized = tuple[tuple[fx.Node, int], ...]


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
    sized: Sized
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


def cores(index: Index) -> tuple[Core, ...]:
    """Attention cores in graph order. Where a module has several, of queries that come from linears of different modules
    (LiLT's of text and layout), each goes by the module of its own; and scores of one that are added to those of another
    are no mask, but as wide as they."""
    found = tuple(_cores(index))
    queries: dict[str, dict[str, None]] = {}
    for one in found:
        queries.setdefault(one.scope, {})[_queried(one)] = None
    products = {
        one: _product(one.softmax.args[0]) for one in found if is_call(one.softmax, *SOFTMAX)
    }
    return tuple(
        replace(
            one,
            scope=_queried(one) if len(queries[one.scope]) > 1 else one.scope,
            masks=tuple(
                replace(m, bias=_is_bias(index, m))
                for m in one.masks
                if not _is_of(m.read.node, one, products)
            ),
        )
        for one in found
    )


def _is_bias(index: Index, mask: Mask) -> bool:
    if not is_call(mask.read.user, *ADD, SDPA, _BIASED) or type(mask.visible) is not float:
        return False
    seen: set[fx.Node] = set()
    stack = [mask.read.node]
    while stack:
        one = stack.pop()
        slot = index.program.slot(one)
        if slot is not None and slot.kind == "input":
            return False
        if one not in seen and isinstance(one.meta.get("val"), torch.Tensor):
            seen.add(one)
            stack += one.all_input_nodes
    return True


def _is_of(mask: fx.Node, core: Core, products: Mapping[Core, fx.Node | None]) -> bool:
    """Whether a mask is the scores of another core."""
    scores = _product(mask)
    return scores is not None and any(
        scores is product for other, product in products.items() if other is not core
    )


def _product(node: object) -> fx.Node | None:
    """The product of queries and keys that scores are made of."""
    found = _scores(node)
    return None if found is None else found.q.user


def _queried(core: Core) -> str:
    """The module of the linear that a core's queries come from; its own where there is none, or are several."""
    linears = projections(core.q.node)
    return scope_of(linears[0]) if len(linears) == 1 else core.scope


def missed(index: Index) -> Iterator[tuple[str, str]]:
    """The module of each softmax that something is multiplied by and that is no core, and the op that is not
    understood."""
    found = {one.softmax for one in index.once(cores)}
    for node in index.calls(*SOFTMAX):
        if node not in found and _value_product(node)[0] is not None:
            yield scope_of(node), _stops(node)


def _stops(node: fx.Node) -> str:
    """The op, on the way back from a softmax, behind which no product of queries and keys is found."""
    while node.all_input_nodes and (is_pointwise(node) or is_call(node, *SOFTMAX, *MOVE)):
        node = node.all_input_nodes[0]
    return op_name(node) if node.op == "call_function" else node.name


def _cores(index: Index) -> Iterator[Core]:
    for node in index.calls(SDPA, *SOFTMAX):
        if is_call(node, SDPA):
            masks = (_mask(node, 3),) if len(node.args) > 3 and node.args[3] is not None else ()
            yield _core(Read(node, 0), Read(node, 1), Read(node, 2), masks, (), node, node)
        elif core := _written_out(node):
            yield core


def _core(
    q: Read,
    k: Read,
    v: Read,
    masks: tuple[Mask, ...],
    sized: Sized,
    h: fx.Node,
    anchor: fx.Node,
) -> Core:
    k, of_k = _before_repeat(k)
    v, of_v = _before_repeat(v)
    q, _ = _unflattened(q)
    packed = _packed(q)
    q, h = (packed, next(iter(h.users))) if packed else (q, _four_axes(h))
    return Core(q, k, v, masks, (*sized, *of_k, *of_v), h, scope_of(anchor), anchor)


def _packed(read: Read) -> Read | None:
    """The queries with all their heads, where those of one token stand as tokens behind the keys' heads."""
    view = read.node
    source = view.args[0] if is_call(view, *VIEW) else None
    if (
        not isinstance(source, fx.Node)
        or not len(static_shape(source)) == len(static_shape(view)) == 4
    ):
        return None
    return Read(view, 0) if static_shape(source)[1] > static_shape(view)[1] else None


def _before_repeat(read: Read) -> tuple[Read, Sized]:
    """The operand with the heads it was projected to: behind `repeat_kv` it has one for each query head."""
    read, sized = _unflattened(read)
    expanded = read.node.args[0] if is_call(read.node, *VIEW) else None
    if not is_call(expanded, aten.expand.default):
        return read, sized
    assert isinstance(expanded, fx.Node)
    node = before(expanded.args[0], aten.slice.Tensor)
    if not is_call(node, aten.unsqueeze.default):
        return read, sized
    first = node
    while is_call(first.args[0], aten.slice.Tensor):
        first = first.args[0]
    return Read(first, 0), (*sized, (read.node, -2), (expanded, -2))


def _unflattened(read: Read) -> tuple[Read, Sized]:
    """The operand with four axes, where `bmm` has batch and heads in one."""
    node = read.node
    if is_call(node, *VIEW) and len(static_shape(node)) == 3:
        return Read(node, 0), ((node, -2),)
    return read, ()


def _four_axes(h: fx.Node) -> fx.Node:
    users = list(h.users)
    if len(static_shape(h)) == 3 and len(users) == 1 and is_call(users[0], *VIEW):
        return users[0]
    return h


@dataclass(frozen=True)
class _Scores:
    """The product of queries and keys behind a softmax, what masks it on the way, and the views."""

    q: Read
    k: Read
    masks: tuple[Mask, ...]
    sized: Sized


def _written_out(softmax: fx.Node) -> Core | None:
    if softmax.args[1] not in (-1, len(static_shape(softmax)) - 1):
        return None
    found = _scores(softmax.args[0])
    values, masks, views = _value_product(softmax)
    if found is None or values is None:
        return None
    read = found.k
    while is_call(read.node, *MUL):
        read = Read(read.node, 0)
    keys = read.node
    if not {len(static_shape(keys)), len(static_shape(values))} <= {3, 4}:
        return None
    sized = (*found.sized, *views)
    masked = (*found.masks, *masks)
    turned = is_call(keys, aten.transpose.int, aten.permute.default)
    k = Read(keys, 0) if turned else read
    core = _core(found.q, k, Read(values, 1), masked, sized, values, softmax)
    return replace(core, features_first=not turned)


def _scores(node: object) -> _Scores | None:
    """Walk back from a softmax through masks, scales, soft caps and sinks to the product of queries and keys."""
    if not isinstance(node, fx.Node):
        return None
    if is_call(node, *MATMUL):
        return _Scores(Read(node, 0), Read(node, 1), (), ())
    if is_call(node, _BIASED):
        return _Scores(Read(node, 1), Read(node, 2), (_mask(node, 0),), ())
    if is_call(node, aten.cat.default):  # with a sink behind the keys
        return _scores(node.args[0][0])  # type: ignore[index]
    if not (is_pointwise(node) or is_call(node, *MOVE)):
        return None
    for place, value in enumerate(node.args):
        found = _scores(value)
        if found is not None:
            sized = (*found.sized, (node, -1)) if is_call(node, *VIEW) else found.sized
            return _Scores(found.q, found.k, (*found.masks, *_others(node, place)), sized)
    return None


def _others(node: fx.Node, place: int) -> Iterator[Mask]:
    """What an op makes of scores with, besides the operand at `place`."""
    for other, value in enumerate(node.args):
        if (
            other != place
            and isinstance(value, fx.Node)
            and isinstance(value.meta["val"], torch.Tensor)
        ):
            yield _mask(node, other)


def _mask(op: fx.Node, place: int) -> Mask:
    read = Read(op, place)
    neutral = _visible(op, place, read.node.meta["val"].dtype == torch.bool)
    while is_call(read.node, aten.expand_as.default):  # as wide as the scores, whatever they are
        read = Read(read.node, 0)
    return Mask(read, neutral)


def _visible(op: fx.Node, place: int, boolean: bool) -> float | bool | None:
    """What stands in a mask where it changes no score, by the op that reads it."""
    if is_call(op, *FILL):
        return False
    if is_call(op, *WHERE):  # the condition, or what is there instead of scores
        return _scores(op.args[1]) is not None if place == 0 else 0.0
    if is_call(op, *MUL):
        return 1.0
    if is_call(op, *ADD, aten.sub.Tensor):
        return 0.0
    if is_call(op, SDPA, _BIASED):
        return True if boolean else 0.0
    return None


def _value_product(softmax: fx.Node) -> tuple[fx.Node | None, tuple[Mask, ...], Sized]:
    """The product of the probabilities with the values, what masks them, and the views on the way to it."""
    node, masks, sized = softmax, list[Mask](), list[tuple[fx.Node, int]]()
    while True:
        users = list(node.users)
        matmul = next((u for u in users if is_call(u, *MATMUL) and u.args[0] is node), None)
        if matmul is not None:
            return matmul, tuple(masks), tuple(sized)
        onward = [u for u in users if is_call(u, *_ONWARD) and u.args[0] is node]
        if not onward:
            return None, (), ()
        node = onward[0]
        masks += _others(node, 0) if is_call(node, *FILL, *MUL) else ()
        if is_call(node, *VIEW):
            sized.append((node, -1))


_ONWARD = (*DROPOUT, *MOVE, *FILL, *MUL, aten.slice.Tensor)
