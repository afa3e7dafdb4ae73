"""Turned and Rows: how few rows are multiplied; the printed differences are the goldens."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import batch, stir, tiny
from measured import kernels
from methods import spec
from toys import SPECS, inserted
from transformers import PreTrainedModel

import peftc
from passes import Products, Rows, Turned
from peftc.driver import Trace
from peftc.graph.program import Program
from peftc.language.reader import parse_spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check


def rewritten(name: str) -> Program:
    return inserted(parse_spec(SPECS[name], f"{name}.yaml"), Products())


def test_turned(golden: Callable[[str, str], None]) -> None:
    one = replace(rewritten("lora"), entry="decode")
    before = program_text(one)
    for left in (replace(one, training=True), replace(one, entry="forward")):
        assert Turned().run(left) == 0 and program_text(left) == before
    assert Turned().run(one) == 1 and check(one) == ()
    golden("turned.diff", diff(before, program_text(one)))
    assert Turned().run(one) == 0


def test_rows(golden: Callable[[str, str], None]) -> None:
    one = rewritten("lora")
    before = program_text(one)
    assert Rows().run(one) == 2 and check(one) == ()
    golden("rows.diff", diff(before, program_text(one)))
    assert Rows().run(one) == 0
    # A result that goes on as it is, to be added, keeps its shape.
    assert Rows().run(rewritten("adapter")) == 0


def scores(model: PreTrainedModel, tokens: int = 4) -> torch.Tensor:
    """The logits of each token that is written."""
    inputs = batch(model, "left", size=2)
    inputs.pop("decoder_input_ids", None)
    exact = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, pad_token_id=1)
    given = model.generate(**inputs, **exact, output_logits=True, return_dict_in_generate=True)
    return torch.stack(given.logits)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("family", ["bart", "gpt2", "llama", "neox", "t5"])
@pytest.mark.parametrize(
    ("method", "name"),
    [(m, "turned") for m in ("lora", "scaled_parallel_adapter", "mam")] + [("lora", "rows")],
)
def test_every_step_is_what_it_was(family: str, method: str, name: str) -> None:
    """To the rounding of float64; also when what was kept of a delta was written to meanwhile."""
    found, trace = [], Trace()
    for without in ((), (name,)):
        model = peftc.compile(tiny(family).double(), spec(method), without=without, trace=trace)
        found.append([scores(stir(model, seed=seed)) for seed in (2, 3)])
    assert any(one.rewrites for one in trace.results if one.name == name)
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-9 * other.abs().max().clamp(min=1)


def test_a_step_with_lora_has_few_views() -> None:
    """What q and v of a layer read lies in rows once; their weights are linears of rows, cut into heads as before."""
    found = {}
    for without in (("rows",), ()):
        model = stir(peftc.compile(tiny("llama"), "lora", without=without))
        runs = [lambda n=n, model=model: scores(model, n) for n in (5, 6)]
        few, more = (kernels(run) for run in runs for _ in (run(),))
        found[without] = [one - other for one, other in zip(more, few, strict=True)]
    (kernels_now, views_now), (kernels_then, views_then) = found[()], found["rows",]
    assert kernels_now == kernels_then and views_now < views_then
