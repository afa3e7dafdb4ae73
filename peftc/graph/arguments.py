"""A model's inputs by the argument names that Hugging Face models share: their axes, and examples of them."""

from __future__ import annotations

import fnmatch
import functools
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from peftc.errors import CaptureError
from peftc.graph.cache import FILLED, STATES
from peftc.graph.entries import ENCODED, ENTRIES
from peftc.graph.facts import ModelFacts

Labels = Mapping[str, tuple[str | None, ...]]
IMAGE = (224, 224)  # of models whose configuration names no size, because any is theirs
WAVE = 4000  # samples of sound
# Of models that state no vocabulary, because they read characters by their numbers.
CHARACTERS = 128
# Sizes of the example that is traced: all >= 2, because export specialises 0 and 1, and all
# different, so that no two axes are taken for one.
SIZES = {"batch": 3, "seq": 11, "target": 7, "past": 5, "query": 2, "total": 7}
# At rows in front: as at the first token.
FIRST = "first"
# Labels that no loss counts, as torch's cross entropy has it.
IGNORED = -100


@dataclass(frozen=True)
class Argument:
    """What is known of the inputs whose names match `pattern`; of several rows the first.

    `follows`: whose length its axis `axis` has: "source" (what the model reads first), "target" (what an
    encoder-decoder's decoder reads), "output" (what it predicts), "past" (the cache), "" (none's). `whole`: in a
    step from a cache it is as long as all tokens so far. `square`: with three axes or more, the last two are new
    tokens x all tokens. `holds`: the rows in front are in it already. `front` is what stands at rows in front, or
    FIRST, what stands at the first token; None where nothing may. `role` is what it means: ids, mask, labels, positions, segments, states, place.
    `step` is its name in an ONNX decoder, where that is another.
    """

    pattern: str
    role: str
    follows: str = "source"
    axis: int = 1
    whole: bool = False
    square: bool = False
    holds: bool = False
    front: int | str | None = None
    step: str = ""

    @property
    def cached(self) -> bool:
        return self.role == "cache"


ARGUMENTS = (
    *(Argument(f"past.*.{side}*", "cache", "", holds=True) for side in STATES),
    Argument("past.self.*", "cache", "past", holds=True),
    Argument("past.cross.*", "cache", "source", holds=True),
    Argument(FILLED, "place", "", holds=True),
    *(Argument(name, "states", holds=True) for name in ENCODED),
    Argument("pixel_values", "samples", ""),
    Argument("input_features", "samples", ""),
    Argument("input_values", "samples", ""),
    Argument("labels", "labels", "output", front=IGNORED),
    Argument("*_positions", "place", ""),
    Argument("decoder_input_ids", "ids", "target", step="input_ids"),
    Argument("decoder_attention_mask", "mask", "target", whole=True, square=True, front=1),
    Argument("decoder_position_ids", "positions", "target"),
    Argument("decoder_*", "states", "target"),
    Argument("*input_ids", "ids"),
    Argument("inputs", "ids"),
    Argument("attention_mask", "mask", whole=True, square=True, front=1, step="encoder_attention_mask"),
    Argument("perm_mask", "states", square=True),
    Argument("target_mapping", "states", axis=2),
    Argument("token_type_ids", "segments", front=0),
    Argument("langs", "states", front=FIRST),
    Argument("position_ids", "positions"),
    Argument("*", "states"),
)  # fmt: skip
# The mask of what a cache holds, by whether the model is an encoder-decoder.
OWN_MASK = {
    several: next(r.pattern for r in ARGUMENTS if r.role == "mask" and r.follows == follows)
    for several, follows in ((True, "target"), (False, "source"))
}


@functools.lru_cache(1024)
def argument(name: str) -> Argument:
    """The row of ARGUMENTS that an input belongs to."""
    return next(row for row in ARGUMENTS if fnmatch.fnmatchcase(name, row.pattern))


def is_ids(name: str, value: torch.Tensor) -> bool:
    """Whether an input holds ids; one of several kinds of models (Perceiver's `inputs`) may hold images instead."""
    return argument(name).role == "ids" and not value.is_floating_point()


