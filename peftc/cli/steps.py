"""The table of what a training step saves for backward: sites of deltas first, then the rest of the model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from itertools import groupby
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.saved import Row, Saved

MIB = 1 << 20
Line = tuple[str, int, int]  # a place, how often it is there, the bytes of each


def data(saved: Saved) -> dict[str, Any]:
    """What is saved as data for `--json`, in bytes."""
    return {**asdict(saved), "bytes": saved.bytes}


def render(saved: Saved) -> RenderableType:
    """Equal places of several layers in one line, in MiB, and the sum of all."""
    tokens = "" if saved.length is None else f" x {saved.length} tokens"
    title = (
        f"\nsaved for backward: {saved.batch}{tokens or ' rows'}, {saved.dtype} on {saved.device}"
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("place", overflow="fold")
    for name in ("", "MiB each", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    for place, count, size in lines(saved.rows):
        many = f"x {count}" if count > 1 else ""
        table.add_row(Text(place), many, _mib(size) if many else "", _mib(count * size))
    table.add_row(Text("total", style="bold"), "", "", _mib(saved.bytes))
    return Group(Text(title, style="bold"), "", table)


def _mib(size: int) -> str:
    return f"{size / MIB:,.2f}"


def lines(rows: Sequence[Row]) -> Iterator[Line]:
    """Rows as lines; what is of one kind and saves as much is one."""
    places: dict[tuple[str, str], dict[int, list[int | None]]] = {}
    sites = [(*_site(row), row.layer, row.bytes) for row in rows if row.method]
    for before, after, layer, size in [*sites, *_modules(rows)]:
        places.setdefault((before, after), {}).setdefault(size, []).append(layer)
    for (before, after), sizes in places.items():
        for size, layers in sizes.items():
            yield f"{before}{_span(layers)}{after}", len(layers), size


def _site(row: Row) -> tuple[str, str]:
    """What stands before the layers of a site, and what behind them."""
    if not row.at:
        return f"{row.method}, shared by its sites", ""
    where = f"{row.method} at {row.at}, {row.group.replace('_', ' ')}"
    return (where, "") if row.layer is None else (f"{where}, layers ", "")


def _modules(rows: Sequence[Row]) -> Iterator[tuple[str, str, int | None, int]]:
    """The backbone's own code by the parts of its layers, and by its parts outside of these."""
    sums: dict[tuple[str, str, int | None], int] = {}
    for row in rows:
        if not row.method:
            place = (*_part(row), row.layer)
            sums[place] = sums.get(place, 0) + row.bytes
    return ((*place, size) for place, size in sums.items())


def _part(row: Row) -> tuple[str, str]:
    """`bert.encoder.layer.` and `.attention` of what is below it, `bert.embeddings` of what is below that."""
    if row.layer is None:
        return ".".join(row.scope.split(".")[:2]) or "the model's own code and loss", ""
    before, after = re.split(rf"(?<=\.){row.layer}(?=\.|$)", f".{row.scope}", maxsplit=1)
    return before[1:], ".".join(after.split(".")[:2])


def _span(layers: Sequence[int | None]) -> str:
    """`0-5,11` of these layers; nothing of what is in none."""
    numbers = sorted({one for one in layers if one is not None})
    runs = groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    found = [[number for _, number in run] for _, run in runs]
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found)
