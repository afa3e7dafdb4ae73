"""Entries: the ways into a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftc.errors import UncachedError
from peftc.graph.cache import (
    CACHES,
    FILLED,
    CacheSlot,
    flatten_cache,
    holds_states,
    unflatten_cache,
)
from peftc.graph.facts import ModelFacts

Outputs = tuple[Callable[..., Any], dict[str, Any]]
Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Quiet:
    """Makes outputs of a class without a cache, of a model that fills a cache and does not give it."""

    output_type: Callable[..., Any]

    def __call__(self, **fields: Any) -> Any:
        return self.output_type(**{k: v for k, v in fields.items() if k not in CACHES})


# The inputs that what an encoder gave comes in by: its states, and what it pools, where that is states as well,
# [batch, length, size].
ENCODED = ("encoder_hidden_states", "encoder_pooler_output")


def encoded(output: Any) -> dict[str, torch.Tensor]:
    """The inputs that an encoder's output becomes, of which a tuple has the states alone."""
    states, pooled = output[0], getattr(output, "pooler_output", None)
    both = pooled is not None and pooled.ndim == 3
    return dict(zip(ENCODED, (states, pooled) if both else (states,), strict=False))


@dataclass
class Encoded(BaseModelOutput):
    """What an encoder gave, of which ENCODED is kept: its other fields, whatever their names, are None. A model that is
    given another class than this one's base takes its fields by their place, what is pooled as hidden states."""

    pooler_output: torch.Tensor | None = None

    @staticmethod
    def take(tensors: dict[str, torch.Tensor]) -> Encoded | None:
        """What of `tensors` an encoder gave; it is taken out of them."""
        states, pooled = (tensors.pop(name, None) for name in ENCODED)
        return None if states is None else Encoded(last_hidden_state=states, pooler_output=pooled)

    def __getattr__(self, name: str) -> None:
        if name.startswith("__"):
            raise AttributeError(name)


@dataclass(frozen=True)
class Entry:
    """A way into a model: `call(model, tensors, flags)` gives its output class and output tensors.

    `starts`: it begins a cache. `steps`: it goes on from one. `static`: that cache has one size, and `past_length` says
    how much of it is filled. `encodes`: a later entry reads what it makes.
    """

    name: str
    call: Callable[[PreTrainedModel, Tensors, Mapping[str, Any]], Outputs]
    starts: bool = False
    steps: bool = False
    static: bool = False
    encodes: bool = False


def _forward(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    tensors = dict(tensors)
    given = Encoded.take(tensors)
    behind = {} if given is None else {"encoder_outputs": given}
    return _plain(model(**tensors, **behind, **flags, return_dict=True))


def _base(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    """The model below the head."""
    return _forward(model.base_model, tensors, flags)  # type: ignore[arg-type]


def _encode(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    return _plain(model.get_encoder()(**tensors, **flags, return_dict=True))


def _cached(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    """One step with a cache: flat past tensors in, flat present ones out; of a static cache the new keys and values
    alone. A model that keeps none gives its other fields alone."""
    inputs = {k: v for k, v in tensors.items() if CacheSlot.read(k) is None}
    facts = ModelFacts.read(model)
    cache = unflatten_cache(tensors, model.config, inputs.pop(FILLED, None))
    given = Encoded.take(inputs)
    if facts.encoder_decoder:
        if given is None:  # cross keys are cached, so the encoder's output is there and not read
            past = tensors[CacheSlot("cross", 0, "key").name]
            config = getattr(model.get_encoder(), "config", model.config)
            width = getattr(config, "hidden_size", 1)
            hidden = past.new_zeros(past.shape[0], past.shape[2], width)
            given = Encoded(last_hidden_state=hidden, pooler_output=hidden)
        inputs["encoder_outputs"] = given  # type: ignore[assignment]
    out = model(**inputs, **flags, **{facts.cache: cache}, use_cache=True, return_dict=True)
    output_type, fields = _plain(out)
    fields.pop("encoder_last_hidden_state", None)
    filled = out.get(facts.cache)
    if filled is None:  # an encoder fills the one that it was given
        filled, output_type = cache, Quiet(output_type)
    present = flatten_cache(filled)
    if model._is_stateful and not holds_states(present):
        raise UncachedError(
            f"{facts.name} keeps its states elsewhere than in a cache, which no graph sees; call it with use_cache=False"
        )
    return output_type, fields | {k: v for k, v in present.items() if not _is_fixed(k, tensors)}


def _is_fixed(name: str, tensors: Tensors) -> bool:
    """Cross keys that were given come out as they were."""
    slot = CacheSlot.read(name)
    return slot is not None and slot.cross and name in tensors


def _cross(model: PreTrainedModel, tensors: Tensors, flags: Mapping[str, Any]) -> Outputs:
    """The encoder, and the cross-attention keys and values that every decoder layer makes of it."""
    output_type, fields = _encode(model, tensors, flags)
    mask = {"attention_mask": tensors["attention_mask"]} if "attention_mask" in tensors else {}
    hidden = fields["last_hidden_state"]
    token = torch.ones(hidden.shape[0], 1, dtype=torch.long, device=hidden.device)
    given = encoded(output_type(**fields))
    step = {"decoder_input_ids": token, **given, **mask}
    _, present = _cached(model, step, {})
    slots = {k: CacheSlot.read(k) for k in present}
    cross = {k: present[k] for k, slot in slots.items() if slot is not None and slot.cross}
    return output_type, {"last_hidden_state": hidden, **cross}


ENTRIES = {
    e.name: e
    for e in (
        Entry("forward", _forward),
        Entry("base", _base),
        Entry("encode", _encode, encodes=True),
        Entry("prefill", _cached, starts=True),
        Entry("decode", _cached, steps=True),
        Entry("decode_static", _cached, steps=True, static=True),
        Entry("encode_cross", _cross, encodes=True),
    )
}


def _plain(output: Any) -> Outputs:
    fields = {k: v for k, v in output.items() if k not in CACHES and v is not None}
    return type(output), fields