@functools.lru_cache(1024)
def axes(name: str, rank: int, entry: str, encoder_decoder: bool) -> tuple[str | None, ...]:
    """The dynamic axes of an input, by its name: batch, seq, target, past, query (new tokens), total (past and
    new ones); None is fixed."""
    row = argument(name)
    if rank < 2:
        return ("batch",)[:rank]
    if not row.follows:
        return ("batch", *(None,) * (rank - 1))
    if row.cached:
        return ("batch", *(None,) * (rank - 3), _length(row, entry, encoder_decoder), None)
    if row.square and rank > 2:
        new, all_ = (_length(row, entry, encoder_decoder, whole) for whole in (False, True))
        return ("batch", *(None,) * (rank - 3), new, all_)
    length = _length(row, entry, encoder_decoder, row.whole)
    if row.role == "positions" and rank == 3:  # of time, height and width
        return (None, "batch", length)
    return ("batch", *(length if i == row.axis else None for i in range(1, rank)))


def _length(row: Argument, entry: str, encoder_decoder: bool, whole: bool = False) -> str:
    if row.follows == "past":
        return "past"
    of_decoder = row.follows == "target" or (row.follows == "output" and encoder_decoder)
    if ENTRIES[entry].steps and (of_decoder or not encoder_decoder):
        return "total" if whole else "query"
    return "target" if of_decoder else "seq"


def example(
    name: str, real: torch.Tensor, entry: str, encoder_decoder: bool, more: int = 0
) -> torch.Tensor:
    """`real` with its dynamic axes repeated or cut to the traced sizes, so that its values stay valid.

    `more` is what its length has beyond the traced one: rows in front, in a cache or a state.
    """
    sizes = {**SIZES, "seq": SIZES["seq"] + more, "past": SIZES["past"] + more}
    return resized(real, axes(name, real.ndim, entry, encoder_decoder), sizes)


def resized(
    real: torch.Tensor, labels: tuple[str | None, ...], sizes: Mapping[str, int]
) -> torch.Tensor:
    """`real` with its named axes repeated or cut to `sizes`."""
    if real.is_meta:
        shape = [sizes[a] if a else n for a, n in zip(labels, real.shape, strict=True)]
        return torch.empty(shape, dtype=real.dtype, device="meta")
    for axis, label in enumerate(labels):
        if label is None:
            continue
        if real.shape[axis] == 0:
            shape = [1 if i == axis else n for i, n in enumerate(real.shape)]
            real = real.new_zeros(shape)
        index = torch.arange(sizes[label], device=real.device) % real.shape[axis]
        real = real.index_select(axis, index)
    return real.detach()


def forward_flags(model: PreTrainedModel) -> dict[str, bool]:
    """What a `forward` without a cache is called with."""
    return ModelFacts.read(model).flags


def reads_its_end(model: PreTrainedModel) -> bool:
    """A classifier on an encoder-decoder: the decoder reads the input too, and the head its last state."""
    return ModelFacts.read(model).reads_its_end


def dummy_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs for a `forward` capture when there is no real batch at hand."""
    facts, device = ModelFacts.read(model), model.device
    ids = torch.ones(SIZES["batch"], SIZES["seq"], dtype=torch.long, device=device)
    if facts.main_input == "input_ids":
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        shape = (SIZES["batch"], *_sample(facts))
        inputs = {facts.main_input: torch.zeros(shape, device=device, dtype=model.dtype)}
    if facts.encoder_decoder and not facts.reads_its_end:
        inputs["decoder_input_ids"] = ids[:, : SIZES["target"]].clone()
    return inputs


def seeded_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One batch for a certificate, the same each time; token ids avoid the special ones at the start."""
    generator = torch.Generator().manual_seed(0)
    facts, inputs = ModelFacts.read(model), dummy_inputs(model)
    for name, tensor in inputs.items():
        if is_ids(name, tensor):
            inputs[name] = _seeded_ids(facts, tensor, generator)
        elif tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            inputs[name] = noise.to(tensor)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -3:] = 0
    return inputs


def _seeded_ids(facts: ModelFacts, like: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    high = facts.vocabulary or CHARACTERS
    low = min(10, high // 2)
    ids = torch.randint(low, high, like.shape, generator=generator)
    if facts.reads_its_end:
        ids[ids == facts.end] = low
        ids[:, -1] = facts.end  # type: ignore[assignment]  # such a head needs one
    return ids.to(like.device)


def _sample(facts: ModelFacts) -> tuple[int, ...]:
    """The sizes of one image, spectrogram or wave, by what the model says of it."""
    if facts.main_input == "pixel_values":
        return (facts.channels, *(facts.image or IMAGE))
    if facts.main_input == "input_features" and facts.spectrogram is not None:
        return facts.spectrogram
    if facts.main_input == "input_values":
        return (WAVE,)
    raise CaptureError(
        f"{facts.name}: no example input is known for '{facts.main_input}'; "
        "pass example={...} with one batch of it"
    )
