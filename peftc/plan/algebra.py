"""The algebra of deltas: what is constant in an expression, and what is an affine map of its input.

Nothing here knows a method. A row of the op table says how an op acts on constants and affine maps;
folding follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from math import prod

from peftc.language.expr import Call, Expr, Name, Number, Shape, names, substitute
from peftc.language.ops import infer
from peftc.language.ports import SITES
from peftc.plan.edit import Edit, Parameter
from peftc.sites.site import Site


def port_shapes(site: Site) -> dict[str, Shape]:
    """The ports of a site with its own numbers in place of the names of dims."""
    return {
        port: tuple(site.dims.get(d, d) if isinstance(d, str) else d for d in shape)
        for port, shape in SITES[site.at].shapes.items()
    }


def numbers(edit: Edit) -> dict[str, float | int]:
    """The names that stand for numbers here: arguments and dims."""
    return {**edit.entry.arguments, **edit.site.dims}


def shape_of(expression: Expr, edit: Edit, lets: Mapping[str, Shape] | None = None) -> Shape:
    """The shape of an expression at this site. Raises ExprError where shapes do not fit."""
    values = {name: Number(value) for name, value in numbers(edit).items()}
    known = {**port_shapes(edit.site), **{p.name: p.seen for p in edit.parameters}, **(lets or {})}
    return infer(substitute(expression, values), known)


def inlined(edit: Edit) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """(`let` expressions, assigned expressions) with every `let` name replaced by its definition."""
    return edit.entry.inlined


def penalty_of(edit: Edit) -> Expr | None:
    """What an edit adds to the loss in training, its `let` names replaced."""
    penalty = edit.entry.penalty
    return None if penalty is None else substitute(penalty, inlined(edit)[0])


def grown(expression: Expr, edit: Edit) -> int:
    """How many rows an expression puts before those of its port."""
    if not isinstance(expression, Call) or expression.op != "prepend":
        return 0
    rows, rest = expression.args
    return int(shape_of(rows, edit)[-2]) + grown(rest, edit)


def growth(edit: Edit) -> dict[str, int]:
    """How many rows an edit puts in front of what: `tokens`, or the `keys` and values of an attention."""
    ports = SITES[edit.site.at].ports
    rows = {ports[port].rows: grown(one, edit) for port, one in inlined(edit)[1].items()}
    return {what: count for what, count in rows.items() if count}


def ungrown(expression: Expr) -> Expr:
    """The expression without the rows that it puts in front."""
    while isinstance(expression, Call) and expression.op == "prepend":
        expression = expression.args[1]
    return expression


def constant_form(edit: Edit) -> Edit:
    """The edit with each subexpression of parameters alone as one parameter, where that is no larger.

    Prefix tuning loses its reparametrising MLP so (Li & Liang 2021, section 4.3); `A @ B` of two
    factors stays, because the product has more elements than the factors; so does what is under a mask (a
    frozen parameter of the same shape), which must hold when training goes on.
    """
    found = constants(edit)
    if not found:
        return edit
    named = {part: Name(parameter.name) for part, parameter in found.items()}
    assign = tuple((port, replaced(one, named)) for port, one in inlined(edit)[1].items())
    used = {name for _, one in assign for name in names(one)}
    kept = tuple(p for p in edit.parameters if p.name in used)
    entry = replace(edit.entry, let=(), assign=assign, params=())
    return replace(edit, entry=entry, parameters=kept + tuple(found.values()))


def constants(edit: Edit) -> dict[Expr, Parameter]:
    """The subexpressions that `constant_form` evaluates, and the parameter that each becomes."""
    sizes = {p.name: p.numel for p in edit.parameters}
    masks = {p.name: p.shape for p in edit.parameters if not p.trainable}
    lets, assigned = inlined(edit)
    known = {one: name for name, one in reversed(lets.items())}
    found: dict[Expr, Parameter] = {}
    for port, expression in assigned.items():
        for part in constant_parts(expression, edit):
            shape = tuple(int(n) for n in shape_of(part, edit))
            if part in found or any(masks.get(name) == shape for name in names(part)):
                continue
            if prod(shape) > sum(sizes[name] for name in names(part) if name in sizes):
                continue
            taken = {*sizes, *lets, *(one.name for one in found.values())}
            label = known.get(part) or _fresh(f"{port}_constant", taken)
            trainable = any(p.trainable for p in edit.parameters if p.name in names(part))
            path = f"{edit.path}.{label}"
            found[part] = Parameter(label, path, shape, "zeros", (), trainable)
    return found


def _fresh(label: str, taken: set[str]) -> str:
    """`h_constant`, then `h_constant_2`: each unnamed part is a parameter of its own."""
    count = next(
        n for n in range(1, len(taken) + 2) if (label if n == 1 else f"{label}_{n}") not in taken
    )
    return label if count == 1 else f"{label}_{count}"


def constant_parts(expression: Expr, edit: Edit) -> list[Expr]:
    """The maximal calls that read parameters and numbers alone, from left to right; none of what is of each expert."""
    if any(one.experts for one in edit.parameters):
        return []
    parameters = {p.name for p in edit.parameters}
    free = parameters | set(numbers(edit))
    read = set(names(expression))
    if not isinstance(expression, Call):
        return []
    if read <= free and read & parameters:
        return [expression]
    return [part for arg in expression.args for part in constant_parts(arg, edit)]


def replaced(expression: Expr, found: Mapping[Expr, Name]) -> Expr:
    """`expression` with each part that is found replaced by its name."""
    if expression in found:
        return found[expression]
    if isinstance(expression, Call):
        return replace(expression, args=tuple(replaced(arg, found) for arg in expression.args))
    return expression
