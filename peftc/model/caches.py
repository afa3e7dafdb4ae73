"""Hugging Face caches: made fit for graphs, which take and give what they hold as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DummyLayer,
    DynamicCache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from peftc.errors import CaptureError, UncachedError
from peftc.graph.arguments import OWN_MASK
from peftc.graph.cache import FILLED, by_layer, flatten_cache, fresh, hold, pair, parts_of, whole

# Layers that are used as they are: of a dynamic cache, and of a static one.
_AS_IT_IS = (
    DynamicLayer,
    DynamicIndexedLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    DummyLayer,
)
_OF_ONE_SIZE = (StaticLayer, LinearAttentionLayer, DummyLayer)


def prepared(cache: Cache | None, config: PreTrainedConfig) -> Cache:
    """The cache to go on from, or a new one. Raises CaptureError where a graph cannot use its kind, UncachedError where
    that is the model's own."""
    if cache is None:
        several = config.is_encoder_decoder
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache()) if several else DynamicCache()
    own = parts_of(cache)["self"]
    if isinstance(own, DynamicCache) and not own.layers:
        own.layers[:] = fresh(config).layers
    for part in parts_of(cache).values():
        if isinstance(part, StaticCache):
            _as_one_size(part)
            continue
        if not isinstance(part, DynamicCache):
            raise _refusal(part)
        part.layers[:] = [_whole(layer, config) for layer in part.layers]
        if part.layer_class_to_replicate is DynamicSlidingWindowLayer:
            part.layer_class_to_replicate = DynamicLayer
    return cache


def _whole(layer: Any, config: PreTrainedConfig) -> Any:
    """A layer that keeps every token: graphs mask what a window leaves out, so none may be dropped."""
    if type(layer) in _AS_IT_IS:
        return _unrecorded(layer)
    kept = whole(layer)
    if kept is layer:
        own = type(layer) in map(type, fresh(config).layers)
        raise _unknown(layer) if own else _refusal(layer)
    keys, values = layer.keys, layer.values
    if keys is not None and values is not None:
        if layer.cumulative_length != keys.shape[-2]:
            raise _refusal(layer, " that has dropped tokens")
        if isinstance(layer, LinearAttentionLayer):
            raise _refusal(layer, " that is filled")
        kept.lazy_initialization(keys, values)
        kept.keys, kept.values = keys, values
    return kept


def _unrecorded(layer: Any) -> Any:
    """A layer whose states are those of the last token alone: of others it could be put back by some tokens."""
    if getattr(layer, "record_past", False):
        raise _refusal(layer, " that can be cropped, as assisted generation needs it")
    return layer


def _as_one_size(cache: StaticCache) -> None:
    """Make every layer keep every token. Raises CaptureError where a window has no place for them."""
    if getattr(cache, "offloading", False):
        raise _refusal(cache, " that is offloaded")
    whole = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    for i, layer in enumerate(cache.layers):
        if type(layer) in _OF_ONE_SIZE:
            _unrecorded(layer)
        elif type(layer) is StaticSlidingWindowLayer and whole and not layer.is_initialized:
            cache.layers[i] = StaticLayer(whole[0])
        else:
            raise _refusal(layer)


def _attention(cache: Any) -> Any:
    """The first layer that holds keys; None where all hold states, which have one size in any cache."""
    layers = parts_of(cache)["self"].layers
    return next((layer for layer in layers if isinstance(layer, CacheLayerMixin)), None)


def is_static(cache: Any) -> bool:
    return isinstance(_attention(cache), StaticLayer)


def is_empty(cache: Any) -> bool:
    """Whether nothing is in a cache; of a static one torch.compile may not ask how much is."""
    for layer in parts_of(cache)["self"].layers:
        if isinstance(layer, LinearAttentionLayer):
            return not any(layer.has_previous_state.values())
    if not is_static(cache):
        return bool(parts_of(cache)["self"].get_seq_length() == 0)
    layer = _attention(cache)
    if not layer.is_initialized:
        return True
    return not torch.compiler.is_compiling() and int(layer.cumulative_length) == 0


def past(cache: Any, tensors: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What a step reads of a cache; its mask as long as a static one, in which `rows` stand before the tokens."""
    found = flatten_cache(cache)
    if is_static(cache):
        found[FILLED] = _attention(cache).cumulative_length
        name = OWN_MASK[isinstance(cache, EncoderDecoderCache)]
        if name in tensors and tensors[name].ndim == 2:
            _require_one_token(cache, tensors)
            found[name] = widened(tensors[name], cache, rows)
    return found


def _require_one_token(cache: Any, tensors: Mapping[str, Any]) -> None:
    """States are masked by the last places of a mask, which in a static cache are not those of the new tokens."""
    layers = parts_of(cache)["self"].layers
    ids = tensors.get("input_ids")
    if ids is not None and ids.shape[1] > 1:
        if any(isinstance(layer, LinearAttentionLayer) for layer in layers):
            raise CaptureError(
                "a compiled model with states takes one token at a time behind the first call with a static cache; "
                "leave the mask out, or `prefill_chunk_size` or `cache_implementation` unset"
            )


def widened(mask: torch.Tensor, cache: Any, rows: int, value: int = 0) -> torch.Tensor:
    """A mask of the tokens so far, [batch, tokens], as one of all places of a static cache but the `rows` in front.
    What the later places have does not matter: no query sees them."""
    more = _attention(cache).max_cache_len - rows - mask.shape[1]
    return mask if more == 0 else functional.pad(mask, (0, more), value=value)


def _unknown(layer: object) -> UncachedError:
    return UncachedError(
        f"its configuration asks for a {type(layer).__name__} in its cache, which no graph takes; call it with "
        "use_cache=False"
    )


def _refusal(found: object, more: str = "") -> CaptureError:
    return CaptureError(
        f"a compiled model generates with DynamicCache or StaticCache, not {type(found).__name__}{more}; "
        "leave `cache_implementation` unset"
    )


def fill(cache: Any, fields: Mapping[str, Any], rows: int) -> None:
    """Put what a step gave into the cache: in place of what it held; keys and values into a static one, which has
    `rows` places more, behind that."""
    for part, one in parts_of(cache).items():
        for i, found in by_layer(fields, part).items():
            while len(one.layers) <= i:
                one.layers.append(DynamicLayer())
            layer: Any = one.layers[i]
            if isinstance(layer, StaticLayer):
                _append(layer, *pair(found), rows if part == "self" else None)
            else:
                hold(layer, found)
            if part == "cross":
                cache.is_updated[i] = True


def _append(layer: Any, keys: torch.Tensor, values: torch.Tensor, rows: int | None) -> None:
    """Write into a layer of a static cache, in place; one of no `rows` gets the size of what is written."""
    if not layer.is_initialized:
        layer.max_cache_len = keys.shape[2] if rows is None else layer.max_cache_len + rows
        layer.lazy_initialization(keys, values)
    new = torch.arange(keys.shape[2], device=keys.device) + layer.cumulative_length
    layer.keys.index_copy_(2, new, keys)
    layer.values.index_copy_(2, new, values)
    layer.cumulative_length.add_(keys.shape[2])
