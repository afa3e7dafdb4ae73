"""The certificate: rows that hold where all is right, and name what is not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from conftest import stir, tiny
from test_tasks import SMALL

import peftc
from peftc import certificate
from peftc.graph.grid import Case
from peftc.model.compiled import CompiledModel

CELLS = [
    ("bert", "lora"),
    ("roberta", "mam"),
    ("bart", "mam"),
    ("t5", "lora"),
    ("llama", "prefix_tuning"),
    ("gpt2", "prompt_tuning"),
    ("gemma2", "mam"),
    ("vit", "lora"),
    ("whisper", "houlsby_adapter"),
]


def compiled(family: str, method: str) -> CompiledModel:
    spec = peftc.load_spec(method, **SMALL.get(method, {}))
    return stir(peftc.compile(tiny(family), spec))


@pytest.mark.sampled(6)
@pytest.mark.parametrize(("family", "method"), CELLS)
def test_what_is_right_holds(family: str, method: str) -> None:
    model = compiled(family, method)
    found = [*certificate.rows_of(model)]
    rows = {one.what: one for one in found if one.moved is None}
    each = {one.what: one for one in found if one.moved is not None}
    assert each.keys() == {edit.name for edit in model.plan.edits}
    assert all(one.holds and one.moved > 0 for one in each.values())
    assert all(one.holds for one in rows.values())
    assert rows["compiled against its backbone"].error > 1e-3
    steps = "steps from a cache against one forward"
    assert (steps in rows) is model.can_generate()
    bounded = [one for one in rows.values() if one.bound]
    assert all(one.mean <= one.error <= (one.bound or 0) for one in bounded)
    assert all(one.agreement > 0.98 and abs(one.divergence) < 1e-6 for one in bounded)
    assert all(
        one.cases == (2 if model.main_input_name != "input_ids" else 8)
        for one in bounded
        if one.what != steps
    )


def test_the_full_grid() -> None:
    lean, *_ = certificate.rows_of(compiled("bert", "lora"), full=True)
    assert lean.holds and lean.cases == 14


def test_a_rewrite_that_folded_wrong_is_told_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    model, real = compiled("bert", "lora"), certificate.merge

    def wrong(*args: object, **more: object) -> object:
        merged, report = real(*args, **more)  # type: ignore[arg-type]
        with torch.no_grad():
            merged.bert.encoder.layer[1].attention.self.value.weight.mul_(1.5)
        return merged, report

    monkeypatch.setattr(certificate, "merge", wrong)
    failed = [one.what for one in certificate.rows_of(model) if not one.holds]
    assert failed[0].startswith("folded")
    assert failed[1:] == ["bert.encoder.layer.1.attention.self:attention.v:lora"]


def test_halves_have_a_bound_of_their_own() -> None:
    model = compiled("bert", "lora").to(torch.bfloat16)
    lean, *_ = certificate.rows_of(model)
    assert lean.holds and "bfloat16" in lean.why


@pytest.mark.parametrize(("method", "moved"), [("lora", 1.0), ("ia3", 0.5)])
def test_deltas_that_moved_must_change_something(method: str, moved: float) -> None:
    model = peftc.compile(tiny("bert"), method)
    *_, last = certificate.rows_of(model)
    assert last.holds and last.error == 0  # as it starts, it is nothing
    twin = peftc.compile(tiny("bert"), method)
    for path, one in twin.plan.tensors.items():
        if one.init in ("zeros", "ones"):
            twin.deltas.values()[path].data.fill_(moved)
    *_, last = certificate.rows_of(twin)
    assert last.holds and last.error > 0
    with torch.no_grad():  # a head that reads nothing: whatever the deltas do, nothing comes of it
        for weight in twin.classifier.parameters():
            weight.zero_()
    *_, last = certificate.rows_of(twin)
    assert not last.holds


def test_the_first_module_that_differs() -> None:
    model = compiled("llama", "lora")
    merged, _ = peftc.merge(model)
    assert certificate.against("merged", merged, model).module == ""
    with torch.no_grad():
        merged.model.layers[1].mlp.up_proj.weight.add_(0.1)
    row = certificate.against("merged", merged, model)
    assert (row.holds, row.module) == (False, "model.layers.1.mlp.up_proj")
    assert str(row).startswith("FAILED") and "first in model.layers.1.mlp.up_proj" in str(row)


def test_no_number_is_no_agreement(tmp_path: Path) -> None:
    """A row of nan fails, and the page is written all the same."""
    row = certificate.number("odd", float("nan"), 1.0)
    assert not row.holds
    certificate.write(tmp_path, {"class": "None"}, [row])
    assert not json.loads((tmp_path / certificate.JSON).read_text())["holds"]
    assert "does NOT hold" in (tmp_path / certificate.PAGE).read_text()
    assert sorted(one.name for one in tmp_path.iterdir()) == [certificate.JSON, certificate.PAGE]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", ["gemma2", "gpt2", "bloom", "llama", "neox", "phi3"])
def test_a_prefix_behind_a_single_token(family: str) -> None:
    """Where eager code asks for lengths, a step behind one token is a graph of its own, whose sizes are numbers."""
    model = compiled(family, "prefix_tuning")
    at_once, in_steps = certificate._both_ways(model)
    for rows in (1, 3):
        case = Case(rows, 2, 1, 1, "none")
        ids = torch.randint(4, 120, (rows, 2), generator=torch.Generator().manual_seed(0))
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        want, got = (way(inputs, case)["logits"] for way in (at_once, in_steps))
        assert (want - got).abs().max() <= 1e-4 * want.abs().max()
