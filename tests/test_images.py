"""Models of images and text: what images go through is a stack of its own, and a graph takes them with the tokens."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import stir, wide
from transformers import PreTrainedModel

import peftc
from peftc.language.reader import parse_spec

IMAGE = 120  # the token that stands for a part of an image


def llava() -> PreTrainedModel:
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2)
    text = dict(
        vocab_size=128,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    config = transformers.LlavaConfig(
        vision_config=transformers.CLIPVisionConfig(**vision, image_size=8, patch_size=4),
        text_config=transformers.LlamaConfig(**text),
        image_token_id=IMAGE,
        image_token_index=IMAGE,
        image_seq_length=4,
        vision_feature_layer=-1,
    )
    return wide(transformers.LlavaForConditionalGeneration(config))


def asked(rows: int = 3, length: int = 6) -> dict[str, torch.Tensor]:
    """Prompts that start with an image of four tokens."""
    torch.manual_seed(1)
    ids = torch.cat([torch.full((rows, 4), IMAGE), torch.randint(4, 100, (rows, length))], 1)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(rows, 3, 8, 8),
    }


def lora(stack: str) -> object:
    return parse_spec(
        f"deltas: [{{at: attention.q, where: {{stack: {stack}}}, params: {{A: {{shape: [in, 2], init: normal}},"
        " B: {shape: [2, out], init: zeros}}, delta: x @ A @ B}]",
        stack,
    )


@pytest.mark.parametrize("stack", ["vision", "text", "decoder"])
def test_stacks(stack: str) -> None:
    """A delta in one of the stacks: it trains, generates and folds as eager code does."""
    model = llava()
    compiled = peftc.compile(copy.deepcopy(model), lora(stack), example=asked()).eval()
    towers = {("vision" in edit.site.scope) for edit in compiled.plan.edits}
    assert towers == {stack == "vision"} and len(compiled.plan.edits) == 2
    assert torch.equal(compiled(**asked()).logits, model(**asked()).logits)
    stir(compiled)
    compiled(**asked()).logits.square().mean().backward()
    assert all(one.grad.abs().max() > 0 for one in compiled.deltas.parameters())
    folded, report = peftc.merge(compiled, example=asked())
    assert not report.kept
    for rows, length, cached in ((3, 6, True), (2, 9, True), (3, 6, False)):
        options = dict(max_new_tokens=6, do_sample=False, use_cache=cached)
        ours = compiled.generate(**asked(rows, length), **options)
        assert torch.equal(ours, folded.generate(**asked(rows, length), **options))


def test_text_alone() -> None:
    """Without an image, of the same compiled model."""
    model = llava()
    compiled = peftc.compile(copy.deepcopy(model), lora("text")).eval()
    ids = asked()["input_ids"][:, 4:]
    for one in (dict(), dict(pixel_values=asked()["pixel_values"])):
        given = asked()["input_ids"] if one else ids
        written = [
            m.generate(given, **one, max_new_tokens=5, do_sample=False) for m in (compiled, model)
        ]
        assert torch.equal(*written)
