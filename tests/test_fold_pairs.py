"""Every ordered pair of the methods that fold: folded is unfolded, or kept with a reason and still equal."""

from __future__ import annotations

import random
from dataclasses import dataclass

import pytest
import torch
from conftest import batch, logits, stir, tiny
from methods import FOLDS, lacks, spec

import passes
import peftc
from peftc.errors import PeftcError
from peftc.merging import merge
from peftc.rewrite.folding import Folding

FAMILIES = ("bert", "gpt2")
SAMPLED = 9  # pairs of a family in CI; `-m slow` takes all
# Two methods at one linear whose order matters: the pairs that folded wrongly once are always taken.
ALWAYS = (
    ("ia3", "lora_ffn"),
    ("lora_ffn", "ia3"),
    ("ia3", "dora"),
    ("ia3", "sparse_difference"),
    ("lora", "dora"),
    ("lora", "oft"),
    ("vera", "dora"),
    ("vera", "oft"),
    ("loha", "dora"),
    ("loha", "oft"),
    ("lora", "lora"),
    ("dora", "lora"),
    ("oft", "ia3"),
)


def cells(family: str) -> list[object]:
    folding = [method for method in FOLDS if not lacks(method, family)]
    pairs = [(one, other) for one in folding for other in folding]
    sampled = {*ALWAYS, *random.Random(0).sample(pairs, SAMPLED)}
    return [
        pytest.param(
            *pair,
            family,
            id=f"{'-'.join(pair)}-{family}",
            marks=[
                pytest.mark.xdist_group(family),
                *([] if pair in sampled else [pytest.mark.slow]),
            ],
        )
        for pair in pairs
    ]


@pytest.mark.parametrize(
    ("first", "second", "family"), [cell for family in FAMILIES for cell in cells(family)]
)
def test_pair(first: str, second: str, family: str) -> None:
    """In float64, where nothing but a wrong formula makes a difference."""
    model = stir(peftc.compile(tiny(family).double(), [spec(first), spec(second)]), 0.1)
    inputs = batch(model, "right")
    want = logits(model, inputs)
    merged, report = merge(model)
    gap = (logits(merged, inputs) - want).abs().max() / want.abs().max().clamp(min=1)
    assert gap <= 1e-9
    assert report.error <= 1e-9 * max(1.0, report.scale)
    assert all(outcome.note for outcome in report.outcomes)
    assert len(report.outcomes) == len(model.plan.edits)


@dataclass(frozen=True)
class Doctored:
    """A pass that spoils what was folded."""

    name: str = "doctored"

    def run(self, folding: Folding) -> int:
        for weight in folding.weights.values():
            weight.mul_(1.01)
        return len(folding.weights)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_wrong_fold_is_an_error(
    family: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = stir(peftc.compile(tiny(family).to(dtype), spec("lora")), 0.1)
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    monkeypatch.setattr(passes, "FOLD", (*passes.FOLD, Doctored()))
    with pytest.raises(PeftcError, match="fold"):
        merge(model)
    after = dict(model.named_parameters())
    assert all(torch.equal(after[name], value) for name, value in before.items())
