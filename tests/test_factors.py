"""Factors: a linear of a changed weight as products; the printed difference is the golden."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import batch, stir, tiny
from methods import spec
from toys import program

import peftc
from passes import Factors, Insert, Normalize
from peftc.driver import Trace
from peftc.driver import plan as make
from peftc.language.expr import names, parse
from peftc.language.reader import parse_spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check

# What a weight becomes, and whether its product with x is written as products.
WEIGHTS = {
    "a product": ("W + 0.5 * transpose(x1 @ x2)", True),
    "turned": ("W + y1 @ y2", True),
    "magnitude": ("m * (W + transpose(x1 @ x2)) / detach(norm(W + transpose(x1 @ x2)))", True),
    "a norm that learns": ("m * (W + y1 @ y2) / norm(W + y1 @ y2)", True),
    "rows": ("W * m", True),
    "a number": ("2 * W", True),
    "the weight twice": ("W + m * W", True),
    "all numbers of it": ("W + dense", False),
    "columns": ("W * c", False),
    "a nonlinearity": ("tanh(W + y1 @ y2)", False),
    "a wide product": ("W + w1 @ w2", False),
}
SHAPES = {
    "x1": "[in, 2]",
    "x2": "[2, out]",
    "y1": "[out, 2]",
    "y2": "[2, in]",
    "m": "[out, 1]",
    "c": "[in]",
    "dense": "[out, in]",
    "w1": "[out, in]",
    "w2": "[in, in]",
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("family", ["bert", "gpt2", "llama", "neox"])
def test_every_weight_is_what_it_was(family: str, name: str) -> None:
    """Values and gradients, whole weights and slices of fused ones, to the rounding of float64."""
    formula, narrow = WEIGHTS[name]
    used = {k: v for k, v in SHAPES.items() if k in names(parse(formula))}
    params = ", ".join(f"{k}: {{shape: {v}, init: normal}}" for k, v in used.items())
    entry = f'at: attention.v, params: {{{params}}}, rewrite: {{W: "{formula}"}}'
    weight = parse_spec(f"name: w\ndeltas: [{{{entry.replace('params: {}, ', '')}}}]")
    found, counts = [], list[int]()
    for without in ((), ("factors",)):
        trace = Trace()
        specs = [weight, spec("norm_tuning")]  # which always learns something
        model = peftc.compile(tiny(family).double(), specs, without=without, trace=trace)
        stir(model, 0.3).train()
        inputs = batch(model, "right")
        torch.manual_seed(0)
        value = model(**inputs).logits
        learned = [p for p in model.parameters() if p.requires_grad]
        found.append((value, *torch.autograd.grad(value.square().mean(), learned)))
        counts += [one.rewrites for one in trace.results if one.name == "factors"][-1:]
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1)
    assert (counts[0] > 0) is narrow


def test_factors(golden: Callable[[str, str], None]) -> None:
    """DoRA at one site; its norm keeps nothing for a way back."""
    plan = make(tiny("bert", num_hidden_layers=1), spec("dora"))
    one = replace(program(), training=True)
    for step in (Normalize(), Insert(plan.edits[:1])):
        step.run(one)
    before = program_text(one)
    assert Factors().run(one) == 1 and check(one) == ()
    golden("factors.diff", diff(before, program_text(one)))
    assert Factors().run(one) == 0


def test_in_evaluation_a_weight_is_a_constant() -> None:
    plan = make(tiny("bert", num_hidden_layers=1), spec("dora"))
    one = program()
    for step in (Normalize(), Insert(plan.edits)):
        step.run(one)
    assert Factors().run(one) == 0
