"""Runners that write: Hugging Face's own `generate` over graphs of one step, with what its caches hold as tensors."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from safetensors.torch import load_file
from transformers.cache_utils import DynamicCache, DynamicLayer, EncoderDecoderCache
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    Seq2SeqLMOutput,
)

from peftc.runtime.runner import Runner, fed
from peftc.runtime.session import RuntimeFault, Session

# What stands in a cache before the tokens: rows by the names of a decoder's inputs.
ROWS = "rows.safetensors"
_PAST = re.compile(r"past_key_values\.(\d+)\.(?:(decoder|encoder)\.)?(key|value)")
# Arguments of `generate`'s calls that a graph has no use for.
_OURS = ("cache_position",)


@dataclass(frozen=True)
class _Slot:
    """An input of a graph that a layer of a cache holds; `present` is the output that replaces it."""

    name: str
    layer: int
    cross: bool
    attribute: str

    @property
    def present(self) -> str:
        return self.name.replace("past_key_values", "present", 1)


class _Layer(DynamicLayer):
    """`keys` and `values` are views of the tokens, behind rows that whoever reads, reorders or cuts a cache does not
    see; of a view that comes back as it was, the whole is known."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.wholes: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}

    def hold(self, attribute: str, tokens: torch.Tensor) -> None:
        if not self.is_initialized:
            self.lazy_initialization(tokens, tokens)
        setattr(self, attribute, tokens)

    def hold_behind(self, rows: int, attribute: str, whole: torch.Tensor) -> None:
        self.hold(attribute, whole[:, :, rows:])
        self.wholes[attribute] = getattr(self, attribute), whole


class Writes(Runner):
    """What runners of decoders have: caches that come and go as tensors, and the rows in front of them."""

    @property
    def _decoder(self) -> Session:
        return self.sessions[-1]

    @cached_property
    def _slots(self) -> tuple[_Slot, ...]:
        found = ((name, _PAST.fullmatch(name)) for name in self._decoder.inputs)
        return tuple(
            _Slot(name, int(one[1]), one[2] == "encoder", f"{one[3]}s")
            for name, one in found
            if one
        )

    @cached_property
    def _rows(self) -> Mapping[str, torch.Tensor]:
        file = self.directory / ROWS
        return load_file(file, device=self._decoder.device) if file.is_file() else {}

    def _fresh(self, cache: Any) -> dict[bool, Any]:
        """The caches of cross- and of self-attention, those that hold nothing made fit for graphs."""
        several = isinstance(cache, EncoderDecoderCache)
        parts = {False: cache.self_attention_cache if several else cache}
        if several:
            parts[True] = cache.cross_attention_cache
        for cross, part in parts.items():
            if not isinstance(part, DynamicCache):
                raise RuntimeFault(
                    f"a bundle generates with DynamicCache, not {type(part).__name__}; "
                    "leave `cache_implementation` unset"
                )
            if not any(isinstance(one, _Layer) for one in part.layers):
                if part.layers and part.get_seq_length():
                    raise RuntimeFault("a bundle goes on from a cache of its own only")
                count = max((s.layer for s in self._slots if s.cross is cross), default=-1) + 1
                part.layers[:] = [_Layer() for _ in range(count)]
        return parts

    def _past(self, parts: Mapping[bool, Any], batch: int) -> Iterator[tuple[str, torch.Tensor]]:
        """What a step reads of caches, rows in front."""
        for slot in self._slots:
            layer = parts[slot.cross].layers[slot.layer]
            tokens, rows = getattr(layer, slot.attribute), self._rows.get(slot.name)
            if tokens is None:
                _, heads, _, width = self._decoder.shape(slot.name)
                tokens = torch.zeros(
                    batch, int(heads), 0, int(width), device=self.device, dtype=self.dtype
                )
            if rows is None:
                yield slot.name, tokens
                continue
            known, whole = layer.wholes.get(slot.attribute, (None, None))
            if known is not tokens:
                whole = torch.cat([rows.expand(batch, -1, -1, -1), tokens], 2)
                if tokens.shape[2]:
                    layer.wholes[slot.attribute] = tokens, whole
            yield slot.name, whole

    def _keep(self, parts: Mapping[bool, Any], out: Mapping[str, torch.Tensor]) -> None:
        """Put what a step gave into the caches."""
        for slot in self._slots:
            if slot.present in out:
                rows = self._rows.get(slot.name)
                count = 0 if rows is None else rows.shape[2]
                layer = parts[slot.cross].layers[slot.layer]
                layer.hold_behind(count, slot.attribute, out[slot.present])


def _cache(given: Mapping[str, Any], empty: Callable[[], Any]) -> tuple[Any, Any]:
    """What a step reads and fills, and what it gives back: whoever wants no cache gives all tokens again."""
    cache = given.get("past_key_values")
    if cache is not None:
        return cache, cache
    cache = empty()
    return cache, None if given.get("use_cache") is False else cache


