"""Expressions evaluated in float64, by the same lowering as a graph's."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from peftc.language.expr import Expr, names
from peftc.plan.algebra import constants, numbers, penalty_of
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Values

Tensors = Mapping[str, torch.Tensor]


def evaluate(expression: Expr, env: Tensors, sizes: Mapping[str, float | int]) -> torch.Tensor:
    """The value of an expression of tensors and numbers, in float64, by the same lowering as a graph's."""
    read = {name: _wide(env[name]) for name in names(expression) if name in env}
    with torch.no_grad():
        value = Values().lower(expression, {**sizes, **read}, "value")
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def _wide(value: torch.Tensor) -> torch.Tensor:
    """In float64; ids stay whole numbers."""
    value = value.detach()
    return value.double() if value.is_floating_point() else value


def constant_values(edit: Edit, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The values of the parameters that `constant_form` introduces, by path, computed in float64."""
    env = {p.name: tensors[p.path] for p in edit.parameters}
    return {
        parameter.path: evaluate(part, env, numbers(edit)).to(next(iter(env.values())).dtype)
        for part, parameter in constants(edit).items()
    }


def penalty_value(edits: Iterable[Edit], tensors: Tensors) -> torch.Tensor:
    """What the edits add to the loss in training, in the type of their tensors, with its gradient; 0 without any."""
    found: Any = torch.zeros(())
    lowering = Values()
    lowering.training = True
    for edit in edits:
        penalty = penalty_of(edit)
        if penalty is None:
            continue
        for part in edit.parts:
            env = {p.name: tensors[p.path] for p in edit.parameters}
            env |= {p.name: env[p.name][part] for p in edit.parameters if p.experts}
            found = found + lowering.lower(penalty, {**numbers(edit), **env}, "penalty")
    value: torch.Tensor = found
    return value
