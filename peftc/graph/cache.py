"""Caches as flat tensors: one name for each tensor that a layer of a cache holds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedConfig
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    StaticLayer,
)

# The input that says how many places of a static cache are filled: a tensor, so that one graph serves all steps.
FILLED = "past_length"
# The arguments that a model takes its cache by, and the fields that it gives it by.
CACHES = ("past_key_values", "cache_params")
# What a layer holds, and its attribute for it: keys and values of tokens, [batch, heads, length, dim], the keys of an
# indexer that chooses among tokens, [batch, length, dim], and states, [batch, ...], whose sizes no token changes and of
# which it may have several of a side.
TOKENS = {"key": "keys", "value": "values", "indexer": "indexer_keys"}
STATES = {"conv": "conv_states", "recurrent": "recurrent_states"}
# The tensors of a layer, by their side and number.
Held = dict[tuple[str, int], torch.Tensor]
# How the parts of a cache are called in an ONNX graph, as optimum has it.
_ONNX = {"self": "decoder", "cross": "encoder"}


@dataclass(frozen=True)
class CacheSlot:
    """A tensor of one layer.

    `part` is "self" (tokens so far) or "cross" (the encoder's states), `side` one of TOKENS or STATES, `number` that
    of a state.
    """

    part: str
    layer: int
    side: str
    number: int = 0

    @staticmethod
    def read(name: str) -> CacheSlot | None:
        """The slot that an input or an output of a graph is, or None."""
        if not name.startswith("past."):
            return None
        _, part, layer, side, *number = name.split(".")
        return CacheSlot(part, int(layer), side, *map(int, number))

    @property
    def name(self) -> str:
        return f"past.{self.part}.{self.layer}.{self._last}"

    @property
    def cross(self) -> bool:
        return self.part == "cross"

    def onnx(self, prefix: str, several: bool) -> str:
        """`present.0.decoder.key` of `several` parts, `present.0.key` of one, as optimum and others name it."""
        part = f"{_ONNX[self.part]}." if several else ""
        return f"{prefix}.{self.layer}.{part}{self._last}"

    @property
    def _last(self) -> str:
        return f"{self.side}.{self.number}" if self.number else self.side


def parts_of(cache: Any) -> dict[str, Any]:
    """The caches of one kind of attention each, by the name of their part."""
    if isinstance(cache, EncoderDecoderCache):
        return {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
    return {"self": cache}


def flatten_cache(cache: Any) -> dict[str, torch.Tensor]:
    """`past.self.0.key`, `past.self.0.value`, `past.self.1.conv`, ... and the same for `cross`: all that is held."""
    return {
        CacheSlot(part, i, side, number).name: one
        for part, own in parts_of(cache).items()
        for i, layer in enumerate(own.layers)
        for side, number, one in _held(layer)
        if one is not None
    }


def _held(layer: Any) -> Iterator[tuple[str, int, torch.Tensor | None]]:
    for side, attribute in TOKENS.items():
        yield side, 0, getattr(layer, attribute, None)
    for side, attribute in STATES.items():
        for number, one in getattr(layer, attribute, {}).items():
            yield side, number, one


def by_layer(tensors: Mapping[str, Any], part: str) -> dict[int, Held]:
    """What of `tensors` is of a part of a cache, by layer, in order."""
    found: dict[int, Held] = {}
    for name, one in tensors.items():
        slot = CacheSlot.read(name)
        if slot is not None and slot.part == part:
            found.setdefault(slot.layer, {})[slot.side, slot.number] = one
    return {i: found[i] for i in sorted(found)}


def pair(found: Held) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and the values of a layer."""
    return found["key", 0], found["value", 0]


def keys_of(tensors: Mapping[str, Any]) -> torch.Tensor | None:
    """The first keys of the tokens so far; None where a cache has states alone."""
    for name, one in tensors.items():
        slot = CacheSlot.read(name)
        if slot is not None and (slot.part, slot.side) == ("self", "key"):
            found: torch.Tensor = one
            return found
    return None


def fresh(config: PreTrainedConfig) -> DynamicCache:
    """An empty cache with a model's kinds of layers, of which none drops tokens: graphs mask what a window leaves
    out."""
    cache = DynamicCache(config=config.get_text_config(decoder=True))
    cache.layers[:] = [whole(layer) for layer in cache.layers]
    return cache


def holds_states(tensors: Iterable[str]) -> bool:
    """Whether tensors of these names hold states of a layer."""
    slots = map(CacheSlot.read, tensors)
    return any(slot is not None and slot.side in STATES for slot in slots)


def whole(layer: Any) -> Any:
    """A layer like one that drops what is behind a window, which keeps every token; any other as it is."""
    if type(layer) is DynamicSlidingWindowLayer:
        return DynamicLayer()
    if type(layer) is LinearAttentionAndSlidingWindowAttentionLayer:
        return LinearAttentionAndFullAttentionLayer(layer.number_of_states)
    return layer


def unflatten_cache(
    tensors: Mapping[str, Any], config: PreTrainedConfig, filled: torch.Tensor | None = None
) -> Any:
    """The cache that `flatten_cache` was given, empty where `tensors` have none of it; a static one, if `filled` says
    how far. A model writes into its states, so it gets copies of them."""
    own: Cache = fresh(config)
    for i, found in by_layer(tensors, "self").items():
        if filled is not None and isinstance(own.layers[i], CacheLayerMixin):
            own.layers[i] = _Step(*pair(found), filled)
        else:
            states = {k: v.clone() for k, v in found.items() if k[0] in STATES}
            hold(own.layers[i], found | states)
    if not config.is_encoder_decoder:
        return own
    cross = DynamicCache()
    for found in by_layer(tensors, "cross").values():
        cross.layers.append(DynamicLayer())
        hold(cross.layers[-1], found)
    return EncoderDecoderCache(own, cross)


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


def hold(layer: Any, tensors: Held) -> None:
    """Put tensors into a layer of a cache as they are, in place of what it held of their sides: filled by its own
    methods, it would copy them."""
    for (side, number), one in tensors.items():
        if side in TOKENS:
            if side == "indexer":
                layer.lazy_initialization_indexer(one)
            elif not layer.is_initialized:
                layer.lazy_initialization(one, one)
            setattr(layer, TOKENS[side], one)
            continue
        states = getattr(layer, STATES[side])
        if states[number] is None:
            layer.lazy_initialization(**{STATES[side]: one, "state_idx": number})
        states[number] = one
        layer.has_previous_state[number] = True