class TextGeneration(Writes):
    """A causal language model: `generate` is its class's own."""

    def forward(self, *args: Any, **kwargs: Any) -> CausalLMOutputWithPast:
        """One step: tokens behind those in `past_key_values`, which come back unless `use_cache` is False."""
        given = self.named(args, kwargs)
        cache, kept = _cache(given, DynamicCache)
        parts, ids = self._fresh(cache), given["input_ids"]
        total = ids.shape[1] + cache.get_seq_length()
        mask = given.setdefault("attention_mask", ids.new_ones(ids.shape[0], total))
        if "position_ids" not in given and mask.ndim == 2:
            places = (mask.cumsum(1) - 1).clamp(min=0)
            given["position_ids"] = places[:, -ids.shape[1] :]
        feeds = fed(self._decoder, given, ("position_ids", *_OURS))
        out = self._decoder.run(feeds | dict(self._past(parts, ids.shape[0])))
        self._keep(parts, out)
        return CausalLMOutputWithPast(logits=out["logits"], past_key_values=kept)

    def text_generation(self, texts: Any, **options: Any) -> Any:
        """For each text, or chat, `[{"generated_text"}]`, as transformers' pipeline of this name."""
        return self.pipeline("text-generation", tokenizer=self.tokenizer)(texts, **options)


class Text2TextGeneration(Writes):
    """An encoder-decoder of texts: `generate` is its class's own."""

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        return _Encoder(self.sessions[0])

    def forward(self, *args: Any, **kwargs: Any) -> Seq2SeqLMOutput:
        """One step, as a causal model's. Cross keys and values ride in `encoder_outputs.hidden_states`."""
        given = self.named(args, kwargs)
        cache, kept = _cache(given, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()))
        parts, ids = self._fresh(cache), given["decoder_input_ids"]
        rows, encoded = ids.shape[0], given.get("encoder_outputs")
        if encoded is None:
            encoder = self.get_encoder()
            encoded = encoder(**{k: v for k, v in given.items() if k in encoder.session.inputs})
        if not parts[True].get_seq_length():
            self._fill_cross(cache, encoded.hidden_states, rows)
        step = {"input_ids": ids}
        if "encoder_attention_mask" in self._decoder.inputs:
            full = torch.ones(encoded[0].shape[:2], dtype=torch.long, device=self.device)
            step["encoder_attention_mask"] = given.get("attention_mask", full)
        out = self._decoder.run(step | dict(self._past(parts, rows)))
        self._keep(parts, out)
        return Seq2SeqLMOutput(logits=out["logits"], past_key_values=kept)

    def _fill_cross(self, cache: Any, states: Sequence[torch.Tensor], rows: int) -> None:
        """`generate` expands tensors for beams, not tuples of them."""
        layers = cache.cross_attention_cache.layers
        for i, state in enumerate(states):
            tokens = state.repeat_interleave(rows // state.shape[0], 0)
            layers[i // 2].hold(("keys", "values")[i % 2], tokens)
        cache.is_updated.update(dict.fromkeys(range(len(layers)), True))

    def text2text_generation(
        self, texts: Sequence[str], batch: int = 8, **options: Any
    ) -> list[dict[str, str]]:
        """For each text `{"generated_text"}`, by `generate(**options)`."""
        found: list[str] = []
        for start in range(0, len(texts), batch):
            encoded = self.encode(texts[start : start + batch])
            encoded.pop("token_type_ids", None)
            runner: Any = self
            tokens = runner.generate(**encoded, **options)
            found += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [{"generated_text": one} for one in found]


class SpeechRecognition(Text2TextGeneration):
    """An encoder-decoder that writes what it hears."""

    def automatic_speech_recognition(self, sounds: Any, **options: Any) -> Any:
        """For each sound, a file or `{"raw", "sampling_rate"}`, `{"text"}`, as transformers' pipeline of this name."""
        parts = {
            "tokenizer": self.processor.tokenizer,
            "feature_extractor": self.processor.feature_extractor,
        }
        return self.pipeline("automatic-speech-recognition", **parts)(sounds, **options)


class _Encoder:
    def __init__(self, session: Session) -> None:
        self.session = session
        self.main_input_name = next(n for n in session.inputs if n != "attention_mask")

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        given = {k: v for k, v in kwargs.items() if v is not None}
        given |= dict(zip((self.main_input_name,), args, strict=True)) if args else {}
        feeds = {name: given[name] for name in self.session.inputs if name in given}
        out = self.session.run(fed(self.session, feeds))
        hidden = out.pop("last_hidden_state")
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(out.values()))

    __call__ = forward
