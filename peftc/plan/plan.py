"""The Plan: Spec x Program, decided and checked before the graph is touched. Pure data."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import prod

from peftc.errors import PeftcError, suggest
from peftc.graph.facts import Stacks
from peftc.graph.program import Program
from peftc.graph.rows import Room
from peftc.language import expr as ex
from peftc.language.ports import SITES
from peftc.language.spec import FORMULA, Entry, Param, Spec
from peftc.plan.algebra import grown, inlined
from peftc.plan.checks import behind_rows, check
from peftc.plan.counts import Counts, Unfrozen, count, numel
from peftc.plan.edit import Edit, Parameter
from peftc.sites.site import Site, find_sites
from peftc.sites.unreached import unreached


class PlanError(PeftcError):
    """A spec that does not fit this model: one line for each problem."""


@dataclass(frozen=True)
class Miss:
    """A site that an entry named and that is left alone, and why."""

    entry: str
    site: str
    reason: str


@dataclass(frozen=True)
class Match:
    """How many sites an entry of the spec found."""

    entry: Entry
    sites: int
    parameters: int


@dataclass(frozen=True)
class Plan:
    """What a spec does to a model. `matches` has one row for each entry of the spec."""

    spec: Spec
    edits: tuple[Edit, ...]
    unfrozen: tuple[Unfrozen, ...]
    misses: tuple[Miss, ...]
    matches: tuple[Match, ...]
    parameters: Counts
    sites: tuple[Site, ...] = field(repr=False)

    @property
    def site_counts(self) -> dict[str, int]:
        """How many sites of each kind the edits touch; a part (`attention.q`) counts as its whole."""
        counts: dict[str, set[str]] = {}
        for edit in self.edits:
            counts.setdefault(edit.site.at.partition(".")[0], set()).add(edit.site.scope)
        return {kind: len(scopes) for kind, scopes in counts.items()}

    @cached_property
    def room(self) -> Room:
        """What the edits put in front of sequences."""
        rows: dict[str, int] = {}
        shifts: dict[str, int] = {}
        for edit in self.edits:
            for port, expression in inlined(edit)[1].items():
                count = grown(expression, edit)
                if count and edit.site.at == "embedding":
                    rows[edit.site.anchors["ids"]] = count
                elif port == "k" and edit.entry.positions == "shift":
                    shifts[edit.site.name] = shifts.get(edit.site.name, 0) + count
        return Room(rows, max(shifts.values(), default=0))


@dataclass(frozen=True)
class Survey:
    """What a model has to offer: its sites, and for each op the weights out of reach with the reason."""

    sites: tuple[Site, ...]
    unreached: Mapping[str, Mapping[str, str]]

    @staticmethod
    def of(program: Program, stacks: Stacks) -> Survey:
        return Survey(find_sites(program, stacks), unreached(program))


def make_plan(spec: Spec, survey: Survey, backbone: Mapping[str, tuple[int, ...]]) -> Plan:
    """Match every entry of `spec` to the sites of a model.

    `backbone` is the shape of each parameter by its canonical path. Raises PlanError with every
    problem: an entry without a site, a broken `expect`, shapes that do not fit.
    """
    sites = survey.sites
    problems: list[str] = []
    edits: list[Edit] = []
    unfrozen: dict[str, Unfrozen] = {}
    misses: list[Miss] = []
    matches: list[Match] = []
    taken: set[str] = set()
    first = "encoder" if any(site.stack == "encoder" for site in sites) else "decoder"
    for index, entry in enumerate(spec.entries):
        chosen = [site for site in sites if _selects(entry, site, first)]
        if entry.train:
            found = list(_unfrozen(entry, chosen, backbone))
            unfrozen |= {one.path: one for one in found}
            matches.append(Match(entry, len(found), sum(one.numel for one in found)))
            problems += _unmatched(entry, len(found), sites)
            continue
        placed, missed, broken = _edits(entry, entry.method, chosen)
        if taken & _paths(placed):  # the same method twice at one site
            placed, missed, broken = _edits(entry, f"{entry.method}_{index}", chosen)
        taken |= _paths(placed)
        passed = list(_passed_by(entry, survey.unreached))
        problems += broken or _unmatched(entry, len(placed), sites, [*missed, *passed])
        edits += placed
        misses += [*missed, *passed]
        matches.append(Match(entry, len(placed), numel(placed)))
    problems += behind_rows(edits)
    if problems:
        raise PlanError("\n".join(problems))
    counts = count(edits, list(unfrozen.values()), backbone)
    return Plan(
        spec, tuple(edits), tuple(unfrozen.values()), tuple(misses), tuple(matches), counts, sites
    )


def _selects(entry: Entry, site: Site, first: str) -> bool:
    where, stack = entry.where, entry.where.stack
    return (
        site.at == entry.at
        and (entry.scope is None or fnmatch.fnmatchcase(site.scope, entry.scope))
        and (stack is None or (first if stack == "first" else stack) == site.stack)
        and (where.kind is None or where.kind == site.kind)
        and (where.layers is None or site.layer in where.layers)
    )


def _unfrozen(
    entry: Entry, sites: Sequence[Site], backbone: Mapping[str, tuple[int, ...]]
) -> Iterator[Unfrozen]:
    """Parameters by the last component of their name (never by substring), of the chosen sites if any."""
    owners = {owner for site in sites for owner in _owners(site)}
    for path, shape in backbone.items():
        owner, _, last = path.rpartition(".")
        if last not in entry.train:
            continue
        if entry.at and owner not in owners:
            continue
        if entry.scope and not entry.at and not fnmatch.fnmatchcase(owner, entry.scope):
            continue
        yield Unfrozen(path, prod(shape), entry.at)


def _owners(site: Site) -> set[str]:
    """The modules whose parameters a site is made of; a slice of a fused one has none to itself."""
    if site.columns is not None:
        return set()
    return {path.rpartition(".")[0] for path in site.weights}


def _passed_by(entry: Entry, unreached: Mapping[str, Mapping[str, str]]) -> Iterator[Miss]:
    """Weights that an entry means and no op of its kind reads (experts, fused kernels, weight norm)."""
    op = "linear" if entry.at.startswith("ffn") else entry.at
    for path, reason in unreached.get(op, {}).items():
        if entry.scope is None or fnmatch.fnmatchcase(path.rpartition(".")[0], entry.scope):
            yield Miss(entry.method, path, reason)


def _unmatched(
    entry: Entry, count: int, sites: Sequence[Site], missed: Sequence[Miss] = ()
) -> list[str]:
    what = f"'{entry.at or ', '.join(entry.train)}' of {entry.method}"
    if entry.expect is not None and count != entry.expect:
        return [f"{entry.place}: {what} matches {count} sites, expect: {entry.expect}"]
    if count:
        return []
    if missed:
        first = f"{missed[0].site}: {missed[0].reason}"
        return [f"{entry.place}: {what} fits no site of this model ({len(missed)} missed); {first}"]
    return [f"{entry.place}: {what} matches no site of this model; {_advice(entry, sites)}"]


def _advice(entry: Entry, sites: Sequence[Site]) -> str:
    kinds: dict[str, int] = {}
    for site in sites:
        kinds[site.at] = kinds.get(site.at, 0) + 1
    same = [site for site in sites if site.at == entry.at]
    if same and entry.train:
        fused = any(site.columns is not None for site in same)
        reason = "it is a slice of a fused projection" if fused else "none has a parameter so named"
        return f"it has {len(same)} places but {reason}"
    if same:
        stacks = sorted(
            {f"stack: {s.stack}" + (f", kind: {s.kind}" if s.kind else "") for s in same}
        )
        layers = sorted({s.layer for s in same if s.layer is not None})
        span = f"; layers {layers[0]}-{layers[-1]}" if layers else ""
        scopes = "" if entry.scope is None else f"; scopes such as {same[0].scope}"
        return f"without `where` it has {len(same)}: " + " | ".join(stacks) + span + scopes
    if entry.train and not entry.at:
        return "no parameter's name ends so"
    found = ", ".join(f"{kind} ({n})" for kind, n in sorted(kinds.items()))
    return (suggest(entry.at, kinds) + " " if suggest(entry.at, kinds) else "") + f"found: {found}"


def _edits(
    entry: Entry, label: str, sites: Sequence[Site]
) -> tuple[list[Edit], list[Miss], list[str]]:
    placed: list[Edit] = []
    missed: list[Miss] = []
    problems: dict[str, str] = {}
    shared: dict[str, tuple[int, ...]] = {}
    for site in sites:
        reason = _unfit(entry, site)
        if reason:
            missed.append(Miss(entry.method, site.name, reason))
            continue
        try:
            path = f"{site.scope}.{site.at.replace('.', '_')}.{label}"
            edit = Edit(
                site, entry, path, tuple(_parameter(p, site, entry, label) for p in entry.params)
            )
            check(edit)
        except ex.ExprError as error:
            problems.setdefault(error.fact, f"{entry.place}: at {site.name}: {error.fact}")
            continue
        for parameter in edit.parameters:
            if shared.setdefault(parameter.path, parameter.shape) != parameter.shape:
                problems[parameter.path] = (
                    f"{entry.place}: parameter '{parameter.name}' is shared by sites of different shapes: "
                    f"{list(shared[parameter.path])} and {list(parameter.shape)} (at {site.name})"
                )
        placed.append(edit)
    return placed, missed, list(problems.values())


def _unfit(entry: Entry, site: Site) -> str:
    ports = {port for port, _ in entry.assign}
    used = {name for _, expression in (*entry.let, *entry.assign) for name in ex.names(expression)}
    if site.shared and ports & {"W", "b"}:
        return f"'{site.shared}' reads this weight too"
    if site.columns is not None and "x" in ports:
        return "the input of a fused projection is read by its other parts too"
    if "b" in (ports | used) and "b" in SITES[entry.at].ports and "b" not in site.anchors:
        return "this convolution has no bias" if entry.at == "conv" else "this linear has no bias"
    return ""


def _paths(edits: Iterable[Edit]) -> set[str]:
    return {p.path for edit in edits for p in edit.parameters}


def _parameter(param: Param, site: Site, entry: Entry, label: str) -> Parameter:
    sizes = {**entry.arguments, **site.dims}
    shape = tuple(_size(dim, sizes, param) for dim in param.shape)
    group = {
        "site": f"{site.scope}.{site.at.replace('.', '_')}",
        "kind": f"shared.{site.group}",
        "shape": "shared." + "x".join(map(str, shape)),
        "model": "shared.model",
    }[param.per]
    path = f"{group}.{label}.{param.name}"
    if param.init.name == FORMULA:
        values = {name: ex.Number(value) for name, value in sizes.items()}
        formula = ex.substitute(param.init.args[0], values)
        return Parameter(param.name, path, shape, FORMULA, (), param.trainable, formula)
    args = tuple(float(ex.number(arg, sizes)) for arg in param.init.args)
    return Parameter(param.name, path, shape, param.init.name, args, param.trainable)


def _size(dim: ex.Expr, sizes: Mapping[str, float | int], param: Param) -> int:
    size = ex.number(dim, sizes)
    if size != int(size) or size < 0:
        raise ex.ExprError(0, f"'{param.name}' has a size of {size} ({ex.show(dim)})", "")
    return int(size)
