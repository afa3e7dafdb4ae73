"""Mixers as sites: state spaces and linear attention, found by what ends in a residual add and lets tokens meet."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, stir, tiny

import peftc
from peftc.driver import survey
from peftc.language.reader import parse_spec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from registry import build, registered

SPEC = """
deltas:
  - at: [mixer.in, mixer.out]
    params:
      down: {shape: [in, 2], init: normal}
      up: {shape: [2, out], init: zeros}
    delta: x @ down @ up
  - at: mixer
    params: {a: {shape: [in, out], init: zeros}}
    delta: relu(x @ a)
"""


def test_a_state_space() -> None:
    """LoRA at its projections folds, an adapter beside it stays; with a cache as without one."""
    backbone = tiny("mamba").double()
    model = peftc.compile(copy.deepcopy(backbone), parse_spec(SPEC, "s")).eval()
    scopes = {edit.site.scope for edit in model.plan.edits if edit.site.at == "mixer"}
    assert scopes == {"backbone.layers.0.mixer", "backbone.layers.1.mixer"}
    inputs = batch(backbone)
    wanted = backbone(**inputs).logits
    torch.testing.assert_close(model(**inputs).logits, wanted, rtol=0, atol=1e-9)
    stir(model)
    folded, report = peftc.merge(model)
    assert {one.edit.rpartition(":")[0].rpartition(":")[2] for one in report.kept} == {"mixer"}
    assert len(report.folded) == 4
    options = dict(max_new_tokens=3, do_sample=False)
    tokens = [
        one.generate(**inputs, use_cache=cached, **options)
        for one in (model, folded)
        for cached in (True, False)
    ]
    assert all(torch.equal(tokens[0], one) for one in tokens[1:])


HYBRIDS = {
    "RecurrentGemmaForCausalLM": {"mixer": 6, "mixer.in": 12, "mixer.out": 6, "attention": 2},
    "Qwen3NextForCausalLM": {"mixer": 3, "mixer.in": 6, "mixer.out": 3, "attention": 1, "ffn": 4},
    "LlamaForTokenClassification": {"mixer": 0, "attention": 2, "ffn": 2},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", HYBRIDS)
def test_beside_attention(name: str) -> None:
    one = build(next(one for one in registered() if one.name == name))
    found = [site.at for site in survey(one.model)]
    assert {at: found.count(at) for at in HYBRIDS[name]} == HYBRIDS[name]
