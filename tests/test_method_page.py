"""docs/method.md: the method that it takes from a paper is the one that PEFT has of it."""

from __future__ import annotations

import torch
from blocks import blocks
from conftest import batch, tiny
from peft import TinyLoraConfig, get_peft_model

import peftc
from peftc.language.reader import parse_spec


def test_it_is_tiny_lora() -> None:
    """The same factors, projections and vector: logits and the vector's gradient."""
    (text,) = (one.text for one in blocks("method", "yaml"))
    model = peftc.compile(tiny("bert"), parse_spec(text, "tiny_lora.yaml"))
    config = TinyLoraConfig(r=2, u=13, weight_tying=1.0, target_modules=["query", "value"])
    other = get_peft_model(tiny("bert"), config)
    theirs = {name: one for name, one in other.named_modules() if hasattr(one, "tinylora_P")}
    values = model.deltas.values()
    torch.manual_seed(3)
    vector = torch.randn(13)
    assert len(theirs) == len(model.plan.edits) == 4
    with torch.no_grad():
        for edit in model.plan.edits:
            part = {one.name: values[one.path] for one in edit.parameters}
            layer = theirs[
                f"base_model.model.{edit.site.weights['W'].path.removesuffix('.weight')}"
            ]
            part["down"].copy_(layer.tinylora_A["default"].T)
            part["up"].copy_(layer.tinylora_B["default"].T)
            part["P"].copy_(layer.tinylora_P["default"].mT)
            part["v"].copy_(vector[:, None, None])
        (own,) = (one for one in other.parameters() if one.requires_grad)
        own.copy_(vector)
    inputs = batch(model)
    found = [one.eval()(**inputs).logits for one in (model, other)]
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max().clamp(min=1)
    for one in found:
        one.square().sum().backward()
    (mine,) = (one for one in model.deltas.parameters())
    assert (mine.grad.flatten() - own.grad).abs().max() <= 1e-5 * own.grad.abs().max()
