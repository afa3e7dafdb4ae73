"""Rows of texts to answer, from a file; needs no library."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError


def read_rows(path: Path, columns: Sequence[str]) -> list[Mapping[str, Any]]:
    """Rows of a .jsonl or .csv file. Raises PeftcError naming the line that lacks a column."""
    if not path.is_file():
        raise PeftcError(f"there is no data file {path}")
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            rows: list[Mapping[str, Any]] = (
                list(csv.DictReader(lines))
                if path.suffix == ".csv"
                else [json.loads(line) for line in lines if line.strip()]
            )
        except (ValueError, csv.Error) as error:
            raise PeftcError(f"{path} is neither JSON lines nor CSV: {error}") from error
    if not rows:
        raise PeftcError(f"{path} has no rows")
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
        if missing:
            raise PeftcError(f"{path}, row {number}: no column '{missing[0]}'")
    return rows
