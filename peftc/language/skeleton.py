"""The skeleton of a spec that `peftc new` writes: a line for each key of the language."""

from __future__ import annotations

import textwrap

from peftc.language.field import Field
from peftc.language.fields import FIELDS, TOP

WIDTH = 120


def skeleton(name: str) -> str:
    """A spec that compiles as it stands, its other keys as comments."""
    lines = ["# NAME: one line on what it is (authors, year, equation)"]
    for row in TOP:
        lines += _lines(row, "")
    for row in FIELDS:
        if row.name in ("train", "use"):  # deltas of their own
            lines += _lines(row, "  ", "- ")
        else:
            lines += _lines(row, "  " if row.name == "at" else "    ", "- " * (row.name == "at"))
    return "\n".join([*lines, ""]).replace("NAME", name)


def _lines(row: Field, indent: str, bullet: str = "") -> list[str]:
    """The sample of a key, with what it is for behind it, or above where that is long."""
    if not row.sample:
        return []
    mark, sample = ("# ", row.sample[2:]) if row.sample.startswith("# ") else ("", row.sample)
    first, *rest = sample.split("\n")
    said = "; ".join(one for one in (row.doc, row.more()) if one)
    line = f"{indent}{mark}{bullet}{first}"
    if not rest and len(f"{line}  # {said}") <= WIDTH:
        return [f"{line}  # {said}"]
    above = textwrap.wrap(
        said, WIDTH, initial_indent=f"{indent}# ", subsequent_indent=f"{indent}# "
    )
    return [*above, line, *(f"{indent}{one}" for one in rest)]
