"""Doubles: a model with modules of its own over the tensors of another."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers import PreTrainedModel

# What a double has in common with its model: a tensor put in its place on one side stands there on the other.
_REGISTRIES = ("_parameters", "_buffers", "_non_persistent_buffers_set")
# torch's own on every module: hooks, and the modules inside.
_OWN = frozenset(k for k, v in vars(nn.Module()).items() if isinstance(v, dict))


def double(model: PreTrainedModel) -> PreTrainedModel:
    """The same model over the same parameters, buffers and configuration, whose modules, with their modes, hooks and
    attributes, are its own. What an attribute holds is shared, but for modules and their methods, which are the
    double's."""
    own = {module: type(module).__new__(type(module)) for module in model.modules()}
    for module, new in own.items():
        new.__dict__.update({k: _attribute(k, v, own) for k, v in vars(module).items()})
    return own[model]  # type: ignore[return-value]


def _attribute(name: str, value: Any, own: Mapping[nn.Module, nn.Module]) -> Any:
    if name in _REGISTRIES:
        return value
    found = _own(value, own)
    return copy.copy(found) if name in _OWN else found


def _own(value: Any, own: Mapping[nn.Module, nn.Module]) -> Any:
    """`value` with the double's modules in the place of the model's."""
    if isinstance(value, nn.Module):
        return own.get(value, value)
    if isinstance(value, types.MethodType):
        owner = _own(value.__self__, own)
        return value if owner is value.__self__ else types.MethodType(value.__func__, owner)
    if isinstance(value, functools.partial):
        held = _own((value.func, *value.args), own), _own(value.keywords, own)
        bound = functools.partial(*held[0], **held[1])
        bound.__dict__.update(_own(vars(value), own))
        return bound
    if type(value) in (list, tuple, set):
        found = [_own(one, own) for one in value]
        return value if all(map(lambda a, b: a is b, found, value)) else type(value)(found)
    if isinstance(value, dict):
        items = {k: _own(v, own) for k, v in value.items()}
        if all(items[k] is v for k, v in value.items()):
            return value
        new = copy.copy(value)
        new.update(items)
        return new
    return value
