"""What is an affine map of its input, decided by the op table.

Nothing here knows a method. A row of the op table says how an op acts on constants and affine maps;
folding follows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peftc.language.expr import Call, Expr, Name, calls, names
from peftc.language.ops import OPS
from peftc.rewrite.evaluate import Tensors, evaluate


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
    matrix = sum(matrices[1:], matrices[0])
    return Affine(matrix, _spread(sum(offsets[1:], offsets[0]), matrix) if offsets else None)


def _spread(offset: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
    """An offset [out], of one that is the same for all features or has axes of size 1 in front."""
    if offset.numel() not in (1, matrix.shape[-1]):
        raise NotAffine("it adds more than one vector")
    return offset.reshape(-1).expand(matrix.shape[-1])


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
