"""A plan that was saved and loaded, or merged, says of itself what its own tensors are."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, saved, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.cli.tables import data
from peftc.language.reader import parse_spec
from peftc.model.compiled import CompiledModel

# Two entries of one method at the same sites: the first folds, the second does not.
TWICE = """\
name: twice
deltas:
  - at: ffn
    params: {s: {shape: [out], init: ones}}
    rewrite: {h: h * s}
  - at: ffn
    params: {down: {shape: [in, 2], init: kaiming_uniform}, up: {shape: [2, out], init: zeros}}
    delta: relu(x @ down) @ up
"""
MAM = dict(l=3, m=4, r=2)


def specs() -> dict[str, list[peftc.Spec]]:
    return {
        "mam": [peftc.load_spec("mam", **MAM)],
        "mixed": [
            peftc.load_spec("lora", r=2),
            peftc.load_spec("mam", **MAM),
            peftc.load_spec("head"),
        ],
        "twice": [parse_spec(TWICE)],
    }


def trained(model: CompiledModel, tmp_path: Path) -> CompiledModel:
    return model


def reloaded(stored: bool) -> Callable[[CompiledModel, Path], CompiledModel]:
    def load(model: CompiledModel, tmp_path: Path) -> CompiledModel:
        model.save_pretrained(tmp_path / "d", stored=stored)
        return peftc.load(tmp_path / "d", backbone=fresh(model, tmp_path))

    return load


def merged(model: CompiledModel, tmp_path: Path) -> CompiledModel:
    rest, report = peftc.merge(model)
    assert isinstance(rest, CompiledModel) and report.kept
    return rest


def merged_and_reloaded(model: CompiledModel, tmp_path: Path) -> CompiledModel:
    rest = merged(model, tmp_path)
    return reloaded(False)(rest, tmp_path)


def fresh(model: PreTrainedModel, tmp_path: Path) -> PreTrainedModel:
    """A backbone of its own with the same weights."""
    model.__dict__["_backbone"].save_pretrained(tmp_path / "backbone")
    own: PreTrainedModel = type(model.__dict__["_backbone"]).from_pretrained(tmp_path / "backbone")
    return own


FORMS = {
    "as trained": trained,
    "loaded": reloaded(False),
    "stored": reloaded(True),
    "merged": merged,
    "merged, loaded": merged_and_reloaded,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["mam", "mixed", "twice"])
def test_a_plan_counts_its_own_tensors(name: str, form: str, tmp_path: Path) -> None:
    first = stir(peftc.compile(tiny("bert"), specs()[name]))
    model = FORMS[form](first, tmp_path)
    inputs = batch(model)
    want, got = logits(first, inputs), logits(model, inputs)
    assert (got - want).abs().max() <= 1e-5 * want.abs().max()
    free = {one.path for one in model.plan.unfrozen}
    trains = sum(p.numel() for p in model.deltas.parameters())
    trains += sum(p.numel() for n, p in model.named_parameters() if n in free)
    plan = model.plan
    assert plan.parameters.training == trains
    assert plan.parameters.stored <= plan.parameters.training
    by_entry = [0] * len(plan.matches)
    for edit in plan.edits:
        by_entry[edit.index] += 1
    by_entry = [
        n or (one.sites if one.entry.train else 0) for n, one in zip(by_entry, plan.matches)
    ]
    assert [one.sites for one in plan.matches] == by_entry
    assert {one.entry for one in plan.misses} <= {one.entry.method for one in plan.edits}
    rows = data(plan)["methods"]
    assert sum(row["parameters"] for row in rows) == trains
    assert all(row["sites"] for row in rows)


def test_what_is_left_of_two_entries_of_one_name(tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("bert"), parse_spec(TWICE)))
    rest, report = peftc.merge(model)
    names = [one.edit for one in report.outcomes]
    assert len(names) == 2 * len(set(names))
    assert len(report.folded) and len(report.kept)
    again = reloaded(False)(rest, tmp_path)
    assert [(e.index, e.name) for e in again.plan.edits] == [
        (e.index, e.name) for e in rest.plan.edits
    ]
    assert torch.equal(logits(again, batch(again)), logits(rest, batch(rest)))


def test_what_format_1_named_is_still_found(folder: Path, tmp_path: Path) -> None:
    """A manifest of before `left` names the edits."""
    path = saved("mam", folder, tmp_path / "d")
    manifest = json.loads((path / "peftc.json").read_text())
    del manifest["left"]
    (path / "peftc.json").write_text(json.dumps(manifest))
    assert len(peftc.load(path).plan.edits) == 4
