"""FoldConstants: a prefix loses its reparametrising MLP, exactly; what has no constant part stays as it is."""

from __future__ import annotations

import pytest
import torch
from conftest import tiny
from toys import SPECS

from passes import FoldConstants
from peftc.driver import plan as make
from peftc.language.reader import parse_spec
from peftc.rewrite.folding import Folding
from peftc.rewrite.verify import check


@pytest.mark.parametrize(("name", "count"), [("adapter", 0), ("lora", 0), ("prefix", 1)])
def test_fold_constants(name: str, count: int) -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(SPECS[name], f"{name}.yaml"))
    torch.manual_seed(0)
    given = {p.path: torch.randn(p.shape) for e in plan.edits for p in e.parameters}
    folding = Folding(list(plan.edits), dict(given), model.get_parameter)
    assert FoldConstants().run(folding) == count
    assert FoldConstants().run(folding) == 0  # once is enough
    assert check(folding) == ()
    left = [p for edit in folding.edits for p in edit.parameters]
    if count == 0:
        assert tuple(folding.edits) == plan.edits
        return
    tokens, up = (given[p.path].double() for p in plan.edits[0].parameters)
    want = torch.tanh(tokens @ up).unflatten(-1, (4, 8)).transpose(0, 1)  # four heads of 8
    assert {p.shape for p in left} == {(4, 3, 8)}
    for parameter in left:
        torch.testing.assert_close(folding.tensors[parameter.path].double(), want)
