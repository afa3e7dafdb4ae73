"""The passes that fold: what is left of each delta after each pass is the golden."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch
from conftest import tiny
from toys import SPECS

from passes import FOLD
from peftc.driver import plan as make
from peftc.language.reader import parse_spec
from peftc.rewrite.folding import Folding
from peftc.rewrite.text import folding_text
from peftc.rewrite.verify import check
from peftc.rewrite.widths import refitted

# An adapter beside the feed-forward, which reads what that reads.
FOLDED = {**SPECS, "beside": SPECS["adapter"].replace("gelu(h @", "gelu(x @")}


@pytest.mark.parametrize("name", sorted(FOLDED))
def test_fold(name: str, golden: Callable[[str, str], None]) -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(FOLDED[name], f"{name}.yaml"))
    tensors = {p.path: torch.ones(p.shape) for e in plan.edits for p in e.parameters}
    wider = partial(refitted, model)
    folding = Folding(list(plan.edits), tensors, model.get_parameter, refitted=wider)
    text = folding_text(folding)
    for one in FOLD:
        one.run(folding)
        text += f"-- {one.name}\n{folding_text(folding)}"
    text += "".join(
        f"{'folded' if o.folded else 'kept'} {o.edit}: {o.note}\n"
        for o in folding.outcomes(plan.edits)
    )
    assert check(folding) == ()
    golden(f"fold_{name}.txt", text)
