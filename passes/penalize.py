"""Penalize: add the penalties of a Plan's deltas to the loss, while training and where there is one."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from peftc.errors import CaptureError
from peftc.graph.program import Program, aten, behind
from peftc.plan.algebra import penalty_of
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder
from peftc.rewrite.splicing import environment

# Of how many tokens a batch is a part, where several batches are one step: a loss is then a sum divided by it.
ITEMS = "num_items_in_batch"
_SUM = 2  # torch.nn's reduction "sum"


@dataclass(frozen=True)
class Penalize:
    """Each penalty is a number of parameters alone; they are added in the order of the plan.

    Of a batch that is a part of one, as when gradients are accumulated, the loss is a part too, and so is then the
    penalty: by its share of the tokens, so that the parts add up to one penalty.
    """

    edits: tuple[Edit, ...]
    name: str = "penalize"

    def run(self, program: Program) -> int:
        place = program.output("loss")
        penalties = [(edit, penalty_of(edit)) for edit in self.edits]
        penalized = [(edit, one) for edit, one in penalties if one is not None]
        if place is None or not program.training or not penalized:
            return 0
        loss, builder = place.node, Builder(program.graph, program.training, memo={})
        with program.graph.inserting_before(place.user):
            builder.tag = builder.label = "penalty"
            share = _share(program, loss, builder)
            for edit, penalty in penalized:
                builder.label = builder.tag = edit.entry.method
                for part in edit.parts:
                    env = environment(program, edit, [penalty])
                    for one in edit.parameters:
                        if one.experts and one.name in env:
                            own = env[one.name], 0, part
                            env[one.name] = builder.call(aten.select.int, *own, name="expert")
                    term = builder.lower(penalty, env, "penalty")
                    if share is not None:
                        term = builder.call(aten.mul.Tensor, term, share, name="penalty_share")
                    loss = builder.call(aten.add.Tensor, loss, term, name="loss")
        outputs = list(place.user.args[0])  # type: ignore[arg-type]
        outputs[place.index] = loss
        place.user.args = (tuple(outputs),)
        return len(penalized)


def _share(program: Program, loss: fx.Node, builder: Builder) -> fx.Node | None:
    """The share of a batch in all the tokens that its loss is divided by; None where the loss is a mean of its own."""
    items = next((n for n in program.graph.nodes if _is_items(program, n)), None)
    if items is None:
        return None
    before = behind(loss)
    read = [user for user in items.users if user in before]
    if not read:
        return None
    summed: Any = read[0].args[0]
    if (
        len(read) > 1
        or not isinstance(summed, fx.Node)
        or summed.target is not aten.cross_entropy_loss.default
        or summed.args[3] != _SUM
    ):
        raise CaptureError(
            f"the loss of this model reads '{ITEMS}' in a way that says no share of a batch, and a method's penalty "
            "is added by that; leave the argument out, or compute the loss yourself and add model.penalty()"
        )
    labels, ignored = summed.args[1], (*summed.args, -100)[4]
    counted = builder.call(aten.ne.Scalar, labels, ignored, name="penalty_counted")
    counted = builder.call(aten.sum.default, counted, name="penalty_tokens")
    return builder.call(aten.div.Tensor, counted, items, name="penalty_share")


def _is_items(program: Program, node: fx.Node) -> bool:
    if node.op != "placeholder":
        return False
    slot = program.slots[node.name]
    return slot.kind == "input" and slot.name == ITEMS
