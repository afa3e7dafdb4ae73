"""Run an ONNX bundle: classify, or generate with Hugging Face's own generation loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, GenerationConfig
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from peftc.delta import MANIFEST, read_manifest
from peftc.session import CPU, RuntimeFault, Session


def load(
    bundle_dir: str | Path, providers: Sequence[str] = CPU, *, allow_cpu_fallback: bool = False
) -> Classifier | Seq2Seq:
    """A runner for a bundle. Raises RuntimeFault or DeltaError when the bundle is damaged, or a provider
    is missing and falling back to the CPU was not allowed."""
    directory = Path(bundle_dir)
    manifest = read_manifest(directory, ("kind", "graphs"))
    try:
        runner, roles = _RUNNERS[manifest["kind"]]
        files = [directory / Path(manifest["graphs"][role]["file"]).name for role in roles]
    except (KeyError, TypeError) as error:
        raise RuntimeFault(
            f"{directory / MANIFEST} is damaged: no such kind or graph: {error}"
        ) from error
    for file in files:
        if not file.is_file():
            raise RuntimeFault(f"{directory} lacks {file.name}")
    sessions = [Session.open(file, providers, allow_cpu_fallback) for file in files]
    opened: Classifier | Seq2Seq = runner(directory, *sessions)
    return opened


def _settings(kind: Any, directory: Path, name: str) -> Any:
    """`config.json` or `generation_config.json`, never from the hub."""
    if not (directory / name).is_file():
        raise RuntimeFault(f"{directory} lacks {name}")
    try:
        return kind.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise RuntimeFault(f"{directory / name} is damaged: {str(error)[:200]}") from error


class _Texts:
    """The tokenizer of a bundle, when it has one."""

    directory: Path

    @cached_property
    def tokenizer(self) -> Any:
        if not (self.directory / "tokenizer_config.json").is_file():
            raise RuntimeFault(f"{self.directory} holds no tokenizer; pass token ids instead")
        return AutoTokenizer.from_pretrained(self.directory, local_files_only=True)

    @cached_property
    def max_tokens(self) -> int:
        """The longest text that there are positions for, besides rows in front of it."""
        said = read_manifest(self.directory, ("kind", "graphs")).get("max_tokens")
        return said if isinstance(said, int) else 512

    def encode(self, texts: Sequence[str], longest: int | None = None) -> dict[str, torch.Tensor]:
        most = self.tokenizer.model_max_length  # RoBERTa's is below its positions
        longest = min(most, self.max_tokens, longest or most)
        encoded = self.tokenizer(
            list(texts), padding=True, truncation=True, max_length=longest, return_tensors="pt"
        )
        return dict(encoded)


class Classifier(_Texts):
    """A sequence classifier on ONNX Runtime."""

    def __init__(self, directory: Path, session: Session) -> None:
        self.directory, self.session = directory, session
        self.config = _settings(AutoConfig, directory, "config.json")

    def logits(self, input_ids: torch.Tensor, **inputs: torch.Tensor) -> torch.Tensor:
        """[batch, labels] of token ids [batch, length]; a missing mask means no padding."""
        given = {"attention_mask": torch.ones_like(input_ids), "input_ids": input_ids, **inputs}
        if "token_type_ids" in self.session.inputs:
            given.setdefault("token_type_ids", torch.zeros_like(input_ids))
        feeds = {name: given[name] for name in self.session.inputs}
        return self.session.run(feeds)["logits"].cpu()

    def classify(
        self, texts: Sequence[str], batch: int = 32, max_length: int = 512
    ) -> list[tuple[str, float]]:
        """The label and its probability for each text."""
        found = []
        for start in range(0, len(texts), batch):
            logits = self.logits(**self.encode(texts[start : start + batch], max_length))
            scores, labels = logits.softmax(-1).max(-1)
            found += [
                (str(self.config.id2label[i]), s)
                for i, s in zip(labels.tolist(), scores.tolist(), strict=True)
            ]
        return found


class Seq2Seq(_Texts, GenerationMixin):
    """An encoder-decoder on ONNX Runtime; `generate` is Hugging Face's."""

    main_input_name = "input_ids"
    base_model_prefix = ""
    training = False
    _is_stateful = False
    _supports_cache_class = True
    _can_compile_fullgraph = False

    def __init__(self, directory: Path, encoder: Session, decoder: Session) -> None:
        self.directory, self._encoding, self._decoding = directory, encoder, decoder
        self.config = _settings(AutoConfig, directory, "config.json")
        self.generation_config = _settings(GenerationConfig, directory, "generation_config.json")
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


# The runner of each kind of bundle, and the graphs it takes in order.
_RUNNERS: Mapping[str, tuple[Any, tuple[str, ...]]] = {
    "classifier": (Classifier, ("model",)),
    "seq2seq": (Seq2Seq, ("encoder", "decoder")),
}
