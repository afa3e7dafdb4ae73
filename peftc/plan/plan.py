"""The Plan: Spec x Program, decided and checked before the graph is touched. Pure data."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby
from math import prod
from types import MappingProxyType

from peftc.errors import PeftcError, suggest
from peftc.graph.rows import Room
from peftc.language import expr as ex
from peftc.language.ports import INPUT, SITES, STORED
from peftc.language.spec import FORMULA, Entry, Param, Spec
from peftc.language.where import OF_TEXT
from peftc.plan.algebra import growth
from peftc.plan.checks import behind_rows, check
from peftc.plan.counts import NONE, Counts, Quantized, Unfrozen, count, numel
from peftc.plan.edit import Edit, Parameter
from peftc.sites.kinds import Survey
from peftc.sites.site import NoSite, Site


class PlanError(PeftcError):
    """A spec that does not fit this model: one line for each problem."""


@dataclass(frozen=True)
class Miss:
    """A site, or what looks like one, that an entry named and that is left alone, and why."""

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
    quantized: Quantized = NONE

    @property
    def site_counts(self) -> dict[str, int]:
        """How many sites of each kind the edits touch; a part (`attention.q`) counts as its whole."""
        counts: dict[str, set[str]] = {}
        for edit in self.edits:
            counts.setdefault(edit.site.at.partition(".")[0], set()).add(edit.site.scope)
        return {kind: len(scopes) for kind, scopes in counts.items()}

    @cached_property
    def penalized(self) -> bool:
        """Whether an edit adds to the loss in training."""
        return any(edit.entry.penalty is not None for edit in self.edits)

    @property
    def tensors(self) -> dict[str, Parameter]:
        """The tensors of the deltas by their paths, shared ones once."""
        return {one.path: one for edit in self.edits for one in edit.parameters}

    @cached_property
    def room(self) -> Room:
        """What the edits put in front of sequences."""
        rows: dict[str, int] = {}
        shifts: dict[str, int] = {}
        for edit in self.edits:
            for what, length in growth(edit).items():
                if what == "tokens":
                    rows[edit.site.ids] = length
                elif edit.entry.positions == "shift":
                    shifts[edit.site.name] = shifts.get(edit.site.name, 0) + length
        return Room(rows, max(shifts.values(), default=0))


def make_plan(
    spec: Spec,
    survey: Survey,
    backbone: Mapping[str, tuple[int, ...]],
    quantized: Mapping[str, int] = MappingProxyType({}),
) -> Plan:
    """Match every entry of `spec` to the sites of a model.

    `backbone` is the shape of each parameter by its canonical path, `quantized` the bytes of those that are held as
    whole numbers. Raises PlanError with every problem: an entry without a site, a broken `expect`, shapes that do not
    fit, a quantised parameter that would train.
    """
    sites = survey.sites
    problems: list[str] = []
    edits: list[Edit] = []
    unfrozen: dict[str, Unfrozen] = {}
    misses: list[Miss] = []
    matches: list[Match] = []
    chosen = [_chosen(entry, survey) for entry in spec.entries]
    for index, (entry, placed) in enumerate(zip(spec.entries, _placed(spec, chosen), strict=True)):
        if entry.train:
            made = _unfrozen(entry, chosen[index], backbone)
            found = [replace(one, index=index) for one in made]
            unfrozen |= {one.path: one for one in found}
            matches.append(Match(entry, len(found), sum(one.numel for one in found)))
            problems += _unmatched(entry, len(found), sites)
            problems += _untrainable(entry, [one.path for one in found if one.path in quantized])
            continue
        missed = [*placed.misses, *_passed_by(entry, survey.none)]
        problems += placed.problems or _unmatched(entry, len(placed.edits), sites, missed)
        edits += [replace(edit, index=index) for edit in placed.edits]
        misses += missed
        matches.append(Match(entry, len(placed.edits), numel(placed.edits)))
    problems += behind_rows(edits)
    if problems:
        raise PlanError("\n".join(problems))
    return Plan(
        spec,
        tuple(edits),
        tuple(unfrozen.values()),
        tuple(misses),
        tuple(matches),
        count(edits, list(unfrozen.values()), backbone),
        sites,
        Quantized(sum(prod(backbone[path]) for path in quantized), sum(quantized.values())),
    )


def _chosen(entry: Entry, survey: Survey) -> list[Site]:
    first = _first(entry, survey)
    return [site for site in survey.sites if _selects(entry, site, first)]


def _first(entry: Entry, survey: Survey) -> str:
    """The stack that comes first, of those that have what an entry is at: an encoder of sounds has no tokens."""
    known = not any(entry.at in one.at for one in survey.none)
    has = (one.stack for one in survey.sites if not known or entry.at in ("", one.at))
    return "encoder" if "encoder" in has else "decoder"


def _selects(entry: Entry, site: Site, first: str) -> bool:
    where, stack = entry.where, entry.where.stack
    stacks = OF_TEXT if stack == "text" else (first if stack == "first" else stack,)
    return (
        site.at == entry.at
        and (entry.scope is None or fnmatch.fnmatchcase(site.scope, entry.scope))
        and (stack is None or site.stack in stacks)
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
    if site.is_slice:
        return set()
    return {weight.path.rpartition(".")[0] for weight in site.weights.values()}


def _passed_by(entry: Entry, none: Sequence[NoSite]) -> Iterator[Miss]:
    """What an entry may mean and is no site (experts, fused kernels, weight norm)."""
    for one in none:
        owners = (one.path, one.path.rpartition(".")[0])  # of a module, of a parameter
        if entry.at in one.at and (
            entry.scope is None or any(fnmatch.fnmatchcase(own, entry.scope) for own in owners)
        ):
            yield Miss(entry.method, one.path, one.reason)


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


def _untrainable(entry: Entry, paths: Sequence[str]) -> list[str]:
    if not paths:
        return []
    return [
        f"{entry.place}: {entry.method} would train '{paths[0]}' ({len(paths)} in all), which is quantised: its whole "
        "numbers have no gradient; leave it out of the quantisation (modules_to_not_convert of TorchAoConfig, "
        "filter_fn of quantize_), or this out of the spec"
    ]


def _advice(entry: Entry, sites: Sequence[Site]) -> str:
    kinds: dict[str, int] = {}
    for site in sites:
        kinds[site.at] = kinds.get(site.at, 0) + 1
    same = [site for site in sites if site.at == entry.at]
    if same and entry.train:
        fused = any(site.is_slice for site in same)
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


@dataclass(frozen=True)
class Placed:
    """What becomes of an entry at the sites that it selects."""

    edits: Sequence[Edit]
    misses: Sequence[Miss]
    problems: Sequence[str]


def _placed(spec: Spec, chosen: Sequence[Sequence[Site]]) -> list[Placed]:
    """What becomes of each entry at its sites. Tensors are named by the method; where another delta has taken
    one of the names, all of a delta's have the number of its first entry too."""
    found: list[Placed] = []
    taken: set[str] = set()
    for _, written in groupby(enumerate(spec.entries), lambda pair: pair[1].group):
        several = [(entry, chosen[index]) for index, entry in written]
        one = _delta(several, several[0][0].method)
        if taken & _paths(one):
            one = _delta(several, f"{several[0][0].method}_{len(found)}")
        taken |= _paths(one)
        found += one
    return found


