"""The algebra of deltas: what is constant in an expression, and what is an affine map of its input.

Nothing here knows a method. A row of the op table says how an op acts on constants and affine maps;
folding follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from peftc.edit import Edit, Parameter
from peftc.expr import Call, Expr, Name, Number, Shape, calls, infer, names, substitute
from peftc.lower import Builder
from peftc.ops import OPS
from peftc.ports import SITES
from peftc.sites import Site

Tensors = Mapping[str, torch.Tensor]


def port_shapes(site: Site) -> dict[str, Shape]:
    """The ports of a site with its own numbers in place of the names of dims."""
    return {
        port: tuple(site.dims.get(d, d) if isinstance(d, str) else d for d in shape)
        for port, shape in SITES[site.at].ports.items()
    }


def numbers(edit: Edit) -> dict[str, float | int]:
    """The names that stand for numbers here: arguments and dims."""
    return {**edit.entry.arguments, **edit.site.dims}


def shape_of(expression: Expr, edit: Edit, lets: Mapping[str, Shape] | None = None) -> Shape:
    """The shape of an expression at this site. Raises ExprError where shapes do not fit."""
    values = {name: Number(value) for name, value in numbers(edit).items()}
    known = {**port_shapes(edit.site), **{p.name: p.shape for p in edit.parameters}, **(lets or {})}
    return infer(substitute(expression, values), known)


def inlined(edit: Edit) -> tuple[dict[str, Expr], dict[str, Expr]]:
    """(`let` expressions, assigned expressions) with every `let` name replaced by its definition."""
    lets: dict[str, Expr] = {}
    for name, expression in edit.entry.let:
        lets[name] = substitute(expression, lets)
    return lets, {port: substitute(expression, lets) for port, expression in edit.entry.assign}


def grown(expression: Expr, edit: Edit) -> int:
    """How many rows an expression puts before those of its port."""
    if not isinstance(expression, Call) or expression.op != "prepend":
        return 0
    rows, rest = expression.args
    return int(shape_of(rows, edit)[-2]) + grown(rest, edit)


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
    sizes = {p.name: p.numel for p in edit.parameters}
    masks = {p.name: p.shape for p in edit.parameters if not p.trainable}
    lets, assigned = inlined(edit)
    found: dict[Expr, Parameter] = {}
    for port, expression in assigned.items():
        for part in constant_parts(expression, edit):
            shape = tuple(int(n) for n in shape_of(part, edit))
            if any(masks.get(name) == shape for name in names(part)):
                continue
            if torch.Size(shape).numel() <= sum(sizes[n] for n in names(part) if n in sizes):
                label = next(
                    (name for name, one in lets.items() if one == part), f"{port}_constant"
                )
                trainable = any(p.trainable for p in edit.parameters if p.name in names(part))
                found.setdefault(
                    part, Parameter(label, f"{edit.path}.{label}", shape, "zeros", (), trainable)
                )
    if not found:
        return edit
    named = {part: Name(parameter.name) for part, parameter in found.items()}
    assign = tuple((port, replaced(one, named)) for port, one in assigned.items())
    used = {name for _, one in assign for name in names(one)}
    kept = tuple(p for p in edit.parameters if p.name in used)
    entry = replace(edit.entry, let=(), assign=assign, params=())
    return replace(edit, entry=entry, parameters=kept + tuple(found.values()))


def constant_values(edit: Edit, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The values of the parameters that `constant_form` introduces, by path, computed in float64."""
    env = {p.name: tensors[p.path] for p in edit.parameters}
    lets, assigned = inlined(edit)
    values = {}
    old = {p.path for p in edit.parameters}
    for parameter in constant_form(edit).parameters:
        if parameter.path in old:
            continue
        part = lets.get(parameter.name) or next(
            one
            for port, expression in assigned.items()
            if parameter.name == f"{port}_constant"
            for one in constant_parts(expression, edit)
        )
        value = evaluate(part, env, numbers(edit))
        values[parameter.path] = value.to(next(iter(env.values())).dtype)
    return values


def constant_parts(expression: Expr, edit: Edit) -> list[Expr]:
    """The maximal calls that read parameters and numbers alone, from left to right."""
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


