"""The design table: a plan in the four dimensions of He et al. (2022), as data and as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.plan.design import Row, paper_percent, rows
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan


def data(plan: Plan) -> dict[str, Any]:
    """The plan as data for `--json`."""
    return {
        "spec": plan.spec.name,
        "sites": plan.site_counts,
        "parameters": asdict(plan.parameters),
        "quantized": asdict(plan.quantized),
        "methods": [asdict(row) for row in rows(plan)],
        "matches": [
            {
                "method": m.entry.method,
                "at": m.entry.at,
                "sites": m.sites,
                "parameters": m.parameters,
            }
            for m in plan.matches
        ],
        "edits": [_edit_data(edit) for edit in plan.edits],
        "unfrozen": [{"path": one.path, "parameters": one.numel} for one in plan.unfrozen],
        "misses": [asdict(miss) for miss in plan.misses],
    }


def _edit_data(edit: Edit) -> dict[str, Any]:
    site = edit.site
    return {
        "method": edit.entry.method,
        "site": site.name,
        "at": site.at,
        "stack": site.stack,
        "kind": site.kind,
        "layer": site.layer,
        "parameters": [
            {"name": p.name, "path": p.path, "shape": list(p.shape), "trainable": p.trainable}
            for p in edit.parameters
        ],
    }


def render(plan: Plan, width: int) -> RenderableType:
    """The design table, the totals and the misses; methods become blocks where columns would not fit."""
    name, title = plan.spec.name, plan.spec.title
    title = f"{name}: {title}" if title and "+" not in name else name
    found = rows(plan)
    design = [_wide(found), ""] if width >= WIDE else [_block(row) for row in found]
    return Group(Text(title, style="bold"), "", *design, _totals(plan), *_misses(plan))


WIDE = 120  # columns that a table of formulas needs


def _wide(found: Sequence[Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 1, 0), header_style="bold")
    for name in _cells(found[0]):
        number = name in ("sites", "parameters", "stored")
        table.add_column(
            name, justify="right" if number else "left", no_wrap=number or name == "method"
        )
    for row in found:
        table.add_row(*_cells(row).values())
    return table


def _block(row: Row) -> RenderableType:
    cells = _cells(row)
    table = _grid()
    for name, value in cells.items():
        table.add_row(name, Text(value, style="bold" if name == "method" else ""))
    return Group(table, "")


def _cells(row: Row) -> dict[str, str]:
    return {
        key.replace("_", " "): f"{value:,}" if isinstance(value, int) else value.replace("; ", "\n")
        for key, value in asdict(row).items()
    }


def _grid() -> Table:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column()
    return table


def _totals(plan: Plan) -> Table:
    counts = plan.parameters
    whole = counts.backbone
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_column(justify="right", no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    table.add_column()
    small = plan.quantized
    held = f"quantised, in {small.bytes:,} bytes: {small.bits:.3g} bits each"
    paper = f"{paper_percent(counts.weights, whole)} % as the paper prints it; no biases"
    for name, count, note in (
        ("weights", counts.weights, paper),
        ("stored", counts.stored, "with biases, constants evaluated"),
        ("while training", counts.training, "all that trains"),
        ("backbone", whole, ""),
        *([("of it", small.numel, held)] if small.numel else []),
    ):
        table.add_row(name, f"{count:,}", f"{100 * count / whole:.2f} %", note)
    return table


def _misses(plan: Plan) -> Iterator[RenderableType]:
    groups: dict[tuple[str, str], list[str]] = {}
    for miss in plan.misses:
        groups.setdefault((miss.entry, miss.reason), []).append(miss.site)
    for (entry, reason), sites in groups.items():
        yield Text(f"\n{entry} leaves {len(sites)} alone: {reason}", style="yellow")
        yield Text("  " + ", ".join(sites))


def site_list(plan: Plan) -> RenderableType:
    """Every edit with the shapes of its tensors, every parameter that is unfrozen."""
    lines = [""]
    for edit in plan.edits:
        lines.append(edit.name)
        lines += [f"    {p.name} {list(p.shape)}" for p in edit.parameters]
    lines += [f"{one.path} {one.numel:,}" for one in plan.unfrozen]
    return Text("\n".join(lines))
