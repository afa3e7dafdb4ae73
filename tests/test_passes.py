"""Each pass on a toy model: the printed diff is the golden."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import tiny

from passes import FOLD, Insert, Normalize
from peftc.driver import plan as make
from peftc.graph.arguments import dummy_inputs
from peftc.graph.capture import capture
from peftc.graph.program import Program
from peftc.language.reader import parse_spec
from peftc.rewrite.folding import Folding
from peftc.rewrite.pipeline import PassError, Pipeline
from peftc.rewrite.text import diff, folding_text, program_text
from peftc.rewrite.verify import check

LORA = """
deltas:
  - at: attention.q
    where: {layers: 0}
    params:
      down: {shape: [in, 2], init: kaiming_uniform}
      up: {shape: [2, out], init: zeros}
    delta: x @ down @ up
    compose: h + 2.0 * delta
"""
PREFIX = """
deltas:
  - at: attention.heads
    where: {layers: 0}
    params:
      tokens: {shape: [3, d], init: normal}
      up: {shape: [d, kv], init: linear(d)}
    let:
      P: split_heads(tanh(tokens @ up), kv_heads)
    rewrite: {k: "prepend(P, k)", v: "prepend(P, v)"}
"""
ADAPTER = """
deltas:
  - at: ffn
    where: {layers: 0}
    params:
      down: {shape: [out, 2], init: normal}
      up: {shape: [2, out], init: normal}
    delta: gelu(h @ down) @ up
"""
SPECS = {"lora": LORA, "prefix": PREFIX, "adapter": ADAPTER}


def program(family: str = "bert") -> Program:
    model = tiny(family, num_hidden_layers=1)
    return capture(model, "forward", dummy_inputs(model))


def test_normalize(golden: Callable[[str, str], None]) -> None:
    one = program()
    before = program_text(one)
    count = Normalize().run(one)
    text = program_text(one)
    assert count == before.count("\n") - text.count("\n") > 0
    golden("normalize.txt", text)
    assert Normalize().run(one) == 0


@pytest.mark.parametrize("name", sorted(SPECS))
def test_insert(name: str, golden: Callable[[str, str], None]) -> None:
    model = tiny("bert", num_hidden_layers=1)
    spec = parse_spec(SPECS[name], f"{name}.yaml")
    plan = make(model, spec)
    one = program()
    Normalize().run(one)
    before = program_text(one)
    assert Insert(plan.edits).run(one) == 1
    assert check(one) == ()
    golden(f"insert_{name}.diff", diff(before, program_text(one)))


@pytest.mark.parametrize("name", sorted(SPECS))
def test_fold(name: str, golden: Callable[[str, str], None]) -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(SPECS[name], f"{name}.yaml"))
    tensors = {p.path: torch.ones(p.shape) for e in plan.edits for p in e.parameters}
    folding = Folding(list(plan.edits), tensors, model.get_parameter)
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


def test_a_delta_without_a_place_is_refused() -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(LORA, "lora.yaml"))
    one = program()
    for node in one.graph.nodes:  # what a model that uses the weight elsewhere would look like
        if node.target is torch.ops.aten.linear.default:
            node.target = torch.ops.aten.linear.out
    with pytest.raises(PassError, match="pass 'insert'"):
        Pipeline(check).run((Insert(plan.edits),), one)


def test_the_verifier_sees_what_is_wrong() -> None:
    one = program()
    assert any("assertion left" in problem for problem in check(one))
    Normalize().run(one)
    assert check(one) == ()
    one.placeholder("stray", next(iter(one.slots.values())).__class__("delta", "nowhere"))
    assert check(one) == ("delta that nothing reads: nowhere",)
