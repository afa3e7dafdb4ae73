"""Quantized: a linear of a quantised weight is that of its kernel; whatever else reads one, reads what it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from peftc.graph.program import Program
from peftc.graph.quantized import READERS, dequantized
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made


@dataclass(frozen=True)
class Quantized:
    """Last, as the passes before it know a linear by its op. The product with a weight that a delta rewrites (DoRA), or
    with the columns of a fused one, is none with the stored weight: it computes with the whole matrix."""

    name: str = "quantized"

    def run(self, program: Program) -> int:
        known: Known = {}
        count = 0
        for weight in program.graph.find_nodes(op="placeholder"):
            if program.parameter(weight) in program.quantized:
                count += _read(program, weight, known)
        return count


def _read(program: Program, weight: fx.Node, known: Known) -> int:
    """Give one weight to its readers."""
    readers = [user for user in weight.users if user.op == "call_function"]
    others = []
    for user in readers:
        place, run = READERS.get(user.target, (-1, None))
        if run is not None and [i for i, one in enumerate(user.args) if one is weight] == [place]:
            user.target = run
        else:
            others.append(user)
    if others:
        first = min(others)
        with program.graph.inserting_before(first):
            whole = made(program, first, dequantized, (weight,), known=known)
        for user in others:
            user.replace_input_with(weight, whole)
    return len(readers)