def evaluate(expression: Expr, env: Tensors, numbers: Mapping[str, float | int]) -> torch.Tensor:
    """The value of an expression of tensors and numbers, in float64, by the same lowering as a graph."""
    graph = fx.Graph()
    read = [name for name in names(expression) if name in env]
    nodes = {name: graph.placeholder(f"p_{name}") for name in read}
    result = Builder(graph).lower(expression, {**numbers, **nodes}, "value")
    if not isinstance(result, fx.Node):
        return torch.tensor(float(result), dtype=torch.float64)
    graph.output(result)
    values = [env[name].detach().double() for name in read]
    with torch.no_grad():
        value: torch.Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    return value


class NotAffine(Exception):
    """An op that no affine map goes through; the message names it."""


@dataclass(frozen=True)
class Affine:
    """`x @ matrix + offset`; `matrix` [in, out], `offset` [out] or None, float64."""

    matrix: torch.Tensor
    offset: torch.Tensor | None = None


def affine(
    expression: Expr, maps: Mapping[str, Affine], env: Tensors, numbers: Mapping[str, float | int]
) -> Affine:
    """`expression` as an affine map of x, where `maps` says which names are maps of x.

    Raises NotAffine with the op that stands in the way.
    """
    if isinstance(expression, Name) and expression.id in maps:
        return maps[expression.id]
    read = names(expression)
    unknown = [n for n in read if n not in maps and n not in env and n not in numbers]
    if unknown:
        opaque = [one.op for one in calls(expression) if OPS[one.op].affine == "opaque"]
        what = f"'{opaque[0]}' is not affine" if opaque else f"it reads '{unknown[0]}'"
        raise NotAffine(what)
    if not isinstance(expression, Call) or not any(name in maps for name in read):
        raise NotAffine("it does not read the linear's own input or result")
    rule = _RULES.get(OPS[expression.op].affine)
    if rule is None:
        raise NotAffine(f"'{expression.op}' is not affine")

    def part(one: Expr) -> Affine | torch.Tensor:
        if any(name in maps for name in names(one)):
            return affine(one, maps, env, numbers)
        return evaluate(one, env, numbers)

    return rule(expression.op, [part(arg) for arg in expression.args])


Operand = Affine | torch.Tensor


def _sum(op: str, args: list[Operand]) -> Affine:
    if op == "neg":
        return _scaled(args[0], torch.tensor(-1.0, dtype=torch.float64))
    left, right = args
    if op == "sub":
        right = _scaled(right, -1.0) if isinstance(right, Affine) else -right
    a, b = _offset_and_matrix(left), _offset_and_matrix(right)
    matrices = [m for m, _ in (a, b) if m is not None]
    offsets = [o for _, o in (a, b) if o is not None]
    return Affine(sum(matrices[1:], matrices[0]), sum(offsets[1:], offsets[0]) if offsets else None)


def _offset_and_matrix(one: Operand) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (one.matrix, one.offset) if isinstance(one, Affine) else (None, one)


def _scaled(one: Operand, factor: torch.Tensor | float) -> Affine:
    assert isinstance(one, Affine)
    return Affine(one.matrix * factor, None if one.offset is None else one.offset * factor)


def _product(op: str, args: list[Operand]) -> Affine:
    left, right = args
    if isinstance(left, Affine) and isinstance(right, Affine):
        raise NotAffine(f"'{op}' multiplies two functions of x")
    if isinstance(left, Affine):
        assert isinstance(right, torch.Tensor)
        return _scaled(left, 1 / right if op == "div" else right)
    if op == "div":
        raise NotAffine("'div' divides by a function of x")
    return _scaled(right, left)


def _matmul(op: str, args: list[Operand]) -> Affine:
    left, right = args
    if not isinstance(left, Affine) or isinstance(right, Affine):
        raise NotAffine(f"'{op}' has x on its right side")
    return Affine(left.matrix @ right, None if left.offset is None else left.offset @ right)


def _identity(op: str, args: list[Operand]) -> Affine:
    if not isinstance(args[0], Affine):
        raise NotAffine(f"'{op}' of a constant")
    return args[0]


def _lookup(op: str, args: list[Operand]) -> Affine:
    """`lookup(table, ids)` is the one-hot rows of ids times the table."""
    if not isinstance(args[0], torch.Tensor):
        raise NotAffine(f"'{op}' has x as its table")
    return Affine(args[0])


_RULES = {
    "sum": _sum,
    "product": _product,
    "matmul": _matmul,
    "lookup": _lookup,
    "identity": _identity,
}
