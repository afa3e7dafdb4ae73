"""Turned: a step of decoding reads the narrow matrices of deltas along their rows."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import LINEAR, static_shape
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.constants import alone
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made


@dataclass(frozen=True)
class Turned:
    """`x @ A` is `linear(x, A^T)`, A^T [r, in] a copy that is a constant of evaluation, as large as A. The product of a
    few rows with a tall matrix is shared by threads that wait for each other for longer than it takes: at d = 512,
    r = 8 and two threads 14 us, along the rows of A^T 4 us. Of many rows as a text has nothing is saved."""

    name: str = "turned"

    def run(self, program: Program) -> int:
        if program.training or program.entry != "decode":
            return 0
        known: Known = {}
        constant = alone(program)
        found = [n for n in program.graph.nodes if "delta" in n.meta and _reads(n, constant)]
        for node in found:
            _write(program, node, known)
        if found:
            program.graph.eliminate_dead_code()
        return len(found)


def _reads(node: fx.Node, constant: Collection[fx.Node]) -> bool:
    """Whether this is a product of data with a constant matrix that is taller than wide, as it is stored."""
    if not is_call(node, *LINEAR, aten.matmul.default):
        return False
    x, factor, *_ = _operands(node)
    if x in constant or factor not in constant:
        return False
    sizes = static_shape(factor)
    return len(sizes) == 2 and sizes[0] > sizes[1]


def _operands(node: fx.Node) -> Sequence[Any]:
    """x, the matrix that it is multiplied by, and a bias. A linear multiplies by a transpose."""
    x, matrix, *bias = node.args
    if is_call(node, *LINEAR):
        matrix = matrix.args[0] if is_call(matrix, aten.transpose.int) else None  # type: ignore[union-attr]
    return x, matrix, *bias


def _write(program: Program, node: fx.Node, known: Known) -> None:
    x, factor, *bias = _operands(node)

    def make(op: Any, *args: Any, name: str, **kwargs: Any) -> fx.Node:
        return made(program, node, op, args, kwargs, f"{node.name}_{name}", known)

    with program.graph.inserting_before(node):
        turned = make(aten.transpose.int, factor, 0, 1, name="transpose")
        turned = make(
            aten.clone.default, turned, memory_format=torch.contiguous_format, name="lines"
        )
        result = make(aten.linear.default, x, turned, *bias, name="turned")
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
