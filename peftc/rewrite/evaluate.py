"""Expressions evaluated in float64, by the same lowering as a graph's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import fx

from peftc.language.expr import Expr, names
from peftc.plan.algebra import constants, numbers
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder

Tensors = Mapping[str, torch.Tensor]


def evaluate(expression: Expr, env: Tensors, sizes: Mapping[str, float | int]) -> torch.Tensor:
    """The value of an expression of tensors and numbers, in float64, by the same lowering as a graph."""
    graph = fx.Graph()
    read = [name for name in names(expression) if name in env]
    nodes = {name: graph.placeholder(f"p_{name}") for name in read}
    result = Builder(graph).lower(expression, {**sizes, **nodes}, "value")
    if not isinstance(result, fx.Node):
        return torch.tensor(float(result), dtype=torch.float64)
    graph.output(result)
    values = [env[name].detach().double() for name in read]
    with torch.no_grad():
        value: torch.Tensor = fx.Interpreter(fx.GraphModule({}, graph)).run(*values)
    return value


def constant_values(edit: Edit, tensors: Tensors) -> dict[str, torch.Tensor]:
    """The values of the parameters that `constant_form` introduces, by path, computed in float64."""
    env = {p.name: tensors[p.path] for p in edit.parameters}
    return {
        parameter.path: evaluate(part, env, numbers(edit)).to(next(iter(env.values())).dtype)
        for part, parameter in constants(edit).items()
    }
