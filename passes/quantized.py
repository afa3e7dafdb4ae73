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
    """Last, as the passes before it know a linear by its op. A product with the columns of a fused weight or with a
    weight that a delta rewrites (DoRA) is none of the stored weight, and computes with the whole matrix."""

    name: str = "quantized"

    def run(self, program: Program) -> int:
        known: Known = {}
        count = 0
        for weight in program.graph.find_nodes(op="placeholder"):
            if program.parameter(weight) in program.quantized:
                for user in list(weight.users):
                    count += _read(program, weight, user, known)
        return count


def _read(program: Program, weight: fx.Node, user: fx.Node, known: Known) -> int:
    place, run = READERS.get(user.target, (-1, None))
    if run is not None and [i for i, one in enumerate(user.args) if one is weight] == [place]:
        user.target = run
    elif user.op == "call_function":
        with program.graph.inserting_before(user):
            whole = made(program, user, dequantized, (weight,), known=known)
        user.replace_input_with(weight, whole)
    return user.op == "call_function"
