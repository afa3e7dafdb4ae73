"""What a model says of itself: its configuration, its class and its module tree, read once."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from peftc.graph.cache import CACHES

# (ids [batch, tokens], tokens in the cache) to the positions of the ids.
Positions = Callable[[torch.Tensor, int], torch.Tensor]


@dataclass(frozen=True)
class Stacks:
    """What a model says of its own layout: its encoder's path, its only stack, its headless part, and the paths of
    `towers`, what images and sounds go through before they meet text, with their names."""

    encoder: str | None
    single: str
    body: str
    towers: tuple[tuple[str, str], ...] = ()

    @staticmethod
    def read(model: PreTrainedModel) -> Stacks:
        encoder = None
        if has_decoder(model):
            module = model.get_encoder()
            encoder = next(name for name, one in model.named_modules() if one is module)
        single = "decoder" if model.can_generate() else "encoder"
        body = next((name for name, one in model.named_modules() if one is model.base_model), "")
        return Stacks(encoder, single, body, tuple(_towers(model)))

    def of(self, scope: str) -> str:
        for path, name in self.towers:
            if f"{scope}.".startswith(f"{path}."):
                return name
        if self.encoder is None:
            return self.single
        return "encoder" if f"{scope}.".startswith(f"{self.encoder}.") else "decoder"

    def is_head(self, scope: str) -> bool:
        return bool(self.body) and not f"{scope}.".startswith(f"{self.body}.")


def has_decoder(model: PreTrainedModel) -> bool:
    """Whether a decoder reads what an encoder made: heads on the encoder of such a model alone have its
    configuration."""
    if not model.config.is_encoder_decoder:
        return False
    encoder = model.get_encoder()
    return all(one is not encoder for one in decoder_of(model).modules())


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """What a model gives as its decoder, and where that is a whole language model, the decoder of that."""
    found: Any = model.get_decoder()
    while hasattr(found, "get_decoder") and (inner := found.get_decoder()) is not found:
        found = inner
    decoder: nn.Module = found
    return decoder


def _towers(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    """(path, stack) of what a model of text has for other things."""
    if model.main_input_name != "input_ids":
        return
    paths = {id(module): path for path, module in model.named_modules()}
    for modality, name in (("image", "vision"), ("audio", "audio")):
        tower = model.get_encoder(modality=modality)
        path = paths.get(id(tower), "")
        table = token_table(model)
        reads = table is not None and any(one is table for one in tower.modules())
        if path and tower is not model.base_model and not reads:
            yield path, name


def token_table(model: PreTrainedModel) -> Any:
    """The module that embeds a model's tokens; None where it has none, or several (CANINE hashes characters)."""
    try:
        return model.get_input_embeddings()
    except NotImplementedError:
        return None


@dataclass(frozen=True)
class ModelFacts:
    """What a model says of itself. Where a traced graph knows better, the graph wins.

    Sizes are counts; a fact that the model does not state is None. `arguments` are those of its forward, in
    order; `targets` are the positions of a decoder that has another number of them; `counted` is its own way to
    number tokens by their ids, where it has one.
    """

    name: str
    encoder_decoder: bool
    generates: bool
    has_head: bool
    main_input: str
    arguments: tuple[str, ...]
    vocabulary: int | None
    end: int | None
    special: frozenset[int]
    positions: int | None
    targets: int | None
    segments: int
    image: tuple[int, int] | None
    channels: int
    spectrogram: tuple[int, int] | None
    returns_dict: bool
    counted: Positions | None

    @staticmethod
    def read(model: PreTrainedModel) -> ModelFacts:
        config = model.config
        said = functools.partial(_said, config)
        return ModelFacts(
            name=type(model).__name__,
            encoder_decoder=has_decoder(model),
            generates=model.can_generate(),
            has_head=model.base_model is not model,
            main_input=model.main_input_name,
            arguments=tuple(inspect.signature(type(model).forward).parameters)[1:],
            vocabulary=said("vocab_size"),
            end=_first(said("eos_token_id")),
            special=_special(config),
            positions=said("max_position_embeddings"),
            targets=said("max_target_positions"),
            segments=said("type_vocab_size") or 0,
            image=_image(said("image_size") or _said_by_parts(config, "image_size")),
            channels=said("num_channels") or 3,
            spectrogram=_spectrogram(said("num_mel_bins"), said("max_source_positions")),
            returns_dict=bool(said("return_dict")),
            counted=_counted(model),
        )

    @property
    def reads_its_end(self) -> bool:
        """A classifier on an encoder-decoder: the decoder reads the input too, and the head its last state."""
        head = self.has_head and not self.generates
        return self.encoder_decoder and head and self.main_input == "input_ids"

    @property
    def longest(self) -> int | None:
        """How many tokens of one text there are positions for; where padding has positions of its own, less these."""
        said = [one for one in (self.positions, self.targets) if one is not None]
        if self.counted is None or not said:
            return min(said, default=None)
        first = self.counted(torch.tensor([[self.ordinary]]), 0)
        return min(said) - int(first)

    @property
    def cache(self) -> str:
        """The argument that it takes its cache by, and the field that it gives it by."""
        return next((name for name in CACHES if name in self.arguments), CACHES[0])

    @property
    def flags(self) -> dict[str, bool]:
        """What a `forward` without a cache is called with: `generate` gives it to all that it runs, named or not."""
        return {"use_cache": False} if self.generates or "use_cache" in self.arguments else {}

    @property
    def ordinary(self) -> int:
        """The first id to which the configuration gives no meaning: neither padding nor an end."""
        return next(i for i in range(len(self.special) + 1) if i not in self.special)


def _said(config: PreTrainedConfig, name: str) -> Any:
    """A setting under any name that the configuration knows it by, of the model or of its part for text."""
    found = getattr(config, name, None)
    return getattr(config.get_text_config(), name, None) if found is None else found


def _said_by_parts(config: PreTrainedConfig, name: str) -> Any:
    """A setting of the first part of a configuration that has one."""
    parts = (getattr(config, part, None) for part in config.sub_configs)
    return next((found for part in parts if (found := getattr(part, name, None))), None)


def _first(value: Any) -> int | None:
    """Of one setting or several, the first."""
    return next(iter(value), None) if isinstance(value, list | tuple) else value


def _special(config: PreTrainedConfig) -> frozenset[int]:
    said = {**config.get_text_config().to_dict(), **config.to_dict()}
    named = [v for k, v in said.items() if k.endswith(("_token_id", "_token_index"))]
    ids = {one for v in named for one in (v if isinstance(v, list | tuple) else (v,))}
    return frozenset(one for one in ids if isinstance(one, int))


def _image(size: Any) -> tuple[int, int] | None:
    if not size:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _spectrogram(bins: int | None, positions: int | None) -> tuple[int, int] | None:
    """Mel bins and frames: an encoder of speech halves the frames to its positions."""
    return None if bins is None or positions is None else (bins, 2 * positions)


def _counted(model: PreTrainedModel) -> Positions | None:
    """Models that leave padding out when they number tokens bring their own function for it."""
    name = "create_position_ids_from_input_ids"
    owner: Any = next((one for one in model.modules() if hasattr(one, name)), None)
    if owner is None:
        return None

    own = getattr(owner, name)
    continues = "past_key_values_length" in inspect.signature(own).parameters

    def count(ids: torch.Tensor, past: int) -> torch.Tensor:
        more = (past,) if continues else ()
        counted: torch.Tensor = own(ids, owner.padding_idx, *more)
        return counted

    return count
