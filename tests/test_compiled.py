"""The compiled model as a module: detached, in either mode, at any size; and what is left once all is folded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from methods import spec

import peftc
from peftc.merging import merge


@pytest.mark.parametrize("family", ["bart", "roberta", "gpt2"])
def test_detach_restores(family: str) -> None:
    backbone = tiny(family)
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    want = logits(backbone, batch(backbone))
    model = stir(peftc.compile(backbone, spec("mam")))
    logits(model, batch(model))
    restored = peftc.detach(model)
    assert restored is backbone
    assert {n: p.requires_grad for n, p in restored.named_parameters()} == flags
    assert torch.equal(logits(restored, batch(backbone)), want)


def test_dropout_follows_the_mode() -> None:
    model = peftc.compile(tiny("bart", dropout=0.0, attention_dropout=0.5), "lora")
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))


def test_modes_stay_together() -> None:
    """What runs a model, or its backbone alone, must not leave a module of it in another mode."""
    backbone = tiny("gpt2")
    model = stir(peftc.compile(backbone, "lora"), 0.1)
    model.train()
    model(**batch(model)).logits.sum().backward()
    model.eval()
    merge(model)
    assert not any(module.training for module in (*model.modules(), *backbone.modules()))


def test_sizes_one_are_no_special_case() -> None:
    backbone = tiny("bart")
    model = peftc.compile(backbone, spec("mam"))
    one = batch(model, size=1, length=1)
    assert logits(model, one).shape == logits(backbone, one).shape


def test_what_stays_says_why() -> None:
    model = stir(peftc.compile(tiny("bart"), spec("mam")), 0.1)
    merged, report = merge(model)
    assert len(report.outcomes) == len(model.plan.edits) == len(merged.plan.edits)
    assert {one.note for one in report.kept} == {
        "'prepend' rewrites 'k, v', which is no linear's result",
        "'relu' is not affine, and its feed-forward's own is 'gelu'",
    }


def test_a_folded_checkpoint_needs_no_peftc(tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("bart"), spec("lora")))
    merged, _ = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    inputs = batch(model)
    torch.save(inputs, tmp_path / "in.pt")
    script = (
        "import sys, torch; from transformers import BartForConditionalGeneration as B\n"
        f"m = B.from_pretrained({str(tmp_path / 'merged')!r}).eval()\n"
        f"torch.save(m(**torch.load({str(tmp_path / 'in.pt')!r})).logits, {str(tmp_path / 'out.pt')!r})\n"
        "assert not any(n.partition('.')[0] in ('peftc', 'passes') for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    want = logits(model, inputs)
    assert (torch.load(tmp_path / "out.pt") - want).abs().max() <= 1e-4 * want.abs().max()
