"""Backbones: what is said where `--model` names none, or one that cannot be read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run
from safetensors.torch import save_file

from peftc.language import resolved
from peftc.language.reader import load_spec
from peftc.model import backbones


def settled(**changes: object) -> Callable[[Path], object]:
    """The configuration of a folder, with other settings."""

    def change(path: Path) -> None:
        file = path / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return change


def cut(path: Path) -> None:
    file = path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])


def swapped(path: Path) -> None:
    save_file({"x": torch.zeros(1)}, path / "model.safetensors", metadata={"format": "pt"})


# What becomes of a folder, how what is said starts, and how it ends.
FOLDERS: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "no JSON": (
        lambda path: (path / "config.json").write_text("{"),
        "{path}/config.json cannot be read: ",
        " is not a valid JSON file",
    ),
    "a word as a size": (
        settled(hidden_size="wide"),
        "{path}/config.json cannot be read: ",
        "Field 'hidden_size' expected int, got str (value: 'wide')",
    ),
    "a class of another time": (
        settled(architectures=["BertForNothing"]),
        "'{path}' is a BertForNothing, which ",
        "transformers does not have",
    ),
    "cut": (cut, "the model in {path} cannot be read: ", "incomplete metadata, file not fully covered"),
    "other tensors": (
        swapped,
        "'{path}' lacks 41 of the 41 tensors of ",
        "a BertForSequenceClassification",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FOLDERS)
def test_a_folder_that_cannot_be_read(case: str, run: Run, folder: Path, tmp_path: Path) -> None:
    path = Path(shutil.copytree(folder, tmp_path / "model"))
    spoil, start, end = FOLDERS[case]
    spoil(path)
    code, _, err = run("compile", "lora", "-m", path, "--no-save")
    said = err.splitlines()[-1]
    assert code == 1 and "Traceback" not in err
    assert said.startswith("error: " + start.format(path=path)) and said.endswith(end)


def test_a_name_that_no_configuration_has(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backbones, "_hub_refusal", lambda name: "the hub cannot be reached")
    code, _, err = run("plan", "lora", "-m", "facebook/bart-lage", "--random-weights")
    names = ", ".join(backbones.shipped())
    assert code == 1
    assert err.splitlines()[-1] == (
        "error: no configuration of 'facebook/bart-lage': it is no local folder, not in the cache, and the hub cannot "
        f"be reached; shipped are {names}; did you mean 'facebook/bart-large'?"
    )


@pytest.mark.parametrize(
    ("cls", "config", "message"),
    [
        ("BertForNothing", {}, "'{path}' is a BertForNothing, which transformers does not have"),
        (
            "BertForSequenceClassification",
            {"hidden_size": "wide"},
            "'{path}' has no configuration of a BertForSequenceClassification: ",
        ),
    ],
    ids=("class", "size"),
)
def test_a_bundle_of_another_transformers(
    cls: str, config: dict[str, object], message: str, run: Run, tmp_path: Path
) -> None:
    path = tmp_path / "bundle"
    path.mkdir()
    manifest = {"format": 2, "kind": "x", "graphs": {}, "parity": [], "data_bytes": 0}
    spec = resolved.write(load_spec("lora"))
    record = {"spec": spec, "class": cls, "config": config, "outcomes": [], "nodes": {}}
    (path / "peftc.json").write_text(json.dumps(manifest))
    (path / "report.json").write_text(json.dumps(record))
    (path / "model.onnx").write_text("")
    code, _, err = run("report", path, "-o", tmp_path / "out")
    assert code == 1 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("error: " + message.format(path=path))
    assert not (tmp_path / "out").exists()
