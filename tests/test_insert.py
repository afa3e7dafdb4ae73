"""Insert: the deltas of a plan in a graph; the printed difference is the golden, one for each shipped spec."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from conftest import batch, logits, stir, tiny
from methods import spec
from toys import LORA, SPECS, program

import peftc
from passes import Insert, Normalize
from peftc.driver import plan as make
from peftc.language.reader import parse_spec
from peftc.language.shelf import shipped
from peftc.plan.edit import Edit
from peftc.rewrite.pipeline import PassError, Pipeline
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check

LONGEST = 40  # lines of a golden, to be read


@pytest.mark.parametrize("name", sorted(SPECS))
def test_insert(name: str, golden: Callable[[str, str], None]) -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(SPECS[name], f"{name}.yaml"))
    one = program()
    Normalize().run(one)
    before = program_text(one)
    assert Insert(plan.edits).run(one) == 1
    assert check(one) == ()
    golden(f"insert_{name}.diff", diff(before, program_text(one)))


def one_of_each(edits: Iterable[Edit]) -> tuple[Edit, ...]:
    """The first site of each formula: the others look alike."""
    found: dict[object, Edit] = {}
    for edit in edits:
        found.setdefault((edit.entry.let, edit.entry.assign), edit)
    return tuple(found.values())


@pytest.mark.parametrize("method", shipped())
def test_a_shipped_spec(method: str, golden: Callable[[str, str], None]) -> None:
    """What a method adds to one layer, at one site for each of its formulas, and what it unfreezes."""
    family = {"lora_conv": "vit", "lora_experts": "mixtral"}.get(method, "bert")
    plan = make(tiny(family, num_hidden_layers=1), spec(method))
    one = program(family, plan.room)
    Normalize().run(one)
    before, edits = program_text(one), one_of_each(plan.edits)
    assert Insert(edits).run(one) == len(edits)
    assert check(one) == ()
    changes = diff(before, program_text(one)).splitlines() if edits else []
    text = "".join(f"{line.partition('  ')[0]}\n" for line in changes if line[0] == "+")
    text += "".join(f"train {free.path}\n" for free in plan.unfrozen)
    assert 1 <= text.count("\n") <= LONGEST
    golden(f"specs/{method}.diff", text)


def test_every_shipped_spec_has_its_golden(request: pytest.FixtureRequest) -> None:
    found = {file.stem for file in (request.path.parent / "golden" / "specs").iterdir()}
    assert found == set(shipped()) and len(found) == 34


def test_a_delta_without_a_place_is_refused() -> None:
    model = tiny("bert", num_hidden_layers=1)
    plan = make(model, parse_spec(LORA, "lora.yaml"))
    one = program()
    for node in one.graph.nodes:  # what a model that uses the weight elsewhere would look like
        if node.target is torch.ops.aten.linear.default:
            node.target = torch.ops.aten.linear.out
    with pytest.raises(PassError, match="pass 'insert'"):
        Pipeline(check).run((Insert(plan.edits),), one)


ADAPTER = """
name: adapter
deltas:
  - at: ffn
    params:
      down: {shape: [in, 3],  init: normal(0.1)}
      up:   {shape: [3, out], init: normal(0.1)}
    delta: relu(x @ down) @ up
"""
RESIDUAL = """
name: residual
deltas:
  - at: ffn
    params: {turn: {shape: [out, out], init: normal(0.1)}}
    delta: tanh(residual @ turn)
"""


@pytest.mark.parametrize("family", ["bert", "gpt2", "bart", "llama"])
def test_the_residual_is_the_models_own(family: str) -> None:
    """An edit at `ffn` before does not become the residual of the next: the two orders agree."""
    specs = [parse_spec(text) for text in (ADAPTER, RESIDUAL)]
    first, second = (peftc.compile(tiny(family), [specs[i], specs[1 - i]]) for i in (0, 1))
    values = stir(first).deltas.values()
    with torch.no_grad():
        for path, value in second.deltas.values().items():
            value.copy_(values[path])
    inputs = batch(first)
    bare = logits(peftc.compile(tiny(family), "norm_tuning"), inputs)
    one, other = logits(first, inputs), logits(second, inputs)
    assert (one - bare).abs().max() > 1e-2 * bare.abs().max()
    assert (one - other).abs().max() <= 1e-6 * one.abs().max().clamp(min=1)
