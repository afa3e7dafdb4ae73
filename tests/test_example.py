"""A model whose inputs cannot be guessed: told once, every verb works."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny, wide
from transformers import (
    ASTConfig,
    ASTForAudioClassification,
    PatchTSTConfig,
    PatchTSTForRegression,
    PreTrainedModel,
)

import peftc
from peftc.errors import PeftcError
from peftc.rewrite.tolerance import tolerance

SIZES = dict(
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    intermediate_size=64,
    num_mel_bins=16,
    max_length=24,
    num_labels=3,
    attn_implementation="sdpa",
)
MIXED = ["lora", "scaled_parallel_adapter"]


def sound() -> PreTrainedModel:
    torch.manual_seed(0)
    return wide(ASTForAudioClassification(ASTConfig(**SIZES)))


@pytest.fixture
def example() -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {"input_values": torch.randn(3, 24, 16)}


def specs() -> list[peftc.Spec]:
    return [peftc.load_spec("lora", r=2), peftc.load_spec("scaled_parallel_adapter", r=2)]


def test_without_it_the_fix_is_said() -> None:
    with pytest.raises(PeftcError):
        peftc.compile(sound(), "lora")


def test_an_input_that_nothing_is_known_of_is_named() -> None:
    series = PatchTSTForRegression(PatchTSTConfig(d_model=16, num_hidden_layers=1, ffn_dim=16))
    with pytest.raises(PeftcError) as error:
        peftc.plan(series, "lora")
    assert str(error.value) == (
        "PatchTSTForRegression: no example input is known for 'past_values'; "
        "pass example={...} with one batch of it"
    )


def test_every_verb_takes_it_or_remembers_it(
    example: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    model = stir(peftc.compile(sound(), specs(), example=example))
    want = logits(model, example)
    model.save_pretrained(tmp_path / "d")
    again = peftc.load(tmp_path / "d", sound(), example=example)
    assert torch.equal(logits(again, example), want)
    for one in (model, again):
        rest, report = peftc.merge(one)
        assert report.folded and report.kept and report.changed > 0
        assert (logits(rest, example) - want).abs().max() <= tolerance(want.abs().max().item())
        _, second = peftc.merge(rest)
        assert second.error == 0 and not second.folded
    lora = stir(peftc.compile(sound(), "lora", example=example))
    pruned, cut = peftc.prune(lora, 100)
    assert cut.kept == 100
    assert peftc.merge(pruned)[1].kept == ()
    with pytest.raises(PeftcError, match="it reads input_values, not texts"):
        peftc.export(model, tmp_path / "bundle")


def test_an_example_may_lack_its_mask(tmp_path: Path) -> None:
    ids = batch(tiny("bert"))["input_ids"]
    model = stir(peftc.compile(tiny("bert"), "lora", example={"input_ids": ids}))
    peftc.export(model, tmp_path / "b")
    runner = peftc.runtime.load(tmp_path / "b")
    want = logits(model, {"input_ids": ids})
    assert (runner(ids).logits - want).abs().max() <= tolerance(want.abs().max().item())


def test_it_follows_the_model(example: dict[str, torch.Tensor]) -> None:
    model = stir(peftc.compile(sound(), "lora", example=example)).to(torch.float64)
    assert peftc.merge(model)[1].error <= 1e-9


def test_a_plain_model_is_told(tmp_path: Path) -> None:
    inputs = batch(tiny("bert"))
    peftc.export(tiny("bert"), tmp_path / "b", example=inputs)
    with pytest.raises(PeftcError, match="it reads 'position_ids' too"):
        more = {**inputs, "position_ids": torch.arange(11).repeat(3, 1)}
        peftc.export(tiny("bert"), tmp_path / "c", example=more)
