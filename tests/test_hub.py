"""What goes to a hub: the deltas, and a card that says what they are. The hub is a folder."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers.trainer
from conftest import batch, logits, stir, tiny
from huggingface_hub import HfApi, ModelCard
from test_habits import Rows
from transformers import Trainer, TrainingArguments

import peftc


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where repositories are, by their names."""
    folder = tmp_path / "hub"

    def create(repo_id: str, **_: Any) -> Any:
        (folder / repo_id).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(repo_id=repo_id)

    def upload(repo_id: str, folder_path: Any, ignore_patterns: Any = (), **_: Any) -> str:
        unwanted = shutil.ignore_patterns(*(one.rstrip("/*") for one in ignore_patterns or ()))
        shutil.copytree(folder_path, folder / repo_id, dirs_exist_ok=True, ignore=unwanted)
        return f"hub/{repo_id}"

    monkeypatch.setattr(HfApi, "create_repo", lambda _, *args, **more: create(*args, **more))
    monkeypatch.setattr(HfApi, "upload_folder", lambda _, **more: upload(**more))
    for name, one in (("create_repo", create), ("upload_folder", upload)):
        if hasattr(transformers.trainer, name):
            monkeypatch.setattr(transformers.trainer, name, one)
    return folder


@pytest.mark.habit("files: push_to_hub of a model", "the deltas saved")
def test_a_model_is_its_deltas_and_a_card(hub: Path) -> None:
    backbone = tiny("bert")
    backbone.config.name_or_path = "some/bert"
    model = stir(peftc.compile(backbone, peftc.load_spec("lora", r=3)))
    assert model.push_to_hub("me/deltas", private=True, tags=["mine"]) == "hub/me/deltas"
    there = hub / "me" / "deltas"
    assert {one.name for one in there.iterdir()} == {"peftc.json", "model.safetensors", "README.md"}
    card = ModelCard.load(there / "README.md")
    assert card.data.base_model == "some/bert" and {"peftc", "mine"} <= set(card.data.tags)
    assert 'peftc.load(snapshot_download("me/deltas"))' in card.content
    weights, whole = model.plan.parameters.weights, model.plan.parameters.backbone
    assert f"{weights:,} weights, {100 * weights / whole:.3f} %" in card.content
    assert "r = 3" in card.content
    inputs = batch(model)
    again = peftc.load(there, backbone=tiny("bert"))
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.habit("files: push_to_hub of a Trainer", "the deltas saved")
def test_a_trainer_pushes_deltas(hub: Path, tmp_path: Path) -> None:
    model = peftc.compile(tiny("bert"), "lora")
    arguments = TrainingArguments(
        str(tmp_path / "run"),
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="end",
        max_steps=1,
        use_cpu=True,
        report_to=[],
    )
    trainer = Trainer(model, arguments, train_dataset=Rows(model))
    trainer.train()
    trainer.push_to_hub(blocking=True)
    there = hub / "me" / "trained"
    assert (there / "README.md").is_file()
    inputs = batch(model)
    model.eval()
    assert torch.equal(
        logits(peftc.load(there, backbone=tiny("bert")), inputs), logits(model, inputs)
    )
