"""`make bundles` at toy size: every row has its figures, whatever they are."""

from __future__ import annotations

import json
from pathlib import Path

import bundles
import pytest


@pytest.mark.slow
def test_every_row(tmp_path: Path) -> None:
    """It asserts itself that tokens are equal."""
    file = tmp_path / "bundles.json"
    bundles.main(["--size", "toy", "--pairs", "2", "--seconds", "0.1", "--out", str(file)])
    rows = json.loads(file.read_text())["rows"]
    exports = {name: row for name, row in rows.items() if ": bundle " in name}
    assert len(exports) == 4 and len(rows) == 10
    for row in exports.values():
        assert row["seconds"] > row["exporters alone"] > 0 and row["certificate"] > 0
        assert row["writing peak"] > row["stored"] > 0
    for name in rows.keys() - exports.keys():
        low, high = rows[name]["interval"]
        assert 0 < low <= rows[name]["ratio"] <= high
