"""Caches as flat tensors: one name for each layer's keys and values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache

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


def unflatten_cache(tensors: Mapping[str, Any], encoder_decoder: bool) -> Any:
    """The cache that `flatten_cache` was given, empty where `tensors` have none of it."""
    parts = [
        _dynamic(pairs(tensors, part))
        for part in (("self", "cross") if encoder_decoder else ("self",))
    ]
    return EncoderDecoderCache(*parts) if encoder_decoder else parts[0]


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
