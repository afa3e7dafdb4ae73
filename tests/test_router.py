"""Routers: LoRA on the linear that scores experts plans, is counted, trains, folds."""

from __future__ import annotations

import torch
from conftest import batch, logits, stir, tiny

import peftc
from peftc.language.reader import parse_spec

LORA = """
deltas:
  - at: router
    expect: 2
    params:
      down: {shape: [in, 3], init: kaiming_uniform}
      up:   {shape: [3, out], init: zeros}
    delta: x @ down @ up
"""


def test_lora_at_the_router() -> None:
    backbone = tiny("mixtral")
    model = peftc.compile(backbone, parse_spec(LORA))
    assert model.plan.site_counts == {"router": 2}
    assert model.plan.parameters.weights == 2 * 3 * (32 + 4)  # d = 32, four experts
    inputs = batch(backbone)
    assert torch.equal(logits(model, inputs), logits(backbone, inputs))
    model.train()
    model(**inputs).logits.square().mean().backward()
    assert all(p.grad is not None for p in model.deltas.parameters())
    stir(model.eval(), 0.5)
    _, report = peftc.merge(model)
    assert not report.kept and report.changed > 1e-3
    assert report.error <= 1e-5 * max(report.scale, 1)  # fp32, weights rounded once


def test_a_model_without_experts_has_no_router() -> None:
    sites = peftc.plan(tiny("llama"), "lora").sites
    assert not [site for site in sites if site.at == "router"]
