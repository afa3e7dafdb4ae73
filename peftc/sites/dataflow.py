"""Walks over a captured graph: the projections behind a value, the linear it goes into, the residual add."""

from __future__ import annotations

from typing import Any

from torch import fx

from peftc.graph.aten import (
    ADD,
    CUT,
    DROPOUT,
    MOVE,
    MUL,
    NORM,
    SDPA,
    SOFTMAX,
    is_nonlinear,
    is_pointwise,
    projects,
)
from peftc.graph.program import Read, aten, behind, is_call


def before(node: Any, *ops: Any) -> Any:
    """What a value was before any of `ops` were done to it, each of which has it as its first operand."""
    while is_call(node, *ops):
        node = node.args[0]
    return node


_STOP = (SDPA, *SOFTMAX, aten.embedding.default)


def projections(node: fx.Node) -> tuple[fx.Node, ...]:
    """What projects features, of all that `node` is computed from, walking back through views, norms, rotary and
    pointwise ops."""
    made_of = behind(node, lambda one: projects(one) or (one is not node and is_call(one, *_STOP)))
    return tuple(filter(projects, made_of))


# What a result may go through on its way to the linear that ends its sub-layer.
_ONWARD = (*MOVE, *CUT, *NORM, *DROPOUT, aten.cat.default, aten.mean.dim)


def next_linear(node: fx.Node, beside: fx.Node | None = None) -> fx.Node | None:
    """The first linear that consumes `node`, in the order of the graph: behind moves, gates, norms and sums of parts of
    it, or with what is computed of the result of the linear `beside` alone (Nyströmformer's convolution of the values). A sum
    with anything else is a residual, and ends the way."""
    mine, one = {node}, node.next
    while one.op != "output":
        sources = one.all_input_nodes
        if mine.intersection(sources):
            if projects(one) and one.args[0] in mine:
                return one
            if is_call(one, *_ONWARD) or (is_pointwise(one) and not _joins(one, mine, beside)):
                mine.add(one)
        one = one.next
    return None


def _joins(node: fx.Node, mine: set[fx.Node], beside: fx.Node | None) -> bool:
    """Whether a sum has an operand that is neither of `mine` nor stored, nor computed `beside`."""
    if not is_call(node, *ADD, aten.sub.Tensor):
        return False
    others = (one for one in node.all_input_nodes if one not in mine)
    return any(one.op == "call_function" and projections(one) != (beside,) for one in others)


def activated(linear: fx.Node) -> bool:
    """Whether a result goes into something nonlinear at once."""
    node = linear
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_nonlinear(node):
            return True
        if not is_call(node, *MOVE):
            return False
    return any(map(is_nonlinear, node.users))


def residual_add(node: fx.Node) -> Read | None:
    """The operand that the residual add behind `node` adds to it; None when there is no such add. What is added of the
    result itself (Inkling's convolution of it) is none."""
    one = node
    while True:
        onward = None
        for user in one.users:
            if is_call(user, *ADD):
                other = user.args[1] if user.args[0] is one else user.args[0]
                if isinstance(other, fx.Node) and other.op == "call_function":
                    if node not in behind(other, lambda one: one < node):
                        return Read(user, user.args.index(other))
                    onward = user
            if is_call(user, *MOVE, *DROPOUT, *MUL, *NORM):
                onward = user
        if onward is None:
            return None
        one = onward


def runs(starts: list[fx.Node], ends: list[fx.Node], order: dict[fx.Node, int]) -> list[fx.Node]:
    """For each end the earliest start since the end before: a query may also project positions (DeBERTa), a
    module may run twice. Shorter than `ends` where an end has no start of its own."""
    found, since = [], -1
    for end in ends:
        mine = [one for one in starts if since < order[one] <= order[end]]
        if not mine:
            break
        found.append(mine[0])
        since = order[end]
    return found
