"""Caches as flat tensors: one name for each layer's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    EncoderDecoderCache,
    StaticLayer,
)

# The input that says how many places of a static cache are filled: a tensor, so that one graph serves all steps.
FILLED = "past_length"
# How the parts of a cache are called in an ONNX graph, as optimum has it.
_ONNX = {"self": "decoder", "cross": "encoder"}


@dataclass(frozen=True)
class CacheSlot:
    """The keys or the values of one layer; tensors [batch, heads, length, dim].

    `part` is "self" (tokens so far) or "cross" (the encoder's states), `side` "key" or "value".
    """

    part: str
    layer: int
    side: str

    @staticmethod
    def read(name: str) -> CacheSlot | None:
        """The slot that an input or an output of a graph is, or None."""
        if not name.startswith("past."):
            return None
        _, part, layer, side = name.split(".")
        return CacheSlot(part, int(layer), side)

    @property
    def name(self) -> str:
        return f"past.{self.part}.{self.layer}.{self.side}"

    @property
    def cross(self) -> bool:
        return self.part == "cross"

    def onnx(self, prefix: str) -> str:
        """`present.0.decoder.key`, as optimum and others name it."""
        return f"{prefix}.{self.layer}.{_ONNX[self.part]}.{self.side}"


def parts_of(cache: Any) -> dict[str, Any]:
    """The caches of one kind of attention each, by the name of their part."""
    if isinstance(cache, EncoderDecoderCache):
        return {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"self": cache}


def flatten_cache(cache: Any) -> dict[str, torch.Tensor]:
    """`past.self.0.key`, `past.self.0.value`, ... and the same for `cross`; tensors [batch, heads, length, dim]."""
    return {
        CacheSlot(part, i, side).name: getattr(layer, f"{side}s")
        for part, one in parts_of(cache).items()
        for i, layer in enumerate(one.layers)
        for side in ("key", "value")
    }


def pairs(tensors: Mapping[str, Any], part: str) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) of each layer, in order."""
    layer = 0
    while (key := CacheSlot(part, layer, "key").name) in tensors:
        yield tensors[key], tensors[CacheSlot(part, layer, "value").name]
        layer += 1


def unflatten_cache(
    tensors: Mapping[str, Any], encoder_decoder: bool, filled: torch.Tensor | None = None
) -> Any:
    """The cache that `flatten_cache` was given, empty where `tensors` have none of it; a static one, if `filled` says
    how far."""
    layers = pairs(tensors, "self")
    own: Any
    if filled is None:
        own = _dynamic(layers)
    else:
        own = Cache(layers=[_Step(keys, values, filled) for keys, values in layers])
    return EncoderDecoderCache(own, _dynamic(pairs(tensors, "cross"))) if encoder_decoder else own


class _Step(StaticLayer):
    """A layer of a static cache for one step: it lets attention see the new keys and values in their places, and
    holds them alone."""

    def __init__(self, keys: torch.Tensor, values: torch.Tensor, filled: torch.Tensor) -> None:
        super().__init__(keys.shape[2])
        self.dtype, self.device = keys.dtype, keys.device
        self.keys, self.values, self.cumulative_length = keys, values, filled
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        new = torch.arange(key_states.shape[2], device=key_states.device) + self.cumulative_length
        assert self.keys is not None and self.values is not None  # given when it was made
        keys = self.keys.index_copy(2, new, key_states)
        values = self.values.index_copy(2, new, value_states)
        self.keys, self.values = key_states, value_states
        return keys, values


def _dynamic(layers: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds these keys and values as they are: built of them, it would copy them behind nothing."""
    cache = DynamicCache()
    for keys, values in layers:
        cache.layers.append(DynamicLayer())
        hold(cache.layers[-1], keys, values)
    return cache


def hold(layer: Any, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Put keys and values into a layer of a cache, in place of what it held."""
    if not layer.is_initialized:
        layer.lazy_initialization(keys, values)
    layer.keys, layer.values = keys, values
