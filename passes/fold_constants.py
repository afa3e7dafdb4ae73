"""FoldConstants: a subexpression that reads parameters only becomes one parameter."""

from __future__ import annotations

from dataclasses import dataclass

from peftc.plan.algebra import constant_form
from peftc.rewrite.evaluate import constant_values
from peftc.rewrite.folding import Folding


@dataclass(frozen=True)
class FoldConstants:
    """The prefix without its reparametrising MLP, a learned scale in its matrix: exact, once, in float64."""

    name: str = "fold_constants"

    def run(self, folding: Folding) -> int:
        count = 0
        for i, edit in enumerate(folding.edits):
            smaller = constant_form(edit)
            if smaller is edit:
                continue
            folding.tensors |= constant_values(edit, folding.tensors)
            folding.edits[i] = smaller
            folding.evaluated[edit.key] = self.name
            count += 1
        return count
