"""LoRA against Hugging Face PEFT: the same weights copied in give the same logits and gradients."""

from __future__ import annotations

import copy

import peft
import pytest
import torch
from conftest import batch, stir, tiny
from transformers import PreTrainedModel

import peftc

# family -> (PEFT's names of the query and value projections)
TARGETS = {"bart": ["q_proj", "v_proj"], "roberta": ["query", "value"], "gpt2": ["c_attn"]}


def pairs(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) by the module path of the projection; a fused projection has one entry for each slice."""
    values = model.deltas.values()
    return {
        f"{e.site.anchors['W'].removesuffix('.weight')}#{e.site.columns}": (
            values[f"{e.path}.down"],
            values[f"{e.path}.up"],
        )
        for e in model.plan.edits
    }


def peft_model(backbone: PreTrainedModel, family: str, model: PreTrainedModel) -> PreTrainedModel:
    config = peft.LoraConfig(
        r=4 if family != "gpt2" else 8,
        lora_alpha=8 if family != "gpt2" else 16,
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
        for key, (down, up) in pairs(model).items():
            path, _, columns = key.partition("#")
            a, b = layers[path].lora_A["default"].weight, layers[path].lora_B["default"].weight
            if columns == "None":
                a.copy_(down.T)
                b.copy_(up.T)
            else:  # one rank-8 pair over the fused matrix holds the two rank-4 pairs of its slices
                start, stop = (int(n) for n in columns.strip("()").split(","))
                rows = slice(0, 4) if start == 0 else slice(4, 8)
                a[rows] = down.T
                b[start:stop, rows] = up.T
    return other


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
        layer = grads["base_model.model." + edit.site.anchors["W"].removesuffix(".weight")]
        want = layer.lora_A["default"].weight.grad.T
        if edit.site.columns:
            want = want[:, :4] if edit.site.columns[0] == 0 else want[:, 4:]
        assert down is not None
        assert (down - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
