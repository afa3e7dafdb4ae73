"""Masks: a mask of true and false becomes numbers once, for all attentions that read it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc.graph.aten import SDPA
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made


@dataclass(frozen=True)
class Masks:
    """The fused op adds numbers to its scores, 0 and -inf, and makes them of a mask in each layer anew."""

    name: str = "masks"

    def run(self, program: Program) -> int:
        numbers: dict[tuple[fx.Node, torch.dtype], fx.Node] = {}
        known: Known = {}
        count = 0
        for node in program.graph.find_nodes(op="call_function", target=SDPA):
            mask = node.args[3] if len(node.args) > 3 else None
            if not isinstance(mask, fx.Node) or mask.meta["val"].dtype != torch.bool:
                continue
            key = (mask, node.args[0].meta["val"].dtype)
            if key not in numbers:
                numbers[key] = _numbers(program, node, *key, known)
            node.update_arg(3, numbers[key])
            count += 1
        return count


def _numbers(
    program: Program, user: fx.Node, mask: fx.Node, dtype: torch.dtype, known: Known
) -> fx.Node:
    """0 where the mask is true and -inf elsewhere, as wide as it is."""
    given = mask.op == "placeholder"
    expanded = is_call(mask, aten.expand.default)
    source = mask.args[0] if expanded else mask
    with program.graph.inserting_before(user if given else mask.next):

        def make(op: object, *args: object, name: str) -> fx.Node:
            like = user if given else mask
            return made(program, like, op, args, name=f"{mask.name}_{name}", known=known)

        found = make(aten.where.Scalar, source, 0.0, float("-inf"), name="numbers")
        if found.meta["val"].dtype != dtype:
            found = make(aten.to.dtype, found, dtype, name="cast")
        return make(aten.expand.default, found, *mask.args[1:], name="wide") if expanded else found
