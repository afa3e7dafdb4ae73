"""The design of a method: its place in the four dimensions of He et al. (2022), derived from its formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from peftc.language import expr as ex
from peftc.language.ports import INPUT, KEYS, QUERIES, RESULT, SITES, STORED, VALUES
from peftc.language.spec import Entry, Where
from peftc.plan.algebra import constant_form
from peftc.plan.counts import numel
from peftc.plan.plan import Match, Plan

# The composition of a prepended prefix, from section 3.1 of the paper.
GATED = "(1 - λ) h + λ Δh"
# A delta that reads one of these does not wait for what the site computes.
_INPUTS = (INPUT, QUERIES, KEYS, VALUES)


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
    """One row for each method that changes something; entries that differ in their place alone share a row."""
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
    edits = [edit for edit in plan.edits if edit.index in numbered]
    free = sum(match.parameters for match in matches if match.entry.train)
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
    if where.experts is not None:
        yield "experts " + ",".join(map(str, where.experts))
    if scope:
        yield scope


def insertion(entry: Entry) -> str:
    """Parallel when the delta reads an input, sequential when it reads the result alone."""
    if entry.train:
        return "in place"
    if _prepends(entry):
        return "prepended"
    if {port for port, _ in entry.assign} & _ports(entry, *STORED):
        return "reparametrised"
    read = _read(entry)
    if read & _ports(entry, *_INPUTS):
        return "parallel"
    return "sequential" if read & _ports(entry, RESULT) else "constant"


def _ports(entry: Entry, *roles: str) -> set[str]:
    return set(SITES[entry.at].having(*roles))


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
        gated = _ports(entry, KEYS, VALUES) and _ports(entry, KEYS, VALUES) <= set(ports)
        return GATED if gated else "prepended to " + ", ".join(ports)
    if entry.compose is not None:
        return ex.show(entry.compose)
    if entry.delta is not None:
        return "h + delta"
    return "replaces " + ", ".join(ports)


def paper_percent(part: int, whole: int) -> float:
    """Percent cut (not rounded) to one decimal, as the paper's tables print it."""
    return math.floor(1000 * part / whole) / 10
