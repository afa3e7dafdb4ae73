"""An encoder-decoder on ONNX Runtime, with Hugging Face's own generation loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peftc.runtime.session import Session
from peftc.runtime.texts import Texts, settings


class Seq2Seq(Texts, GenerationMixin):
    """An encoder-decoder on ONNX Runtime; `generate` is Hugging Face's."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    training = False
    _is_stateful = False
    _supports_cache_class = True
    _can_compile_fullgraph = False

    def __init__(self, directory: Path, encoder: Session, decoder: Session) -> None:
        self.directory, self._encoding, self._decoding = directory, encoder, decoder
        self.config = settings(AutoConfig, directory, "config.json")
        self.generation_config = settings(GenerationConfig, directory, "generation_config.json")
        self.device = torch.device(decoder.device)
        self.dtype = torch.float32
        self.layers = sum(name.endswith(".decoder.key") for name in decoder.inputs)
        _, heads, _, width = decoder.shape("past_key_values.0.decoder.key")
        self.heads, self.width = int(heads), int(width)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.forward(*args, **kwargs)

    def can_generate(self) -> bool:
        return True

    def is_remote_code(self) -> bool:
        return False

    def get_experts_implementation(self) -> Mapping[str, str]:
        return {}

    def set_experts_implementation(self, *_: Any) -> None:
        """Nothing to set: generate asks before and after."""

    @property
    def name_or_path(self) -> str:
        return ""

    def get_encoder(self, *_: Any, **__: Any) -> Any:
        return _Encoder(self._encoding)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: Any = None,
        **_: Any,
    ) -> Seq2SeqLMOutput:
        """One step. Cross keys and values ride in `encoder_outputs.hidden_states`."""
        assert decoder_input_ids is not None and past_key_values is not None
        own, cross = past_key_values.self_attention_cache, past_key_values.cross_attention_cache
        first = own.get_seq_length() == 0
        rows = decoder_input_ids.shape[0]
        if first:
            self._fill_cross(past_key_values, encoder_outputs.hidden_states, rows)
        if attention_mask is None:
            attention_mask = torch.ones(encoder_outputs[0].shape[:2], dtype=torch.long)
        feeds = {"input_ids": decoder_input_ids, "encoder_attention_mask": attention_mask}
        empty = torch.zeros(rows, self.heads, 0, self.width)
        for i in range(self.layers):
            for side in ("key", "value"):
                past = empty if first else getattr(own.layers[i], f"{side}s")
                feeds[f"past_key_values.{i}.decoder.{side}"] = past
                feeds[f"past_key_values.{i}.encoder.{side}"] = getattr(cross.layers[i], f"{side}s")
        out = self._decoding.run(feeds)
        for i in range(self.layers):
            key, value = out[f"present.{i}.decoder.key"], out[f"present.{i}.decoder.value"]
            if first:
                own.update(key, value, i)
            else:
                own.layers[i].keys, own.layers[i].values = key, value
        return Seq2SeqLMOutput(logits=out["logits"], past_key_values=past_key_values)

    def _fill_cross(self, cache: Any, states: Sequence[torch.Tensor], rows: int) -> None:
        """`generate` expands tensors for beams, not tuples of them."""
        states = [one.repeat_interleave(rows // one.shape[0], 0) for one in states]
        for i in range(self.layers):
            cache.cross_attention_cache.update(states[2 * i], states[2 * i + 1], i)
            cache.is_updated[i] = True

    def write(self, texts: Sequence[str], batch: int = 8, **options: Any) -> list[str]:
        """A text for each text, by `generate(**options)`."""
        found: list[str] = []
        for start in range(0, len(texts), batch):
            encoded = self.encode(texts[start : start + batch])
            encoded.pop("token_type_ids", None)
            runner: Any = self
            tokens = runner.generate(**encoded, **options)
            found += self.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return found


class _Encoder:
    main_input_name = "input_ids"

    def __init__(self, session: Session) -> None:
        self.session = session

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **_: Any
    ) -> BaseModelOutput:
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        out = self.session.run({"input_ids": input_ids, "attention_mask": attention_mask})
        hidden = out.pop("last_hidden_state")
        return BaseModelOutput(last_hidden_state=hidden, hidden_states=tuple(out.values()))

    __call__ = forward
