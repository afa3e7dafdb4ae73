"""Slices: a slice of a fused projection is edited behind the split; the printed difference is the golden."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import batch, stir, tiny
from toys import program

import peftc
from passes import Insert, Normalize, Slices
from peftc.driver import plan as make
from peftc.graph.program import Program, aten
from peftc.language.reader import parse_spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check

SIDES = """
name: sides
deltas:
  - at: [SIDES]
    params: {p: {shape: [out], init: normal}}
    rewrite: {h: tanh(h) * p}
"""


def copies(one: Program) -> int:
    """How often a whole result is copied to change a part of it."""
    return len(one.graph.find_nodes(op="call_function", target=aten.slice_scatter.default))


def test_slices(golden: Callable[[str, str], None]) -> None:
    spec = parse_spec(SIDES.replace("SIDES", "attention.q, attention.v"))
    plan = make(tiny("gpt2", num_hidden_layers=1), spec)
    one = program("gpt2")
    for step in (Normalize(), Insert(plan.edits)):
        step.run(one)
    before = program_text(one)
    assert copies(one) == 2 and Slices().run(one) > 0 and check(one) == ()
    assert copies(one) == 0
    golden("slices.diff", diff(before, program_text(one)))
    assert Slices().run(one) == 0


FUSED = {"gpt2": True, "neox": True, "phi3": True, "modernbert": True, "bloom": True}


@pytest.mark.parametrize(
    "sides", ["attention.q, attention.v", "attention.k", "attention.v, attention.v, attention.q"]
)
@pytest.mark.parametrize("family", FUSED)
def test_a_slice_is_what_it_was(family: str, sides: str) -> None:
    """Contiguous and interleaved by heads, one after another; values and gradients to the rounding of float64."""
    text = SIDES.replace("SIDES", sides)
    if sides.count("attention.v") == 2:
        one = text.partition("deltas:")[2]
        text = "name: sides\ndeltas:" + "".join(
            one.replace(sides, side) for side in sides.split(", ")
        )
    spec = parse_spec(text)
    found, graphs = [], []
    for without in ((), ("slices",)):
        model = stir(peftc.compile(tiny(family).double(), spec, without=without))
        inputs = batch(model)
        value = model(**inputs).logits
        slopes = torch.autograd.grad(value.square().mean(), [*model.deltas.parameters()])
        found.append((value, *slopes))
        graphs.append(next(iter(model._programs._runners.values())).program)
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1)
    lean, heavy = map(copies, graphs)
    assert heavy > 0 and (lean == 0) is FUSED[family]
