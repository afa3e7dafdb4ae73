"""Hollow models: copies whose tensors have sizes, types and a device, and no values."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

from peftc.graph.quantized import is_four_bit, meant

Model = TypeVar("Model", bound=nn.Module)


def hollow(model: Model, device: torch.device) -> Model:
    """A copy of a model, compiled or plain, on `device`, that takes no memory for its weights: it can be traced, and
    not run. Tensors that the model ties stay one. Raises RuntimeError where torch has no such device."""
    memo: dict[int, object] = {id(one): _without_values(one, device) for one in _stored(model)}
    return copy.deepcopy(model, memo)


def _stored(model: nn.Module) -> Iterator[torch.Tensor]:
    yield from model.parameters()
    yield from model.buffers()


def _without_values(one: torch.Tensor, device: torch.device) -> torch.Tensor:
    if is_four_bit(one):
        shape, dtype = meant(one)
        like = torch.empty(shape, dtype=dtype, device=device)
    else:
        like = torch.empty_strided(one.shape, one.stride(), dtype=one.dtype, device=device)
    if device.type != "meta":
        like.untyped_storage().resize_(0)
    return nn.Parameter(like, one.requires_grad) if isinstance(one, nn.Parameter) else like
