"""A kind of site is one row of ports and one row of `KINDS`: here is one made in a test, with no file of peftc edited."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from torch.nn.utils import parametrizations

import peftc
from peftc.driver import survey
from peftc.errors import PeftcError
from peftc.graph.program import aten, scope_of
from peftc.language.ports import BIAS, INPUT, RESULT, SITES, WEIGHT, Port, SiteType
from peftc.language.reader import parse_spec
from peftc.merging import merge
from peftc.sites import linear
from peftc.sites.index import Index
from peftc.sites.kinds import KINDS, Folds, Kind
from peftc.sites.site import NoSite, Site

LORA = """
name: scored
deltas:
  - at: scorer
    where: {layers: 0-1}
    expect: 2
    params:
      down: {shape: [in, 3],  init: normal(0.1)}
      up:   {shape: [3, out], init: zeros}
    delta: x @ down @ up
"""
GATED = """
name: gated
deltas:
  - at: scorer
    params: {scale: {shape: [out, 1], init: ones}}
    rewrite: {W: W * scale}
"""
CURVED = """
name: curved
deltas:
  - at: scorer
    params: {up: {shape: [in, out], init: normal(0.1)}}
    delta: tanh(x) @ up
"""


def find(index: Index) -> Iterator[Site | NoSite]:
    """The linear whose probabilities a `topk` chooses from."""
    for top in index.calls(aten.topk.default):
        scores = top.args[0].args[0]
        yield linear.linear_site(index, scores, "scorer", scope_of(scores))


@pytest.fixture(autouse=True)
def scorer(monkeypatch: pytest.MonkeyPatch) -> None:
    ports = {
        "x": Port(("...", "in"), INPUT),
        "h": Port(("...", "out"), RESULT),
        "W": Port(("out", "in"), WEIGHT),
        "b": Port(("out",), BIAS),
    }
    row = SiteType("scorer", ports, ("in", "out", "d"), "the linear that scores experts")
    folds = Folds("linear", {port: port for port in ports})
    monkeypatch.setitem(SITES, "scorer", row)
    monkeypatch.setitem(KINDS, "scorer", Kind("scorer", find, linear.locate, folds=folds))


def test_it_plans_and_counts() -> None:
    plan = peftc.plan(tiny("mixtral"), parse_spec(LORA))
    assert plan.site_counts == {"scorer": 2} and not plan.misses
    assert [edit.site.scope for edit in plan.edits] == [
        f"model.layers.{i}.mlp.gate" for i in range(2)
    ]
    assert plan.parameters.training == 2 * 3 * (32 + 4)  # d = 32, four experts
    assert {site.name for site in survey(tiny("mixtral")) if site.at == "scorer"} == {
        edit.site.name for edit in plan.edits
    }


def test_it_trains() -> None:
    backbone = tiny("mixtral")
    model = peftc.compile(backbone, parse_spec(LORA))
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(backbone, inputs))  # `up` starts at zero
    model.train()
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    got = {name for name, value in model.named_parameters() if value.grad is not None}
    assert got == {f"deltas.{path}" for path in model.deltas.values()}
    assert any(value.grad.abs().max() > 0 for value in model.deltas.parameters())


@pytest.mark.parametrize("text", [LORA, GATED, CURVED])
def test_it_saves_and_loads(text: str, tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("mixtral"), parse_spec(text)))
    inputs = batch(model)
    model.save_pretrained(tmp_path)
    again = peftc.load(tmp_path, backbone=tiny("mixtral"))
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize("text", [LORA, GATED])
def test_it_folds(text: str) -> None:
    backbone = tiny("mixtral")
    bare = logits(backbone, batch(backbone))
    model = stir(peftc.compile(backbone, parse_spec(text)))
    inputs = batch(model)
    merged, report = merge(model)
    assert not report.kept and len(report.folded) == 2
    want = logits(model, inputs)
    assert (want - bare).abs().max() > 1e-3
    # fp32 weights rounded once, and experts are chosen by what they score
    assert (logits(merged, inputs) - want).abs().max() <= 1e-4 * want.abs().max()


def test_what_does_not_fold_says_why() -> None:
    merged, report = merge(stir(peftc.compile(tiny("mixtral"), parse_spec(CURVED))))
    assert [one.note for one in report.kept] == ["'tanh' is not affine"] * 2
    assert len(merged.plan.edits) == 2


def test_it_goes_with_other_kinds() -> None:
    model = stir(peftc.compile(tiny("mixtral"), [parse_spec(LORA), "lora", parse_spec(GATED)]))
    inputs = batch(model)
    merged, report = merge(model)
    assert not report.kept
    want = logits(model, inputs)
    assert (logits(merged, inputs) - want).abs().max() <= 1e-4 * want.abs().max()


def test_a_model_without_one_says_so() -> None:
    with pytest.raises(PeftcError, match="'scorer' of scored matches 0 sites, expect: 2"):
        peftc.plan(tiny("llama"), parse_spec(LORA))


def test_weight_norm_computes_the_weight() -> None:
    """A site whose weight the graph computes is a miss that names the weight and the op, never an edit."""
    backbone = tiny("bert")
    query = backbone.bert.encoder.layer[0].attention.self.query
    parametrizations.weight_norm(query)
    plan = peftc.plan(backbone, "lora")
    assert len(plan.edits) == 3
    (miss,) = plan.misses
    assert miss.site == "bert.encoder.layer.0.attention.self.query"
    assert "_weight_norm" in miss.reason and "computes this weight" in miss.reason
    model = stir(peftc.compile(backbone, "lora"))
    model.train()
    model(**batch(model)).logits.square().mean().backward()
    assert all(value.grad.abs().max() > 0 for value in model.deltas.parameters())
