"""The classes of models that transformers registers, each built small from its default configuration.

Sizes alone are changed, by the names that configurations share for what a number counts; no model has a row here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from peftc.graph.arguments import seeded_inputs

MAPPINGS = (
    "CAUSAL_LM",
    "SEQ_TO_SEQ_CAUSAL_LM",
    "MASKED_LM",
    "SEQUENCE_CLASSIFICATION",
    "TOKEN_CLASSIFICATION",
    "QUESTION_ANSWERING",
    "IMAGE_CLASSIFICATION",
    "SPEECH_SEQ_2_SEQ",
    "AUDIO_CLASSIFICATION",
    "IMAGE_TEXT_TO_TEXT",
)
VOCABULARY = 1000
EXPERTS = 8
# Widths are divided by, and layers at most, the first of these with which a model is built and runs.
SIZES = ((16, 2), (8, 2), (4, 2), (16, 8), (8, 8), (2, 2), (1, 2))
LARGEST = 250_000_000  # parameters
WIDE = 32  # what a width is at least


@dataclass(frozen=True)
class Registered:
    """A class, under the first of the mappings that has it."""

    name: str
    mapping: str
    config: str

    @property
    def cls(self) -> type[PreTrainedModel]:
        found: type[PreTrainedModel] = getattr(transformers, self.name)
        return found


def registered() -> tuple[Registered, ...]:
    """Every class of the ten mappings, once."""
    found: dict[str, Registered] = {}
    for mapping in MAPPINGS:
        for kind, names in getattr(auto, f"MODEL_FOR_{mapping}_MAPPING_NAMES").items():
            for name in names if isinstance(names, list | tuple) else (names,):
                found.setdefault(name, Registered(name, mapping, kind))
    return tuple(found.values())


class Skipped(Exception):
    """A class that cannot be built small, or does not run eagerly: its own error."""


@dataclass(frozen=True)
class Built:
    model: PreTrainedModel
    inputs: Mapping[str, torch.Tensor]
    divided: int


def build(one: Registered) -> Built:
    """The class at its smallest that runs eagerly, in float32, its weights wide enough that every part matters, with a
    batch. Raises Skipped with what the class itself says at its smallest."""
    error: Exception | None = None
    for factor, layers in SIZES:
        try:
            config = small(one.cls.config_class(), factor, layers)
            if _count(one.cls, config) > LARGEST:
                continue
            torch.manual_seed(0)
            model = _wide(one.cls(config))
            inputs = seeded_inputs(model)
            with torch.no_grad():
                model(**inputs)
            return Built(model, inputs, factor)
        except Exception as found:  # whatever code of any model raises
            error = found
    if error is None:
        raise Skipped(f"has more than {LARGEST:,} parameters")
    raise Skipped(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _count(cls: type[PreTrainedModel], config: PretrainedConfig) -> int:
    """How many parameters a model would have; 0 where its code makes none without memory."""
    try:
        with torch.device("meta"):
            return sum(one.numel() for one in cls(config).parameters())
    except Exception:
        return 0


def _wide(model: PreTrainedModel) -> PreTrainedModel:
    with torch.no_grad():
        for weight in model.parameters():
            if not weight.is_floating_point():
                continue
            if weight.ndim > 1:
                weight.mul_(4)
            else:
                weight.add_(torch.randn_like(weight) * 0.1)
    return model.eval()


# What a number of a configuration counts, by its name; the first that matches says what becomes of it.
_RULES: tuple[tuple[str, Callable[[int, int], int]], ...] = (
    (r"vocab_size", lambda n, _: min(n, VOCABULARY)),
    (r"(^|_)(id|ids|idx|index)$", lambda n, _: n if n < VOCABULARY else VOCABULARY - 1 - n % 97),
    (r"^(n_|num_)?.*experts?(_num)?$", lambda n, _: min(n, EXPERTS)),
    (r"experts?_per_tok|topk$|top_k$|moe_k$", lambda n, _: min(n, 2)),
    (r"^n_group$|^topk_group$|num_expert_group", lambda n, _: min(n, 1)),
    (r"depths|layers?$|depth$|_blocks$|num_stages", lambda n, _: n),  # `_cut` has these
    (
        r"position|max_|_size_base|image_size|patch|theta|kernel|stride|window|chunk|length|seq|"
        r"sampling|frames|tokens|buckets|labels|heads?$|groups?$|channels$.*3|bins|resolution|seed|"
        r"scale|factor|rate|second|offset|period|interval|every",
        lambda n, _: n,
    ),
    (r"", lambda n, factor: max(n // factor, 2) if n >= WIDE and n % factor == 0 else n),
)


def small(config: PretrainedConfig, factor: int, layers: int) -> PretrainedConfig:
    """A configuration of the same class with smaller numbers, and `layers`, or as many as it has kinds of them."""
    return type(config).from_dict(_smaller(_data(config), factor, layers))


def _data(config: PretrainedConfig) -> dict[str, Any]:
    data = {k: v for k, v in config.to_dict().items() if k not in ("id2label", "label2id")}
    return data | ({} if data.get("pad_token_id", 0) is not None else {"pad_token_id": 0})


def _smaller(data: Mapping[str, Any], factor: int, least: int) -> dict[str, Any]:
    layers = _layers(data, least)
    most = max(layers.values(), default=least)
    kept = {k: v for k, v in data.items() if not str(k).isdigit() or int(k) < most}
    return {k: _value(str(k), v, factor, layers, least) for k, v in kept.items()}


def _layers(data: Mapping[str, Any], least: int) -> dict[int, int]:
    """By a number of layers, how many are enough to have each kind that is listed, and no fewer than `least`."""
    counts = {
        v
        for k, v in data.items()
        if re.search(r"layers?$|^depth$", str(k)) and _is_number(v) and v > least
    }
    found = {}
    for count in counts:
        lists = [v for v in data.values() if isinstance(v, list | tuple) and len(v) == count]
        found[count] = max([least, *map(_prefix, lists)])
    return found


def _prefix(kinds: list[Any] | tuple[Any, ...]) -> int:
    """How many of the first have each kind that there is."""
    first = {str(kind): kinds.index(kind) for kind in kinds}
    return 2 if len(first) == len(kinds) else max(first.values()) + 1


def _value(name: str, value: Any, factor: int, layers: Mapping[int, int], least: int) -> Any:
    if isinstance(value, dict):
        return _smaller(value, factor, least)
    if isinstance(value, list | tuple):
        cut = value[: layers.get(len(value), len(value))]
        return [_value(name, one, factor, {}, least) for one in cut]
    if not _is_number(value):
        return value
    if re.search(r"layers?$|^depth$", name):
        return layers.get(value, min(value, least))
    if re.search(r"depths|_blocks$", name):
        return min(value, 2)
    return next(rule for pattern, rule in _RULES if re.search(pattern, name))(value, factor)


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
