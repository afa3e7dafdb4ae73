"""Alike: whether two graphs compute the same, node by node, whatever they compute besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import operand, shares, writes
from peftc.graph.program import Program


def alike(program: Program, other: Program, past: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether both give the same, where each node of `program` in `past` is the one that goes past it."""
    known: dict[object, int] = {}
    mine, theirs = dict(_axes(program)), dict(_axes(other))
    same = {theirs[axis]: size for axis, size in mine.items()}
    return _named(program, past, {}, known) == _named(other, {}, same, known)


def _axes(program: Program) -> Iterator[tuple[tuple[str, int], Any]]:
    """(input, axis) and what its size is called; layers that meet call sizes the same that are apart without them."""
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.slots[node.name]
        if slot.kind == "input":
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    yield (slot.name, axis), size.node.expr


def _named(
    program: Program,
    past: Mapping[fx.Node, fx.Node],
    sizes: Mapping[Any, Any],
    known: dict[object, int],
) -> str:
    """The number of what a graph gives: nodes that compute the same have the same one, in any graph."""
    numbers: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node in past:
            numbers[node] = numbers[past[node]]
            continue
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt):
            key: object = str(value.node.expr.xreplace(sizes))
        elif node.op == "placeholder":
            key = program.slots[node.name]
        else:
            given = fx.map_arg((node.args, node.kwargs), numbers.__getitem__)
            key = node.op, str(node.target), repr(given)
        numbers[node] = f"%{known.setdefault(key, len(known))}"
        if writes(node):
            numbers |= dict.fromkeys(_written(node), numbers[node])
    return numbers[node]


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What holds something else once `node` wrote into its argument: that, and what it is a view of."""
    one = node
    while (one is node or shares(one)) and one.op == "call_function":
        first = operand(one, 0)
        if first is None:
            return
        yield first
        one = first