def _delta(several: Sequence[tuple[Entry, Sequence[Site]]], label: str) -> list[Placed]:
    """What becomes of the entries that were written as one delta, and share what it shares."""
    shared = _Shared()
    found: list[Placed] = []
    for entry, sites in several:
        placed = Placed([], [], []) if entry.train else _edits(entry, label, sites, shared)
        before = {edit.path for one in found for edit in one.edits}
        twice = [edit.site.name for edit in placed.edits if edit.path in before]
        if twice:
            fact = (
                f"{entry.place}: {twice[0]} is named twice by one delta; let its sites not overlap"
            )
            placed = replace(placed, problems=[*placed.problems, fact])
        found.append(placed)
    return found


@dataclass(frozen=True)
class _Shared:
    """What the sites of one delta share so far: the shape of each tensor, and by the kind of site the shapes that such
    sites have. Where they differ (stages of a vision model) those of one shape share."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    kinds: dict[str, list[tuple[tuple[int, ...], ...]]] = field(default_factory=dict)

    def among(self, site: Site, entry: Entry) -> str:
        """The name under which a site shares tensors with others of its kind."""
        shapes = tuple(_shape(one, site, entry) for one in entry.params if one.per == "kind")
        known = self.kinds.setdefault(site.group, [])
        if shapes not in known:
            known.append(shapes)
        number = known.index(shapes)
        return f"{site.group}_{number + 1}" if number else site.group


def _edits(entry: Entry, label: str, sites: Sequence[Site], shared: _Shared) -> Placed:
    placed: list[Edit] = []
    missed: list[Miss] = []
    problems: dict[str, str] = {}
    for site in sites:
        reason = _unfit(entry, site)
        if reason:
            missed.append(Miss(entry.method, site.name, reason))
            continue
        try:
            path = f"{site.scope}.{site.at.replace('.', '_')}.{label}"
            kind = shared.among(site, entry)
            made = tuple(_parameter(one, site, entry, label, kind) for one in entry.params)
            edit = Edit(site, entry, path, made)
            check(edit)
        except ex.ExprError as error:
            problems.setdefault(error.fact, f"{entry.place}: at {site.name}: {error.fact}")
            continue
        for parameter in edit.parameters:
            first = shared.shapes.setdefault(parameter.path, parameter.shape)
            if first != parameter.shape:
                problems[parameter.path] = (
                    f"{entry.place}: parameter '{parameter.name}' is shared by sites of different shapes: "
                    f"{list(first)} and {list(parameter.shape)} (at {site.name})"
                )
        placed.append(edit)
    return Placed(placed, missed, list(problems.values()))


def _unfit(entry: Entry, site: Site) -> str:
    """Why an entry cannot be at a site, or nothing."""
    kind = SITES[site.at]
    ports = {port for port, _ in entry.assign}
    used = {name for _, expression in (*entry.let, *entry.assign) for name in ex.names(expression)}
    also = next((site.weights[p].also for p in kind.having(*STORED) if p in site.weights), "")
    if also and ports & set(kind.having(*STORED)):
        return f"'{also}' reads this weight too"
    if site.is_slice and ports & set(kind.having(INPUT)):
        return "the input of a fused projection is read by its other parts too"
    read = used.union(*(ex.names(dim) for param in entry.params for dim in param.shape))
    for dim in kind.dims:
        if dim in read and dim not in {*site.dims, *entry.arguments}:
            return f"'{dim}' is no fixed number here"
    return next(
        (
            site.absent[port]
            for port in kind.ports
            if port in (ports | used) and port in site.absent
        ),
        "",
    )


def _paths(placed: Iterable[Placed]) -> set[str]:
    return {p.path for one in placed for edit in one.edits for p in edit.parameters}


def _shape(param: Param, site: Site, entry: Entry) -> tuple[int, ...]:
    return tuple(_size(dim, _sizes(site, entry), param) for dim in param.shape)


def _sizes(site: Site, entry: Entry) -> dict[str, float | int]:
    return {**entry.arguments, **site.dims}


def _parameter(param: Param, site: Site, entry: Entry, label: str, kind: str) -> Parameter:
    """`kind` names the sites that share what is `per: kind`."""
    sizes, shape = _sizes(site, entry), _shape(param, site, entry)
    experts = _experts(entry, site) if param.per == "expert" else 0
    if experts:
        shape = (experts, *shape)
    group = {
        "site": f"{site.scope}.{site.at.replace('.', '_')}",
        "kind": f"shared.{kind}",
        "shape": "shared." + "x".join(map(str, shape)),
        "model": "shared.model",
        "expert": f"{site.scope}.{site.at.replace('.', '_')}",
    }[param.per]
    path = f"{group}.{label}.{param.name}"
    if param.init.name == FORMULA:
        values = {name: ex.Number(value) for name, value in sizes.items()}
        formula = ex.substitute(param.init.args[0], values)
        return Parameter(param.name, path, shape, FORMULA, (), param.trainable, formula, experts)
    args = tuple(float(ex.number(arg, sizes)) for arg in param.init.args)
    return Parameter(
        param.name, path, shape, param.init.name, args, param.trainable, experts=experts
    )


def _experts(entry: Entry, site: Site) -> int:
    """Of how many experts a tensor is: of those that the entry chose."""
    chosen, count = entry.where.experts, site.dims["experts"]
    if chosen is None:
        return count
    if max(chosen) >= count:
        raise ex.ExprError(
            0, f"there is no expert {max(chosen)}: the first is 0, the last {count - 1}", ""
        )
    return len(chosen)


def _size(dim: ex.Expr, sizes: Mapping[str, float | int], param: Param) -> int:
    size = ex.number(dim, sizes)
    if size != int(size) or size < 0:
        raise ex.ExprError(0, f"'{param.name}' has a size of {size} ({ex.show(dim)})", "")
    return int(size)
