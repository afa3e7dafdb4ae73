"""Widths: parameters of other shapes than a model's own, and the configuration that has them; found by trial."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice, product
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

# Configurations that are tried, the likeliest first: a model of each is built, without weights.
_TRIALS = 64
# A number of a configuration: the names of the configurations that it is in, its own, and what it becomes.
Change = tuple[tuple[str, ...], str, int]
# Shapes by the paths of parameters.
Shapes = Mapping[str, torch.Size]
Weights = Mapping[str, torch.Tensor]


def refitted(model: PreTrainedModel, shapes: Shapes) -> PreTrainedModel | None:
    """A model of the same class, on the meta device, whose parameters at these paths have these shapes, and all others
    those that they have; None where no configuration has it. Numbers of the configuration that are as an old width
    are tried as a new one: names say nothing."""
    own = _shapes(model)
    wanted = own | dict(shapes)
    wider: dict[int, set[int]] = {}
    for path, shape in shapes.items():
        for old, new in zip(own[path], shape, strict=True):
            if old != new:
                wider.setdefault(old, set()).add(new)
    for changes in islice(_changes(model.config, wider), _TRIALS):
        config = copy.deepcopy(model.config)
        _set(config, changes)
        try:
            with torch.device("meta"):
                made: PreTrainedModel = type(model)(config)
        except Exception:  # whatever a model raises of sizes that do not fit
            continue
        if _shapes(made) == wanted:
            return made
    return None


def refit(model: PreTrainedModel, like: PreTrainedModel, weights: Weights) -> None:
    """Make a model one like another, which `refitted` found, with these weights where shapes differ: parameters,
    the numbers that modules keep of their sizes, and the configuration."""
    sizes = _shapes(like)
    for path, weight in [*model.named_parameters(remove_duplicate=False)]:
        if weight.shape != sizes[path]:
            owner, _, name = path.rpartition(".")
            made = weights[path].to(weight.device, weight.dtype)
            own = nn.Parameter(made, weight.requires_grad)
            model.get_submodule(owner).register_parameter(name, own)
    for path, module in model.named_modules():
        twin = vars(like.get_submodule(path))
        for name, value in [*vars(module).items()]:
            if type(value) is int and type(twin.get(name)) is int:
                setattr(module, name, twin[name])
    _set(model.config, _fields(like.config, int))


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {path: one.shape for path, one in model.named_parameters(remove_duplicate=False)}


def _changes(config: PreTrainedConfig, wider: Mapping[int, set[int]]) -> Iterator[list[Change]]:
    """Ways to set numbers that are as an old width, most of them first; then each that is left open."""
    found = [(where, name, old) for where, name, old in _fields(config, int) if old in wider]
    choices = [[*sorted(wider[old]), old] for _, _, old in found]
    for values in product(*choices):
        changes = [
            (where, name, new)
            for (where, name, old), new in zip(found, values, strict=True)
            if new != old
        ]
        if changes:
            yield changes
    for where, name, _ in _fields(config, type(None)):
        for new in sorted(set().union(*wider.values())):
            yield [(where, name, new)]


def _fields(
    config: PreTrainedConfig, kind: type, where: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], str, Any]]:
    """What a configuration and those inside it have of a type; a bool is no int."""
    for name, value in vars(config).items():
        if type(value) is kind:
            yield where, name, value
        elif isinstance(value, PreTrainedConfig):
            yield from _fields(value, kind, (*where, name))


def _set(config: PreTrainedConfig, changes: Iterable[Change]) -> None:
    for where, name, value in changes:
        one = config
        for inner in where:
            one = getattr(one, inner)
        setattr(one, name, value)
