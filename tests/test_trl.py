"""trl's trainers on a compiled model, beside PEFT's model of the same weights: the same numbers at each step.

trl is no dependency, so it runs in an environment of its own, over this one (trl_oracle.py). The environment is made
anew unless PEFTC_TRL_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
from conftest import overlay

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has trl."""
    given = os.environ.get("PEFTC_TRL_PYTHON")
    return given or overlay(tmp_path_factory.mktemp("trl"), "trl==1.16.0", needs=["datasets"])


@pytest.fixture(scope="module")
def said(python: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What each trainer logged, of each model."""
    last = ran(python, HERE / "trl_oracle.py", tmp_path_factory.mktemp("runs"))
    found: dict[str, Any] = json.loads(last)
    return found


def ran(python: str, *command: Path) -> str:
    """The last line that a script prints."""
    path = {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [python, "-W", "ignore", *command],
        env=os.environ | path,
        check=True,
        capture_output=True,
        text=True,
    )
    return run.stdout.splitlines()[-1]


@pytest.mark.habit(
    "training: trl's SFTTrainer; DPOTrainer with ref_model=model.backbone",
    "PEFT's model, losses, norms, rewards",
)
@pytest.mark.parametrize("trainer", ["sft", "dpo"])
def test_as_peft(said: dict[str, Any], trainer: str) -> None:
    """Losses, norms, entropies, rewards: dropout too. Sums in another order move the last bit of some."""
    theirs, ours = (said[trainer][side] for side in ("peft", "ours"))
    assert len(theirs) == len(ours) > 6
    for one, other in zip(theirs, ours, strict=True):
        assert other == pytest.approx(one, rel=1e-6, abs=1e-6)
    assert len({one["loss"] for one in ours if "loss" in one}) == 6


def test_a_reference_has_a_mode_of_its_own(said: dict[str, Any]) -> None:
    assert said["modes"] == {"model": True, "reference": False}


def test_the_example(python: str) -> None:
    assert ran(python, HERE.parent / "examples" / "dpo.py").endswith("accuracy 1.00")
