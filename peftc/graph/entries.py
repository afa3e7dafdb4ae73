"""Entries: the ways into a model, and caches as flat tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from peftc.graph.arguments import Tensors

Outputs = tuple[type, dict[str, Any]]


@dataclass(frozen=True)
class Entry:
    """A way into a model: `call(model, tensors, flags)` gives its output class and output tensors."""

    name: str
    call: Callable[[PreTrainedModel, Tensors, Mapping[str, Any]], Outputs]


def _forward(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    tensors = dict(tensors)
    hidden = tensors.pop("encoder_hidden_states", None)
    encoded = (
        {} if hidden is None else {"encoder_outputs": BaseModelOutput(last_hidden_state=hidden)}
    )
    return _plain(model(**tensors, **encoded, **flags, return_dict=True))


def _encode(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    return _plain(model.get_encoder()(**tensors, **flags, return_dict=True))


def _cached(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    """One step with a cache: flat past keys and values in, flat present ones out."""
    inputs = {k: v for k, v in tensors.items() if not k.startswith("past.")}
    cache = unflatten_cache(tensors, bool(model.config.is_encoder_decoder))
    hidden = inputs.pop("encoder_hidden_states", None)
    if model.config.is_encoder_decoder:
        if hidden is None:  # cross keys are cached, so the encoder's output is not read
            past = tensors["past.cross.0.key"]
            hidden = past.new_zeros(past.shape[0], past.shape[2], 1)
        inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=hidden)  # type: ignore[assignment]
    out = model(**inputs, **flags, past_key_values=cache, use_cache=True, return_dict=True)
    present = flatten_cache(out.past_key_values)
    fixed = {k for k in present if ".cross." in k and k in tensors}
    return type(out), {"logits": out.logits} | {k: v for k, v in present.items() if k not in fixed}


def _cross(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    """The encoder, and the cross-attention keys and values that every decoder layer makes of it."""
    output_type, encoded = _encode(model, tensors, flags)
    hidden = encoded["last_hidden_state"]
    mask = {"attention_mask": tensors["attention_mask"]} if "attention_mask" in tensors else {}
    token = torch.ones(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
    step = {"decoder_input_ids": token, "encoder_hidden_states": hidden, **mask}
    _, present = _cached(model, step, {})
    cross = {k: v for k, v in present.items() if ".cross." in k}
    return output_type, {"last_hidden_state": hidden, **cross}


ENTRIES = {
    e.name: e
    for e in (
        Entry("forward", _forward),
        Entry("encode", _encode),
        Entry("prefill", _cached),
        Entry("decode", _cached),
        Entry("encode_cross", _cross),
    )
}


def _plain(output: Any) -> Outputs:
    fields = {k: v for k, v in output.items() if k != "past_key_values" and v is not None}
    return type(output), fields


def flatten_cache(cache: Any) -> dict[str, torch.Tensor]:
    """`past.self.0.key`, `past.self.0.value`, ... and the same for `cross`; tensors [batch, heads, length, dim]."""
    parts = (
        {"self": cache.self_attention_cache, "cross": cache.cross_attention_cache}
        if isinstance(cache, EncoderDecoderCache)
        else {"self": cache}
    )
    return {
        f"past.{part}.{i}.{side}": getattr(layer, f"{side}s")
        for part, one in parts.items()
        for i, layer in enumerate(one.layers)
        for side in ("key", "value")
    }


def unflatten_cache(tensors: Tensors, encoder_decoder: bool) -> Any:
    def one(part: str) -> DynamicCache:
        count = sum(k.startswith(f"past.{part}.") for k in tensors) // 2
        pairs = [
            (tensors[f"past.{part}.{i}.key"], tensors[f"past.{part}.{i}.value"])
            for i in range(count)
        ]
        return DynamicCache(pairs or None)

    if not encoder_decoder:
        return one("self")
    return EncoderDecoderCache(one("self"), one("cross"))
