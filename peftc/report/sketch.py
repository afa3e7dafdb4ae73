"""A sketch: one layer of a plan as people draw it: its sub-layers, and what each delta does where. Data alone."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from peftc.language import expr as ex
from peftc.language.ports import SITES
from peftc.plan.algebra import inlined
from peftc.plan.design import insertion
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan
from peftc.sites.site import Site

# The kinds of sites that are whole sub-layers, in the order in which most models have them.
_DRAWN = {name: one.drawn for name, one in SITES.items() if one.drawn is not None}
WHOLE = dict(sorted(_DRAWN.items(), key=lambda item: item[1].place))
Sizes = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """One op on the way of a delta: a tensor [a, b] by its name, or an op."""

    text: str
    sizes: Sizes | None = None


@dataclass(frozen=True)
class Mark:
    """What one delta of the spec, its `group`, does at a sub-layer. `insertion` is that of the design table; `pieces` are
    the projections that it is at, none at the whole; `ports` are what it assigns; `scale` is what it is multiplied by
    before it joins."""

    group: int
    method: str
    insertion: str
    pieces: tuple[str, ...]
    ports: tuple[str, ...]
    stages: tuple[Stage, ...]
    scale: str = ""


@dataclass(frozen=True)
class Part:
    """A sub-layer at a module path: its width, and its projections with [in, out], of which the `last` gives its result
    and others come before its `core`."""

    title: str
    at: str
    scope: str
    sizes: Sizes
    pieces: tuple[tuple[str, Sizes], ...]
    marks: tuple[Mark, ...]
    paths: tuple[str, ...] = ()
    core: str = ""
    last: str = ""


@dataclass(frozen=True)
class Layer:
    """A layer of a stack; `layers` are those in which the spec does the same."""

    stack: str
    layers: tuple[int | None, ...]
    parts: tuple[Part, ...]


def sketches(plan: Plan) -> tuple[Layer, ...]:
    """A layer of each sort in which a plan changes something, the most changed first; sub-layers come as most models
    have them."""
    groups: dict[tuple[str, frozenset[object]], list[int | None]] = {}
    for stack, layer in dict.fromkeys((one.stack, one.layer) for one in plan.sites):
        changes = frozenset(_changes(plan, stack, layer))
        if changes:
            groups.setdefault((stack, changes), []).append(layer)
    ranked = sorted(groups.items(), key=lambda one: (one[1][0] is None, -len(one[0][1])))
    return tuple(
        Layer(stack, tuple(layers), tuple(_parts(plan, stack, layers[0])))
        for (stack, _), layers in ranked
    )


def _changes(plan: Plan, stack: str, layer: int | None) -> Iterator[object]:
    """What tells layers apart by what is done there."""
    for edit in plan.edits:
        if (edit.site.stack, edit.site.layer) == (stack, layer):
            yield edit.index, edit.site.at, edit.site.kind
    sites = [one for one in _here(plan, stack, layer) if _whole(one) in WHOLE]
    paths = {weight.path: one for one in reversed(sites) for weight in one.weights.values()}
    for one in plan.unfrozen:
        if one.path in paths:
            yield one.index, _whole(paths[one.path]), paths[one.path].kind


def _here(plan: Plan, stack: str, layer: int | None) -> list[Site]:
    return [one for one in plan.sites if (one.stack, one.layer) == (stack, layer)]


def _whole(site: Site) -> str:
    return SITES[site.at].sublayer


def _piece(site: Site) -> str:
    return SITES[site.at].part


def _parts(plan: Plan, stack: str, layer: int | None) -> Iterator[Part]:
    """The sub-layers of a layer, and what else is changed there."""
    changed = {edit.site.name for edit in plan.edits}
    groups: dict[tuple[str, str, str], list[Site]] = {}
    for one in sorted(_here(plan, stack, layer), key=lambda one: SITES[one.at].drawn is None):
        if _whole(one) in WHOLE or one.name in changed:
            groups.setdefault(_group(one, groups), []).append(one)
    kinds = [*WHOLE, *dict.fromkeys(key[0] for key in groups)]
    order = sorted(groups, key=lambda key: (kinds.index(key[0]), key[1] == "cross"))
    yield from _joined([_part(key, groups[key], plan) for key in order])


def _group(
    site: Site, groups: Mapping[tuple[str, str, str], Sequence[Site]]
) -> tuple[str, str, str]:
    """(kind of site, kind of attention, module) of the sub-layer that a site is, or is a projection of: one whose weights
    it is made of, or whose module it is in."""
    for key, (whole, *_) in groups.items():
        paths = {one.path for one in whole.weights.values()}
        mine = "W" in site.weights and site.weights["W"].path in paths
        if key[0] == _whole(site) and key[1] == site.kind and (mine or whole.scope == site.scope):
            return key
    return _whole(site), site.kind, site.scope


def _joined(parts: Sequence[Part]) -> Iterator[Part]:
    """What stands in the module of another part is a piece of it (experts of a feed-forward). A part whose module is the
    layer itself has nothing in it."""
    inner: dict[int, list[Part]] = {}
    for one in parts:
        around = (i for i, other in enumerate(parts) if _is_in(one.scope, other.scope))
        inner.setdefault(next(around, -1), []).append(one)
    for i, part in enumerate(parts):
        if part not in inner.get(-1, ()):
            continue
        mine = inner.get(i, [])
        titles = [one.title for one in mine]
        names = {
            one.scope: one.scope.rpartition(".")[2] if titles.count(one.title) > 1 else one.title
            for one in mine
        }
        pieces = [(names[one.scope], one.sizes) for one in mine]
        marks = [
            replace(mark, pieces=mark.pieces or (names[one.scope],))
            for one in mine
            for mark in one.marks
        ]
        paths = [path for one in mine for path in one.paths]
        yield replace(
            part,
            pieces=(*part.pieces, *pieces),
            marks=(*part.marks, *marks),
            paths=(*part.paths, *paths),
            last=part.last or (pieces[-1][0] if len(pieces) > 1 else ""),
        )


def _is_in(scope: str, other: str) -> bool:
    is_layer = other.rpartition(".")[2].isdecimal()
    return scope != other and scope.startswith(f"{other}.") and not is_layer


def _part(key: tuple[str, str, str], sites: Sequence[Site], plan: Plan) -> Part:
    at, kind, scope = key
    whole = next((one for one in sites if not _piece(one)), sites[0])
    pieces = {
        _piece(one): (one.dims["in"], one.dims["out"]) for one in sites if SITES[one.at].projects
    }
    drawn = WHOLE.get(at)
    called, core = (at, "") if drawn is None else (drawn.title, drawn.core)
    title = called + (f", {kind}" if kind else "")
    end = whole.weights["W"].path if "W" in whole.weights else ""
    last = next((one for one in sites if SITES[one.at].projects and _is_of(one, end)), whole)
    paths = tuple(dict.fromkeys(w.path for one in sites for w in one.weights.values()))
    names = {one.name for one in sites}
    edits = [one for one in plan.edits if one.site.name in names]
    marks = [*_alike(_edited(edits, _named(sites))), *_trained(plan, paths)]
    sizes = whole.dims.get("in", 0), whole.dims.get("out", 0)
    return Part(
        title,
        at,
        scope,
        sizes,
        tuple(pieces.items()),
        tuple(marks),
        paths,
        whole.hidden.op if whole.hidden else core,
        _piece(last),
    )


def _is_of(site: Site, path: str) -> bool:
    return "W" in site.weights and site.weights["W"].path == path


def _trained(plan: Plan, paths: Sequence[str]) -> Iterator[Mark]:
    owners = {path.rpartition(".")[0] for path in paths}
    found: dict[int, dict[str, None]] = {}
    for one in plan.unfrozen:
        owner, _, name = one.path.rpartition(".")
        if owner in owners:
            found.setdefault(one.index, {})[name] = None
    for index, names in found.items():
        entry = plan.spec.entries[index]
        yield Mark(entry.group, entry.method, "in place", (), tuple(names), ())


def _alike(marks: Iterable[Mark]) -> Iterator[Mark]:
    """What differs in its projection alone is one."""
    found: dict[Mark, list[str]] = {}
    for one in marks:
        found.setdefault(replace(one, pieces=()), []).extend(one.pieces)
    for one, pieces in found.items():
        yield replace(one, pieces=tuple(pieces))


def _named(sites: Sequence[Site]) -> dict[str, tuple[str, ...]]:
    """The projections that are of each weight: of a fused one several."""
    found: dict[str, list[str]] = {}
    for one in sites:
        if SITES[one.at].projects:
            found.setdefault(one.weights["W"].path, []).append(_piece(one))
    return {path: tuple(pieces) for path, pieces in found.items()}


def _edited(edits: Sequence[Edit], named: Mapping[str, tuple[str, ...]]) -> Iterator[Mark]:
    """What each edit does; one that is at a projection by another name is at that, as `ffn.linear` is."""
    for edit in {edit.key: edit for edit in edits}.values():
        entry = edit.entry
        piece, pieces = _piece(edit.site), tuple[str, ...]()
        if SITES[edit.site.at].projects:
            pieces = (piece,)
        elif piece and "W" in edit.site.weights:
            pieces = named.get(edit.site.weights["W"].path, ())
        assigned = inlined(edit)[1]
        lets = inlined(edit)[0]
        main = next(iter(assigned.values())) if entry.delta is None else entry.delta
        main = ex.substitute(main, lets)
        if isinstance(main, ex.Call) and main.op == "prepend":
            main = main.args[0]
        yield Mark(
            entry.group,
            entry.method,
            insertion(entry),
            pieces,
            tuple(assigned),
            tuple(_stages(main, edit)),
            _scale(edit),
        )


def _stages(expression: ex.Expr, edit: Edit) -> Iterator[Stage]:
    """The ops from what a delta reads to what it gives, along its first operand that a port or a tensor is in."""
    shapes = {one.name: one.seen for one in edit.parameters}
    ports = SITES[edit.site.at].ports
    if not isinstance(expression, ex.Call):
        if isinstance(expression, ex.Name) and expression.id in shapes:
            yield Stage(expression.id, _sizes(shapes[expression.id]))
        return
    first = _first(expression, ports, shapes)
    yield from _stages(expression.args[first], edit)
    others = [one for i, one in enumerate(expression.args) if i != first]
    other = others[0] if others else None
    if expression.op == "matmul":
        name = other.id if isinstance(other, ex.Name) else ""
        yield Stage(name or f"@ {_short(other)}", _sizes(shapes.get(name, ())))
    elif expression.op in ("mul", "div"):
        yield Stage(f"{'×' if expression.op == 'mul' else '/'} {_short(other)}")
    elif expression.op not in ("add", "sub"):
        yield Stage(expression.op)
    elif not (isinstance(other, ex.Name) and other.id in shapes):
        yield Stage(f"{'+' if expression.op == 'add' else '−'} {_short(other)}")


def _first(
    call: ex.Call, ports: Mapping[str, object], shapes: Mapping[str, tuple[int, ...]]
) -> int:
    """The operand that the way goes through."""
    for names in (ports, shapes):
        for i, one in enumerate(call.args):
            if any(name in names for name in ex.names(one)):
                return i
    return 0


def _short(expression: ex.Expr | None) -> str:
    said = "" if expression is None else ex.show(expression)
    return said if len(said) <= 18 else said[:17] + "…"


def _sizes(shape: Sequence[int]) -> Sizes | None:
    """[a, b] of a matrix, the last two of what has more axes."""
    return (shape[-2], shape[-1]) if len(shape) > 1 else None


def _scale(edit: Edit) -> str:
    """`× 4` of `h + s * delta`."""
    match edit.entry.compose:
        case ex.Call(op="add", args=(_, ex.Call(op="mul", args=(factor, ex.Name(id="delta"))))):
            try:
                value = ex.number(factor, {**edit.entry.arguments, **edit.site.dims})
            except ex.ExprError:
                return f"× {_short(factor)}"
            return f"× {value:g}"
    return ""


def reads(mark: Mark) -> str:
    """The port that a delta is of: the input beside, the result behind, the weight within."""
    return {"parallel": "x", "sequential": "h", "reparametrised": "W"}.get(mark.insertion, "")


def joins(mark: Mark) -> bool:
    """Whether a delta is added to a value; else it takes the place of one, or stands before it."""
    return mark.insertion in ("parallel", "sequential", "constant") and "h" in mark.ports


def runs(numbers: Sequence[int]) -> str:
    """`0-5,11` of these numbers."""
    found: list[list[int]] = []
    for one in sorted(numbers):
        if found and one == found[-1][-1] + 1:
            found[-1].append(one)
        else:
            found.append([one])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in found)
