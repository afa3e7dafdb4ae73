"""The sweep's own parts, and classes of transformers' registry drawn by the week."""

from __future__ import annotations

import datetime
import json
import random
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny

FOLDER = Path(__file__).parents[1] / "benchmarks"
sys.path.insert(0, str(FOLDER))

import sweep  # noqa: E402
from cells import METHODS, cell  # noqa: E402
from nature import Nature  # noqa: E402
from registry import Registered, registered, small  # noqa: E402

WEEK = "{0.year}-{0.week}".format(datetime.date.today().isocalendar())
KNOWN = {one["class"]: one for one in map(json.loads, sweep.RESULTS.read_text().splitlines())}
DRAWN = random.Random(WEEK).sample([name for name, one in sorted(KNOWN.items()) if "cells" in one], 24)


@pytest.mark.parametrize("name", DRAWN)
def test_a_class_is_as_in_the_table(name: str) -> None:
    """No worse than what is committed: what held holds."""
    one = next(one for one in registered() if one.name == name)
    found = sweep.done(one)["cells"]
    for method, was in KNOWN[name]["cells"].items():
        if was["outcome"] in ("holds", "no place"):
            assert found[method]["outcome"] == was["outcome"], found[method]
