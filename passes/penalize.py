"""Penalize: add the penalties of a Plan's deltas to the loss, while training and where there is one."""

from __future__ import annotations

from dataclasses import dataclass

from peftc.graph.program import Program, aten
from peftc.language.expr import substitute
from peftc.plan.algebra import inlined
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder
from peftc.rewrite.splicing import environment


@dataclass(frozen=True)
class Penalize:
    """Each penalty is a number of parameters alone; they are added in the order of the plan."""

    edits: tuple[Edit, ...]
    name: str = "penalize"

    def run(self, program: Program) -> int:
        place = program.output("loss")
        penalized = [edit for edit in self.edits if edit.entry.penalty is not None]
        if place is None or not program.training:
            return 0
        loss, builder = place.node, Builder(program.graph, program.training, memo={})
        with program.graph.inserting_before(place.user):
            for edit in penalized:
                builder.label = builder.tag = edit.entry.method
                assert edit.entry.penalty is not None
                penalty = substitute(edit.entry.penalty, inlined(edit)[0])
                term = builder.lower(penalty, environment(program, edit, [penalty]), "penalty")
                loss = builder.call(aten.add.Tensor, loss, term, name="loss")
        outputs = list(place.user.args[0])  # type: ignore[arg-type]
        outputs[place.index] = loss
        place.user.args = (tuple(outputs),)
        return len(penalized)
