"""The classes of models that transformers registers, each built small from its default configuration.

Sizes alone are changed, by the names that configurations share for what a number counts; no model has a row here.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto import modeling_auto as auto

from peftc.graph.arguments import forward_flags, seeded_inputs

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


@dataclass(frozen=True)
class Shrink:
    """What widths are divided by, how many layers there are at most, what numbers of heads are divided by, and whether
    what a class leaves open, and its code needs, is given."""

    widths: int
    layers: int
    heads: int = 1
    fill: bool = False


# A class is built by the first of these with which it runs.
SIZES = (
    *(Shrink(*one) for one in ((16, 2), (8, 2), (4, 2), (16, 8), (8, 8))),
    *(Shrink(n, 2, n) for n in (16, 8)),
    *(Shrink(n, 2, fill=True) for n in (16, 8)),
    *(Shrink(n, 2) for n in (2, 1)),
)
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
    """The class at its smallest that runs eagerly, as it is called or else without a cache, in float32, its weights wide enough that every part matters, with a
    batch. Raises Skipped with what the class itself says at its smallest."""
    error: Exception | None = None
    for bare, shrink in itertools.product((True, False), SIZES):
        try:
            config = small(one.cls.config_class(), shrink)
            if _count(one.cls, config) > LARGEST:
                continue
            torch.manual_seed(0)
            model = _wide(one.cls(config))
            inputs = _inputs(model, {} if bare else forward_flags(model))
            return Built(model, inputs, shrink.widths)
        except Exception as found:  # whatever code of any model raises
            error = found
    if error is None:
        raise Skipped(f"has more than {LARGEST:,} parameters")
    raise Skipped(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}") from error


def _inputs(model: PreTrainedModel, flags: Mapping[str, bool]) -> Mapping[str, torch.Tensor]:
    """A batch that a model runs on in eager code: the seeded one, or else spectrograms, patches or tokens as what its
    class reads first, of the first sizes, among those that its configuration has, with which it runs."""
    error: Exception | None = None
    for one in _batches(model):
        try:
            inputs = one()
            with torch.no_grad():
                model(**inputs, **flags)
            return inputs
        except Exception as found:  # whatever code of any model raises
            error = error or found
    assert error is not None
    raise error


def _batches(model: PreTrainedModel) -> Iterator[Callable[[], Mapping[str, torch.Tensor]]]:
    yield partial(seeded_inputs, model)
    name, made = model.main_input_name, torch.Generator().manual_seed(0)
    if name in ("input_ids", "pixel_values"):
        return
    output = {}
    if model.config.is_encoder_decoder:
        output = {"decoder_input_ids": torch.randint(10, 100, (3, 7), generator=made)}
    numbers = dict.fromkeys(_numbers(model.config.to_dict()))
    for number, long in itertools.product(numbers, (64, *numbers)):
        for shape in {(3, long, number), (3, number, long)}:
            given = torch.randn(shape, generator=made)
            yield lambda given=given: {name: given, **output}
    yield lambda: {name: torch.randint(10, 100, (3, 12), generator=made), **output}


def _numbers(data: Mapping[str, Any]) -> Iterator[int]:
    """What is counted of sounds and patches."""
    for name, value in data.items():
        if isinstance(value, Mapping):
            yield from _numbers(value)
        elif _is_number(value) and re.search(r"_bins$|^max_length$|feature|feat_|patch_", name):
            yield value


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


# What classes leave open, by its name.
_OPEN: dict[str, Callable[[Mapping[str, Any]], Any]] = {
    "head_dim": lambda data: data["hidden_size"] // data["num_attention_heads"],
    "num_key_value_heads": lambda data: data["num_attention_heads"],
    "num_experts_per_tok": lambda _: 2,
    "vocab_size": lambda _: VOCABULARY,
    "default_language": lambda data: data["languages"][0],
}
# What a number of a configuration counts, by its name; the first that matches says what becomes of it.
_RULES: tuple[tuple[str, Callable[[int, Shrink], int]], ...] = (
    (r"vocab", lambda n, _: min(n, VOCABULARY)),
    (r"(^|_)(id|ids|idx|index)$", lambda n, _: n if n < VOCABULARY else VOCABULARY - 1 - n % 97),
    (r"^(n_|num_)?.*experts?(_num)?$", lambda n, _: min(n, EXPERTS)),
    (r"experts?_per_tok|topk$|top_k$|moe_k$", lambda n, _: min(n, 2)),
    (r"^n_group$|^topk_group$|num_expert_group", lambda n, _: min(n, 1)),
    (r"depths|layers?$|depth$|num_stages", lambda n, _: n),  # `_layers` has these
    (r"heads?$", lambda n, by: max(n // by.heads, 1)),
    (
        r"position|max_|_size_base|image_size|patch|theta|kernel|stride|window|chunk|length|seq|"
        r"sampling|frames|tokens|buckets|labels|groups?$|channels$.*3|bins|resolution|seed|"
        r"scale|factor|rate|second|offset|period|interval|every",
        lambda n, _: n,
    ),
    (r"", lambda n, by: max(n // by.widths, 2) if n >= WIDE and n % by.widths == 0 else n),
)


def small(config: PretrainedConfig, shrink: Shrink) -> PretrainedConfig:
    """A configuration of the same class with smaller numbers, and as many layers as it has kinds of them, or more."""
    return type(config).from_dict(_smaller(_data(config), shrink))


def _data(config: PretrainedConfig) -> dict[str, Any]:
    """What a default configuration is made of, and not what its class works out where it declares None or a word for it,
    but for lists, as of the kinds of its layers."""
    # Where layers differ, what is said of all of them may be read.
    config.allow_global_per_layer_attribute_access = True
    data = {}
    for field in dataclasses.fields(config):
        value, declared = getattr(config, field.name, None), field.default
        if isinstance(value, PretrainedConfig):
            data[field.name] = _data(value) | {"model_type": value.model_type}
        elif (
            type(value) is type(declared)
            or declared is dataclasses.MISSING
            or (isinstance(value, list | tuple) and value)
        ):
            data[field.name] = value
        else:
            data[field.name] = declared
    for name in ("id2label", "label2id", "transformers_version"):
        data.pop(name, None)
    if data.get("pad_token_id", 0) is None:
        data["pad_token_id"] = 0
    if config.is_encoder_decoder and getattr(config, "decoder_start_token_id", None) is None:
        data["decoder_start_token_id"] = 0
    return data


_COUNTS = r"layers?$|^depth$|_blocks$"  # of layers, or of stages, by which there are lists


def _smaller(data: Mapping[str, Any], shrink: Shrink) -> dict[str, Any]:
    if shrink.fill:
        data = {**data, **{k: _OPEN[k](data) for k in _OPEN.keys() & data if data[k] is None}}
    layers = _layers(data, shrink.layers)
    most = max(layers.values(), default=shrink.layers)
    kept = {k: v for k, v in data.items() if not str(k).isdigit() or int(k) < most}
    return {k: _value(str(k), v, shrink, layers) for k, v in kept.items()}


def _layers(data: Mapping[str, Any], least: int) -> dict[int, int]:
    """By a number of layers, how many are enough to have each kind that is listed, and no fewer than `least`."""
    counts = {
        v for k, v in data.items() if re.search(_COUNTS, str(k)) and _is_number(v) and v > least
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


def _value(name: str, value: Any, shrink: Shrink, layers: Mapping[int, int]) -> Any:
    if isinstance(value, dict):
        return _smaller(value, shrink)
    if isinstance(value, list | tuple):
        cut = value[: layers.get(len(value), len(value))]
        return [_run(one, layers) or _value(name, one, shrink, {}) for one in cut]
    if not _is_number(value):
        return value
    if re.search(_COUNTS, name):
        return layers.get(value, min(value, shrink.layers))
    if re.search(r"depths", name):
        return min(value, 2)
    return next(rule for pattern, rule in _RULES if re.search(pattern, name))(value, shrink)


def _run(one: Any, layers: Mapping[int, int]) -> list[Any] | None:
    """Kinds of layers and how many times they come, [kinds, times], where these are all layers: as many as are left."""
    match one:
        case [list() as kinds, int() as times] if len(kinds) * times in layers:
            return [kinds, max(layers[len(kinds) * times] // len(kinds), 1)]
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
