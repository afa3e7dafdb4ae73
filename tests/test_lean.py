"""What makes graphs lean: the same numbers without each of its passes, on a sample of methods x families."""

from __future__ import annotations

import pytest
import torch
from conftest import SAMPLE, Variant, batch, stir
from methods import spec
from test_matrix import real
from transformers import PreTrainedModel

import peftc
from passes import LEAN

NAMES = [one.name for one in LEAN]


@pytest.mark.sampled(70)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("method", "family"), SAMPLE)
def test_the_same_without(method: str, family: str, name: str) -> None:
    variant = Variant.of(method, family)
    found = []
    for without in ((), (name,)):
        model = stir(peftc.compile(variant.backbone(), spec(method), without=without), 0.1)
        found.append(step(model, batch(model, variant.padding)))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one.isnan(), other.isnan())  # Gemma 2's eager code, where all is padding
        one, other = one.nan_to_num(), other.nan_to_num()
        # float32, two layers, sums in another order
        assert (one - other).abs().max() <= 1e-4 * other.abs().max().clamp(min=1)


def step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """What a model gives, in evaluation and in training, and the gradients."""
    with torch.no_grad():
        quiet = real(model, inputs, model(**inputs).logits)
    model.train()
    torch.manual_seed(0)
    value = real(model, inputs, model(**inputs).logits)
    learned = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(value.square().mean(), learned, allow_unused=True)
    return [quiet, value, *(slope for slope in slopes if slope is not None)]
