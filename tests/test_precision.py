"""Mixed precision: a formula is computed in the widest type that it reads, and a port keeps its own."""

from __future__ import annotations

import pytest
import torch
from conftest import batch, logits, stir, tiny

import peftc

METHODS = {
    "lora": dict(r=4, alpha=8),
    "mam": dict(l=3, m=4, r=4),
    "dora": {},
    "ia3": {},
    "houlsby_adapter": dict(r=4),
}


@pytest.mark.parametrize("method", METHODS)
def test_float32_deltas_on_a_bfloat16_backbone(method: str) -> None:
    """They train, and give what deltas rounded to bfloat16 give, to bfloat16's rounding."""
    spec = peftc.load_spec(method, **METHODS[method])
    model = stir(peftc.compile(tiny("bert").bfloat16(), spec), 0.1)
    inputs = batch(model)
    half = logits(model, inputs)
    model.deltas.float()
    assert {value.dtype for value in model.deltas.values().values()} == {torch.float32}
    wide = logits(model, inputs)
    assert wide.dtype == torch.bfloat16
    # 8 bits of mantissa, two layers with weights of size 1
    assert (wide - half).abs().max() <= 0.1 * half.abs().max().clamp(min=1)
    model.train()
    model(**inputs).logits.float().square().mean().backward()
    assert {p.grad.dtype for p in model.deltas.parameters() if p.grad is not None} == {
        torch.float32
    }


def test_under_autocast_as_without_it() -> None:
    model = stir(peftc.compile(tiny("bert"), peftc.load_spec("lora", r=4, alpha=8)), 0.1)
    inputs = batch(model)
    want = logits(model, inputs)
    with torch.autocast("cpu", torch.bfloat16):
        got = logits(model, inputs)
    assert got.dtype == torch.bfloat16
    assert (got - want).abs().max() <= 0.1 * want.abs().max().clamp(min=1)  # bfloat16


def test_half_deltas_on_a_float32_backbone() -> None:
    model = stir(peftc.compile(tiny("bert"), peftc.load_spec("lora", r=4, alpha=8)), 0.1)
    inputs = batch(model)
    want = logits(model, inputs)
    model.deltas.bfloat16()
    got = logits(model, inputs)
    assert got.dtype == torch.float32
    assert (got - want).abs().max() <= 0.02 * want.abs().max().clamp(min=1)  # deltas rounded once
