"""Tied embeddings: what folds into one use of a tensor leaves its other uses as they were."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny

import peftc
from peftc.merging import merge
from peftc.rewrite.tying import separable, tied

SPEC = peftc.load_spec("lora_embedding", r=4)


@pytest.mark.parametrize("family", ["gpt2", "bart", "gemma2", "bloom"])
def test_a_tied_embedding_folds_alone(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    model, inputs = stir(peftc.compile(backbone, SPEC)), batch(backbone)
    merged, report = merge(model)
    assert tied(backbone) and not report.kept and not tied(merged)
    assert report.error <= 1e-4 * max(1.0, report.scale)  # fp32 weights rounded once
    head = merged.get_output_embeddings().weight
    assert torch.equal(head, backbone.get_output_embeddings().weight)
    sites = {edit.site.scope for edit in model.plan.edits}
    for name, module in merged.named_modules():
        if isinstance(module, torch.nn.Embedding) and name in sites:
            assert (module.weight - head).abs().max() > 1e-3
    merged.save_pretrained(tmp_path)
    again = type(backbone).from_pretrained(tmp_path, attn_implementation="eager")
    want = logits(model, inputs)
    assert (logits(again, inputs) - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1)


def test_what_folds_nowhere_unties_nothing() -> None:
    merged, _ = merge(stir(peftc.compile(tiny("gpt2"), peftc.load_spec("lora", r=2))))
    assert tied(merged) and merged.config.tie_word_embeddings


def test_what_is_left_finds_its_place() -> None:
    """The prompt stays, at an embedding that has been untied under it."""
    both = [SPEC, peftc.load_spec("prompt_tuning", l=3)]
    model = stir(peftc.compile(tiny("bart"), both))
    merged, report = merge(model)
    assert [one.edit for one in report.kept] == [
        "model.encoder.embed_tokens:embedding:prompt_tuning"
    ]
    inputs = batch(model)
    want = logits(model, inputs)
    assert (logits(merged, inputs) - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1)


def test_a_configuration_that_cannot_say_it_is_left_tied() -> None:
    """T5's configuration ties whatever it is told, so a checkpoint could not keep two tensors."""
    backbone = tiny("t5")
    merged, report = merge(stir(peftc.compile(backbone, SPEC)))
    assert not separable(backbone) and tied(merged)
    assert report.kept and all("is tied to another" in one.note for one in report.kept)
