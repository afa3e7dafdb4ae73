"""Norms: a root mean square is one op; the printed difference is the golden."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from conftest import batch, logits, stir, tiny
from methods import spec
from toys import program

import peftc
from passes import Normalize, Norms
from peftc.driver import Trace
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check


def test_norms(golden: Callable[[str, str], None]) -> None:
    one = program("llama")
    Normalize().run(one)
    before = program_text(one)
    assert (
        Norms().run(one) == 3 and check(one) == ()
    )  # before attention, before the feed-forward, at the end
    golden("norms.diff", diff(before, program_text(one)))
    assert Norms().run(one) == 0


# How many norms of two layers are of this kind, in float32 and in bfloat16: Gemma 2 scales by 1 + w; T5 has two stacks,
# and multiplies x as it is by the root of what it is cast to.
FOUND = {
    "llama": (5, 5),
    "gemma2": (9, 9),
    "t5": (12, 0),
    "phi3": (5, 5),
    "bart": (0, 0),
    "bert": (0, 0),
}


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", FOUND)
@pytest.mark.parametrize("turn", [0, 1], ids=["float32", "bfloat16"])
def test_every_norm_is_what_it_was(family: str, turn: int) -> None:
    """Values and gradients to the bit: with deltas in norms and behind them, in evaluation and in training."""
    backbone = tiny(family).to((torch.float32, torch.bfloat16)[turn])
    inputs = batch(backbone, "right")
    own = [spec("parallel_adapter"), *([] if turn else [spec("norm_tuning")])]
    found, trace = [], Trace()
    for without in ((), ("norms",)):
        model = stir(peftc.compile(copy.deepcopy(backbone), own, without=without, trace=trace))
        torch.manual_seed(0)
        value = model.train()(**inputs).logits
        learned = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(value.square().mean(), learned)
        found.append((logits(model.eval(), inputs), value, *slopes))
    counts = {one.rewrites for one in trace.results if one.name == "norms"}
    assert counts == {FOUND[family][turn]}
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
