"""Products: what is added to a product is part of it; the printed difference is the golden."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import batch, logits, stir, tiny
from toys import SPECS, inserted

import peftc
from passes import Products
from peftc.graph.program import aten
from peftc.language.expr import names, parse
from peftc.language.reader import parse_spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check


@pytest.mark.parametrize("name", ["adapter", "lora"])
def test_products(name: str, golden: Callable[[str, str], None]) -> None:
    one = inserted(parse_spec(SPECS[name], f"{name}.yaml"))
    before = program_text(one)
    assert Products().run(one) > 0 and check(one) == ()
    golden(f"products_{name}.diff", diff(before, program_text(one)))
    assert Products().run(one) == 0


# A formula of h, and how many of its sums become part of a product.
SUMS = {
    "scaled": ("h + 0.5 * (x @ down @ up)", 1),
    "subtracted": ("h + -2 * (x @ down @ up)", 1),
    "the product first": ("x @ down @ up + h", 1),
    "two biases": ("h + (relu(x @ down + a) @ up + w)", 2),
    "a bias twice its size": ("h + relu(x @ down + 2 * a) @ up", 2),
    "one sum in another": ("h + x @ down @ up + 0.1 * (x @ down @ up)", 2),
    "of no product": ("tanh(h) + x @ down @ up", 0),  # autocast would round it
    "one row for all tokens": ("h + a @ up", 0),
    "scaled by a parameter": ("h + w * (x @ down @ up)", 0),
}


@pytest.mark.parametrize("name", SUMS)
@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_every_sum_is_what_it_was(family: str, name: str) -> None:
    """Values and gradients, with the pass and without, to the rounding of float64."""
    formula, count = SUMS[name]
    shapes = {"down": "[in, 3]", "up": "[3, out]", "a": "[3]", "w": "[out]"}
    read = [
        f"{k}: {{shape: {v}, init: normal}}"
        for k, v in shapes.items()
        if k in names(parse(formula))
    ]
    spec = parse_spec(
        f"""
name: sums
deltas:
  - at: attention.q
    where: {{layers: 0}}
    params: {{{", ".join(read)}}}
    rewrite: {{h: "{formula}"}}
"""
    )
    trace = peftc.driver.Trace()
    models = [
        stir(peftc.compile(tiny(family).double(), spec, trace=trace, without=without))
        for without in ((), ("products",))
    ]
    inputs = batch(models[0])
    found = []
    for model in models:
        value = model(**inputs).logits
        slopes = torch.autograd.grad(value.square().mean(), [*model.deltas.parameters()])
        found.append((value, *slopes))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1)
    assert [one.rewrites for one in trace.results if one.name == "products"] == [count]


def test_lora_is_two_kernels_a_site() -> None:
    model = stir(peftc.compile(tiny("bert"), "lora", without=["joined"]))
    logits(model, batch(model))
    (runner,) = model._programs._runners.values()
    found = [node.target for node in runner.program.graph.nodes if "delta" in node.meta]
    views = (aten.flatten.using_ints, aten.view_as.default)
    kernels = [target for target in found if target not in views]
    assert kernels == [aten.matmul.default, aten.addmm.default] * len(model.plan.edits)
