"""Hugging Face caches: made fit for graphs, which take and give keys and values as tensors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional
from transformers.cache_utils import (
    Cache,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from peftc.graph.arguments import OWN_MASK, CaptureError
from peftc.graph.cache import FILLED, CacheSlot, flatten_cache, hold, pairs, parts_of


def prepared(cache: Cache | None, encoder_decoder: bool) -> Cache:
    """The cache to go on from, or a new one. Raises CaptureError where a graph cannot use its kind."""
    if cache is None:
        fresh = DynamicCache(), DynamicCache()
        return EncoderDecoderCache(*fresh) if encoder_decoder else fresh[0]
    for part in parts_of(cache).values():
        if isinstance(part, StaticCache):
            _as_one_size(part)
            continue
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


def _as_one_size(cache: StaticCache) -> None:
    """Make every layer keep every token. Raises CaptureError where a window has no place for them."""
    if getattr(cache, "offloading", False):
        raise _refusal(cache, " that is offloaded")
    whole = [layer.max_cache_len for layer in cache.layers if type(layer) is StaticLayer]
    if len(whole) == len(cache.layers):
        return
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer and whole and not layer.is_initialized:
            cache.layers[i] = StaticLayer(whole[0])
        elif type(layer) is not StaticLayer:
            raise _refusal(layer)


def is_static(cache: Any) -> bool:
    return isinstance(parts_of(cache)["self"], StaticCache)


def is_empty(cache: Any) -> bool:
    """Whether nothing is in a cache; of a static one torch.compile may not ask how much is."""
    own = parts_of(cache)["self"]
    if not is_static(cache):
        return bool(own.get_seq_length() == 0)
    if not own.layers[0].is_initialized:
        return True
    return not torch.compiler.is_compiling() and int(own.layers[0].cumulative_length) == 0


def past(cache: Any, tensors: Mapping[str, Any], rows: int) -> dict[str, Any]:
    """What a step reads of a cache; its mask as long as a static one, in which `rows` stand before the tokens."""
    found = flatten_cache(cache)
    if is_static(cache):
        found[FILLED] = parts_of(cache)["self"].layers[0].cumulative_length
        name = OWN_MASK[isinstance(cache, EncoderDecoderCache)]
        if name in tensors and tensors[name].ndim == 2:
            found[name] = widened(tensors[name], cache, rows)
    return found


def widened(mask: torch.Tensor, cache: Any, rows: int, value: int = 0) -> torch.Tensor:
    """A mask of the tokens so far, [batch, tokens], as one of all places of a static cache but the `rows` in front.
    What the later places have does not matter: no query sees them."""
    more = parts_of(cache)["self"].layers[0].max_cache_len - rows - mask.shape[1]
    return mask if more == 0 else functional.pad(mask, (0, more), value=value)


def _refusal(found: object, more: str = "") -> CaptureError:
    return CaptureError(
        f"a compiled model generates with DynamicCache or StaticCache, not {type(found).__name__}{more}; "
        "leave `cache_implementation` unset"
    )


def fill(cache: Any, fields: Mapping[str, Any], rows: int) -> None:
    """Put a step's present keys and values into the cache: in place of what it held; into a static one, which has
    `rows` places more, behind that."""
    for part, one in parts_of(cache).items():
        if isinstance(one, StaticCache):
            for i, new in enumerate(pairs(fields, part)):
                _append(one.layers[i], *new, rows if part == "self" else None)
                if part == "cross":
                    cache.is_updated[i] = True
            continue
        found = _sides(fields, part)
        for i, sides in sorted(found.items()):
            while len(one.layers) <= i:
                one.layers.append(DynamicLayer())
            layer: Any = one.layers[i]
            hold(layer, sides.get("key", layer.keys), sides.get("value", layer.values))
            if part == "cross":
                cache.is_updated[i] = True


def _sides(fields: Mapping[str, Any], part: str) -> dict[int, dict[str, torch.Tensor]]:
    """The keys and values of a part that a step gave, by layer; where only one of them changed, that."""
    found: dict[int, dict[str, torch.Tensor]] = {}
    for name, value in fields.items():
        slot = CacheSlot.read(name)
        if slot is not None and slot.part == part:
            found.setdefault(slot.layer, {})[slot.side] = value
    return found


def _append(layer: Any, keys: torch.Tensor, values: torch.Tensor, rows: int | None) -> None:
    """Write into a layer of a static cache, in place; one of no `rows` gets the size of what is written."""
    if not layer.is_initialized:
        layer.max_cache_len = keys.shape[2] if rows is None else layer.max_cache_len + rows
        layer.lazy_initialization(keys, values)
    new = torch.arange(keys.shape[2], device=keys.device) + layer.cumulative_length
    layer.keys.index_copy_(2, new, keys)
    layer.values.index_copy_(2, new, values)
    layer.cumulative_length.add_(keys.shape[2])
