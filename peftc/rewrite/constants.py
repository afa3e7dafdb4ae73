"""Constants: what inserted nodes compute of parameters alone, apart from the rest of a graph."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.graph.code import Around, as_it_is, function_of
from peftc.graph.program import Program

# Of the slots, those whose values a trained delta is made of.
_LEARNED = ("parameter", "delta")


@dataclass(frozen=True)
class Split:
    """A graph in two. `head` makes of the stored tensors at `reads` what the `rest` takes behind those at `keeps`
    and its `inputs`."""

    head: Callable[..., Any]
    rest: Callable[..., Any]
    reads: tuple[int, ...]
    keeps: tuple[int, ...]
    inputs: tuple[str, ...]


def split(program: Program, around: Around = as_it_is) -> Split | None:
    """The maximal subgraphs of inserted nodes that read parameters and deltas alone, apart; None without any. `around` is
    `function_of`'s, for the rest."""
    free = alone(program)
    ends = [
        node
        for node in free
        if node.op == "call_function" and any(user not in free for user in node.users)
    ]
    if not ends:
        return None
    stored = [n for n in program.graph.nodes if n.op == "placeholder" and _kind(program, n)]
    inputs = [n for n in program.graph.nodes if n.op == "placeholder" and not _kind(program, n)]
    inner = {n for n in free if n.op == "call_function"}
    reads = [n for n in stored if any(user in inner for user in n.users)]
    keeps = [n for n in stored if any(user not in inner for user in n.users)]
    head, rest = fx.Graph(), fx.Graph()
    copies: dict[fx.Node, fx.Node] = {n: head.placeholder(n.name) for n in reads}
    for node in program.graph.nodes:
        if node in inner:
            copies[node] = head.node_copy(node, copies.__getitem__)
    head.output(tuple(copies[node] for node in ends))
    copies = {n: rest.placeholder(n.name) for n in (*keeps, *inputs, *ends)}
    for node in program.graph.nodes:
        if node not in inner and node not in copies and node not in stored:
            copies[node] = rest.node_copy(node, copies.__getitem__)
    at = {node: i for i, node in enumerate(stored)}
    return Split(
        function_of(program.root, head),
        function_of(program.root, rest, around),
        tuple(at[n] for n in reads),
        tuple(at[n] for n in keeps),
        tuple(program.slots[n.name].name for n in inputs),
    )


def _kind(program: Program, node: fx.Node) -> str:
    """The kind of a stored slot; nothing for an input."""
    kind = program.slots[node.name].kind
    return "" if kind == "input" else kind


def alone(program: Program) -> dict[fx.Node, None]:
    """Learned placeholders, and the inserted nodes that read nothing else and always give the same."""
    found: dict[fx.Node, None] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            fits = _kind(program, node) in _LEARNED
        else:
            fits = (
                node.op == "call_function"
                and "delta" in node.meta
                and all(one in found for one in node.all_input_nodes)
                and not _draws(node.target)
            )
        if fits:
            found[node] = None
    return found


def _draws(target: Any) -> bool:
    """Whether an op takes random numbers or writes to what it is given."""
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.nondeterministic_seeded in target.tags or target._schema.is_mutable
