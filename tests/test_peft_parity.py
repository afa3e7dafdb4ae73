"""LoRA against Hugging Face PEFT: the same weights copied in give the same logits and gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from conftest import batch, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.plan.edit import Edit

# family -> (PEFT's names of the query and value projections)
TARGETS = {
    "bart": ["q_proj", "v_proj"],
    "roberta": ["query", "value"],
    "gpt2": ["c_attn"],
    "neox": ["query_key_value"],  # heads interleave: q, k, v of the first head, then of the second
    "llama": ["q_proj", "v_proj"],
}
FUSED = ("gpt2", "neox")


def rows(edit: Edit) -> slice:
    """One rank-8 pair over a fused matrix holds the two rank-4 pairs of its slices."""
    if not edit.site.is_slice:
        return slice(None)
    return slice(0, 4) if edit.site.at == "attention.q" else slice(4, 8)


def peft_model(backbone: PreTrainedModel, family: str, model: PreTrainedModel) -> PreTrainedModel:
    config = peft.LoraConfig(
        r=8 if family in FUSED else 4,
        lora_alpha=16 if family in FUSED else 8,
        target_modules=TARGETS[family],
        fan_in_fan_out=family == "gpt2",
    )
    other = peft.get_peft_model(copy.deepcopy(backbone), config).eval()
    layers = {
        n.removeprefix("base_model.model."): m
        for n, m in other.named_modules()
        if hasattr(m, "lora_A")
    }
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_A["default"].weight.zero_()
            layer.lora_B["default"].weight.zero_()
        values = model.deltas.values()
        for edit in model.plan.edits:
            layer = layers[edit.site.weights["W"].path.removesuffix(".weight")]
            a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
            columns = edit.site.weights["W"].view.columns
            features = columns.index() if columns else slice(None)
            a[rows(edit)] = values[f"{edit.path}.down"].T
            b[features, rows(edit)] = values[f"{edit.path}.up"].T
    return other


@pytest.mark.sampled(2)
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", sorted(TARGETS))
def test_lora(family: str, attention: str, padding: str) -> None:
    backbone = tiny(family, attention)
    reference = copy.deepcopy(backbone)
    model = stir(peftc.compile(backbone, peftc.load_spec("lora", r=4, alpha=8)))
    other = peft_model(reference, family, model)
    inputs = batch(model, padding)
    mine, theirs = model(**inputs).logits, other(**inputs).logits
    assert (mine - theirs).abs().max() <= 1e-5 * theirs.abs().max().clamp(min=1)  # fp32, two layers
    mine.square().mean().backward()
    theirs.square().mean().backward()
    grads = {n: m for n, m in other.named_modules() if hasattr(m, "lora_A")}
    for edit in model.plan.edits:
        down = model.deltas.get_parameter(f"{edit.path}.down").grad
        layer = grads["base_model.model." + edit.site.weights["W"].path.removesuffix(".weight")]
        want = layer.lora_A["default"].weight.grad.T[:, rows(edit)]
        assert down is not None
        assert (down - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
