"""Quantized: a linear of a quantised weight is that of its kernel; whatever else reads one, reads what it stands for."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from peftc.graph.program import Program, Reader
from peftc.graph.quantized import PLACES
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
            reader = program.quantized.get(program.parameter(weight) or "")
            if reader is not None:
                count += _read(program, weight, reader, known)
        return count


def _read(program: Program, weight: fx.Node, reader: Reader, known: Known) -> int:
    """Give one weight to its readers."""
    readers = [user for user in weight.users if user.op == "call_function"]
    others = []
    for user in readers:
        places = [i for i, one in enumerate(user.args) if one is weight]
        if places == [PLACES.get(user.target)]:
            user.target = reader.linear
            user.kwargs = {"dtype": reader.dtype} if reader.dtype else {}
        else:
            others.append(user)
    if others:
        first = min(others)
        with program.graph.inserting_before(first):
            dtype = weight.meta["val"].dtype
            whole = made(program, first, reader.whole, (weight, dtype), known=known)
        for user in others:
            user.replace_input_with(weight, whole)
    return len(readers)
