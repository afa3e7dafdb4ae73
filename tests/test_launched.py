"""`accelerate launch` with two processes: the losses of one, the same deltas on both, saved once and resumed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import overlay, tiny
from safetensors.torch import load_file

import peftc

SCRIPT = Path(__file__).parent / "launched.py"
# Without `--cpu`, which starts one process; the script says that it uses none but CPUs.
TWO = [
    "-m",
    "accelerate.commands.launch",
    "--multi_gpu",
    "--num_processes",
    "2",
    "--num_machines",
    "1",
]


@pytest.fixture(scope="module")
def deepspeed(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has DeepSpeed; made anew unless PEFTC_DEEPSPEED_PYTHON names one."""
    given = os.environ.get("PEFTC_DEEPSPEED_PYTHON")
    needs = ["hjson", "py-cpuinfo", "msgpack", "ninja", "einops", "psutil", "pydantic"]
    folder = tmp_path_factory.mktemp("deepspeed")
    return given or overlay(folder, "deepspeed==0.19.8", needs=needs)


def ran(folder: Path, how: str, *more: str, python: str = sys.executable) -> list[dict[str, Any]]:
    """What each process says."""
    launch = [] if how == "alone" else [*TWO, "--mixed_precision", "no", "--dynamo_backend", "no"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, *launch, str(SCRIPT), str(folder), how, *more]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(path.read_text()) for path in sorted(folder.glob("?.json"))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    (found,) = ran(tmp_path_factory.mktemp("alone"), "alone")
    return found


@pytest.mark.habit("processes: accelerate launch: DDP, FSDP2, DeepSpeed's ZeRO 3", "one process")
@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp", "zero"])
def test_two_processes_learn_what_one_learns(
    how: str, alone: dict[str, Any], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    python = request.getfixturevalue("deepspeed") if how == "zero" else sys.executable
    first, second = ran(tmp_path, how, python=python)
    assert first["processes"] == 2 and first["deltas"] == second["deltas"]
    assert (first["sharded"] > 0) is (how != "ddp")
    for key in ("losses", "norms"):  # float32: the batch's halves are summed apart
        assert first[key] == pytest.approx(alone[key], rel=1e-4)
    assert alone["losses"][-1] < alone["losses"][0]
    tensors = load_file(tmp_path / "deltas" / "model.safetensors")
    saved = {k.removeprefix("deltas."): v.double().sum().item() for k, v in tensors.items()}
    assert saved == pytest.approx(first["deltas"], abs=1e-6)
    peftc.load(tmp_path / "deltas", backbone=tiny("llama", num_hidden_layers=4))
    # Again from the half, as after a stop.
    for path in (tmp_path / "run").glob("checkpoint-4"):
        path.rename(tmp_path / "gone")
    again = ran(tmp_path, how, "--resume", python=python)
    assert again[0]["losses"][-2:] == pytest.approx(first["losses"][-2:], rel=1e-6)
    assert again[0]["deltas"] == pytest.approx(first["deltas"], rel=1e-6, abs=1e-7)
