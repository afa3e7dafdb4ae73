"""`peftc doctor`: what conflicts is an error with its fix, and a provider that is listed need not start."""

from __future__ import annotations

import json
import re

import onnxruntime
import pytest
import torch
from conftest import Run

from peftc.cli import doctor
from peftc.runtime import session


def test_a_healthy_machine(run: Run) -> None:
    code, out, _ = run("doctor", "--json")
    found = json.loads(out)
    assert (code, found["conflicts"]) == (0, [])
    assert found["versions"]["torch"] == torch.__version__
    assert found["providers"]["CPUExecutionProvider"]
    code, out, _ = run("doctor")
    assert code == 0
    assert f"{torch.get_num_threads()} threads" in out
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize(
    ("here", "message"),
    [
        ({"onnxruntime": "1.31.1", "onnxruntime-gpu": "1.31.1"}, "overwrite each other"),
        ({"transformers": "4.57.6"}, 'transformers 4.57.6 is not .*: pip install "transformers'),
    ],
)
def test_what_conflicts(
    here: dict[str, str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "versions", lambda _: here)
    code, out, error = run("doctor")
    assert code == 1
    assert re.search(message, error)
    assert "accelerate         not here: pip install accelerate" in out


def test_a_provider_that_does_not_start(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: listed)
    assert session.providers() == dict(zip(listed, (torch.cuda.is_available(), True)))
    if not torch.cuda.is_available():
        assert "CUDAExecutionProvider      is listed, and does not start" in run("doctor")[1]


def test_a_broken_runtime(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """What uninstalling one of two wheels leaves: a module without its functions."""
    monkeypatch.delattr(onnxruntime, "get_available_providers")
    code, _, error = run("doctor")
    assert code == 1
    assert "ONNX Runtime cannot be used here" in error
