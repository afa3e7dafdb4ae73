"""Hugging Face caches: made fit for graphs, which take and give keys and values as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from peftc.graph.arguments import CaptureError
from peftc.graph.cache import hold, pairs, parts_of


def prepared(cache: Cache | None, encoder_decoder: bool) -> Cache:
    """The cache to go on from, or a new one. Raises CaptureError where a graph cannot use its kind."""
    if cache is None:
        fresh = DynamicCache(), DynamicCache()
        return EncoderDecoderCache(*fresh) if encoder_decoder else fresh[0]
    for part in parts_of(cache).values():
        if not isinstance(part, DynamicCache):
            raise _refusal(part)
        part.layers[:] = [_whole(layer) for layer in part.layers]
        if part.layer_class_to_replicate is DynamicSlidingWindowLayer:
            part.layer_class_to_replicate = DynamicLayer
    return cache


def _whole(layer: Any) -> Any:
    """A layer that keeps every token: graphs mask what a window leaves out, so none may be dropped."""
    if type(layer) is DynamicLayer:
        return layer
    if type(layer) is not DynamicSlidingWindowLayer:
        raise _refusal(layer)
    whole = DynamicLayer()
    keys, values = layer.keys, layer.values
    if keys is not None and values is not None:
        if layer.cumulative_length != keys.shape[-2]:
            raise _refusal(layer, " that has dropped tokens")
        hold(whole, keys, values)
    return whole


def _refusal(found: object, more: str = "") -> CaptureError:
    return CaptureError(
        f"a compiled model generates with DynamicCache, not {type(found).__name__}{more}; "
        "leave `cache_implementation` unset"
    )


def fill(cache: Any, fields: Mapping[str, Any]) -> None:
    """Put a step's present keys and values into the cache, in place of what it held."""
    for part, one in parts_of(cache).items():
        for i, (keys, values) in enumerate(pairs(fields, part)):
            while len(one.layers) <= i:
                one.layers.append(DynamicLayer())
            hold(one.layers[i], keys, values)
            if part == "cross":
                cache.is_updated[i] = True
