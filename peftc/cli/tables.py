"""The design table: a plan in the four dimensions of He et al. (2022), as data and as text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from peftc.language import expr as ex
from peftc.language.spec import Entry, Where
from peftc.plan.algebra import constant_form
from peftc.plan.counts import numel
from peftc.plan.edit import Edit
from peftc.plan.plan import Match, Plan

# The composition of a prepended prefix, from section 3.1 of the paper.
GATED = "(1 - λ) h + λ Δh"
# What an expression reads of its site decides its insertion form.
_INPUTS = {"x", "input", "q", "k", "v"}
_WEIGHTS = {"W", "b"}


@dataclass(frozen=True)
class Row:
    """One method of a plan. `parameters` is what trains, `stored` what is left after constant folding."""

    method: str
    functional_form: str
    modified_representation: str
    insertion: str
    composition: str
    sites: int
    parameters: int
    stored: int


def rows(plan: Plan) -> tuple[Row, ...]:
    """One row for each method; entries that differ in their place alone share a row."""
    groups: dict[tuple[str, ...], dict[int, Match]] = {}
    for index, match in enumerate(plan.matches):
        entry = match.entry
        key = (entry.method, form(entry), insertion(entry), composition(entry))
        if match.sites:  # else all of it folded
            groups.setdefault(key, {})[index] = match
    return tuple(_row(key, matches, plan) for key, matches in groups.items())


def _row(key: tuple[str, ...], numbered: Mapping[int, Match], plan: Plan) -> Row:
    method, functional, inserted, composed = key
    matches = numbered.values()
    places = dict.fromkeys(place(match.entry) for match in matches)
    trained = [match for match in matches if match.entry.train]
    edits = [edit for edit in plan.edits if edit.index in numbered]
    free = sum(match.parameters for match in trained)
    return Row(
        method,
        functional,
        "; ".join(places),
        inserted,
        composed,
        sum(match.sites for match in matches),
        free + numel(edits),
        free + numel(constant_form(edit) for edit in edits),
    )


def form(entry: Entry) -> str:
    """The functional form as the spec writes it, with the names it defines."""
    if entry.train:
        return f"train {', '.join(entry.train)}"
    lets = [f"{name} = {ex.show(one)}" for name, one in entry.let]
    if entry.delta is not None:
        return "; ".join([ex.show(entry.delta), *lets])
    return "; ".join([*(f"{port} = {ex.show(one)}" for port, one in entry.assign), *lets])


def place(entry: Entry) -> str:
    """The modified representation: `at` and what `where` narrows it to."""
    at = entry.at or "every parameter so named"
    return at + "".join(f", {one}" for one in _narrowed(entry.where, entry.scope))


def _narrowed(where: Where, scope: str | None) -> Iterator[str]:
    if where.stack:
        yield where.stack
    if where.kind:
        yield where.kind
    if where.layers is not None:
        yield "layers " + ",".join(map(str, where.layers))
    if scope:
        yield scope


def insertion(entry: Entry) -> str:
    """Parallel when the delta reads the input, sequential when it reads `h` alone."""
    if entry.train:
        return "in place"
    if _prepends(entry):
        return "prepended"
    if _WEIGHTS & {port for port, _ in entry.assign}:
        return "reparametrised"
    read = _read(entry)
    if read & _INPUTS:
        return "parallel"
    return "sequential" if "h" in read else "constant"


def _prepends(entry: Entry) -> bool:
    return any(isinstance(one, ex.Call) and one.op == "prepend" for _, one in entry.assign)


def _read(entry: Entry) -> set[str]:
    """The names behind the delta, through `let`."""
    lets = dict(entry.let)
    main = [entry.delta] if entry.delta is not None else [one for _, one in entry.assign]
    queue = [name for one in main for name in ex.names(one)]
    found: set[str] = set()
    while queue:
        name = queue.pop()
        if name not in found:
            found.add(name)
            queue += ex.names(lets[name]) if name in lets else ()
    return found


def composition(entry: Entry) -> str:
    """How the delta joins what was there."""
    if entry.train:
        return "in place"
    ports = [port for port, _ in entry.assign]
    if _prepends(entry):
        return GATED if {"k", "v"} <= set(ports) else "prepended to " + ", ".join(ports)
    if entry.compose is not None:
        return ex.show(entry.compose)
    if entry.delta is not None:
        return "h + delta"
    return "replaces " + ", ".join(ports)


def paper_percent(part: int, whole: int) -> float:
    """Percent cut (not rounded) to one decimal, as the paper's tables print it."""
    return math.floor(1000 * part / whole) / 10


def data(plan: Plan) -> dict[str, Any]:
    """The plan as data for `--json`."""
    return {
        "spec": plan.spec.name,
        "sites": plan.site_counts,
        "parameters": asdict(plan.parameters),
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
    paper = f"{paper_percent(counts.weights, whole)} % as the paper prints it; no biases"
    for name, count, note in (
        ("weights", counts.weights, paper),
        ("stored", counts.stored, "with biases, constants evaluated"),
        ("while training", counts.training, "all that trains"),
        ("backbone", whole, ""),
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
