"""bitsandbytes' weights of four bits, on its CPU kernels: the laws of quantised backbones, and what users load and train.

bitsandbytes is no dependency, so it runs in an environment of its own, over this one. The environment is made anew unless
PEFTC_BITSANDBYTES_PYTHON names a Python that has it.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import overlay

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has bitsandbytes."""
    given = os.environ.get("PEFTC_BITSANDBYTES_PYTHON")
    return given or overlay(tmp_path_factory.mktemp("bitsandbytes"), "bitsandbytes==0.50.2")


@pytest.mark.habit(
    "models: bitsandbytes' nf4 and fp4", "its own modules, the dequantised model, PEFT's LoRA"
)
@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        (["test_quantized.py", "-m", "slow or not slow", "-k", "nf4 or fp4"], 42),
        (["four_bits.py"], 17),
    ],
    ids=["laws", "models"],
)
def test_there(python: str, arguments: list[str], count: int) -> None:
    done = subprocess.run(
        [python, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=HERE,
        env=os.environ | {"PYTHONPATH": str(HERE.parent), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(rf"\b{count} passed", done.stdout), done.stdout[-4000:]
