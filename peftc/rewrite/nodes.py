"""New nodes in the place of others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from peftc.graph.program import Program
from peftc.rewrite.lower import Known, value_of


def made(
    program: Program,
    like: fx.Node,
    op: Any,
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any] | None = None,
    name: str | None = None,
    known: Known | None = None,
) -> fx.Node:
    """A node at the graph's point of insertion, with the module and the tag of `like` and its own value. What is
    `known` of equal operands is not computed again."""
    kwargs = dict(kwargs or {})
    node = program.graph.create_node("call_function", op, args, kwargs, name=name)
    node.meta = {**like.meta, "val": value_of(program.graph, op, args, kwargs, known)}
    return node
