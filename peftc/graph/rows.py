"""Room: rows that deltas put in front of a sequence, and how an entry's inputs make place for them.

An entry is traced with its inputs already longer, so masks, positions, causality and cross attention follow
from the model's own code; the pass `insert` then fills the rows at the embedding.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional
from transformers import PreTrainedModel

from peftc.errors import CaptureError
from peftc.graph.arguments import FIRST, argument, axes
from peftc.graph.cache import FILLED, CacheSlot, keys_of
from peftc.graph.entries import ENTRIES, Tensors
from peftc.graph.facts import ModelFacts, decoder_of
from peftc.graph.program import aten


@dataclass(frozen=True)
class Room:
    """How many `rows` are put in front of what an input of ids names, and by how many places a prefix moves
    the positions of the tokens (`shift`)."""

    rows: Mapping[str, int] = field(default_factory=dict)
    shift: int = 0

    def __bool__(self) -> bool:
        return bool(self.rows) or self.shift > 0

    @property
    def key(self) -> tuple[Any, ...]:
        """What tells it from others."""
        return (tuple(sorted(self.rows.items())), self.shift)

    def require(self, model: PreTrainedModel) -> None:
        """Raise CaptureError where positions cannot be moved, because the model is not told them."""
        facts = ModelFacts.read(model)
        if self.shift and "position_ids" not in facts.arguments:
            raise CaptureError(
                f"{facts.name} takes no position_ids, so 'positions: shift' moves nothing; "
                "leave it out, or use a decoder that takes them"
            )

    def held(self, name: str, seq2seq: bool) -> int:
        """Rows that an input has already, because an earlier entry made it: states and caches."""
        row = argument(name)
        if not row.holds:
            return 0
        own = "decoder_input_ids" if seq2seq and row.follows == "past" else "input_ids"
        return self.rows.get(own, 0)

    def longest(self, positions: int) -> int:
        """How many tokens fit into so many positions."""
        return positions - max(self.rows.values(), default=0) - self.shift

    def wide(self, entry: str, seq2seq: bool) -> frozenset[str]:
        """The ids that get rows in this entry; when decoding from a cache, it holds them."""
        return frozenset(ids for ids in self.rows if not _steps(ids, entry, seq2seq))

    def widened(
        self, model: PreTrainedModel, entry: str, tensors: Tensors
    ) -> dict[str, torch.Tensor]:
        """The inputs of `entry` with place for the rows, positions moved. Raises CaptureError."""
        facts = ModelFacts.read(model)
        seq2seq = facts.encoder_decoder
        wide = dict(tensors)
        for ids, rows in self.rows.items():
            steps = _steps(ids, entry, seq2seq)
            if steps and keys_of(tensors) is None:  # states have no places
                continue
            for name, value in tensors.items():
                row = argument(name)
                if row.holds:
                    continue
                labels = (*axes(name, value.ndim, entry, seq2seq), None, None)
                label = labels[value.ndim - 1 if row.role == "positions" else 1]
                if row.role == "positions" and label == ("query" if steps else _label(ids)):
                    wide[name] = value + rows if steps else _positions(value, rows)
                elif label == ("total" if steps else _label(ids)):
                    wide[name] = _padded(facts, name, value, rows)
                elif row.role == "place" and not seq2seq:  # where an answer starts and ends
                    wide[name] = value + rows
        if self.shift:
            wide["position_ids"] = _given_positions(facts, wide) + self.shift
        return wide

    @contextlib.contextmanager
    def kept_from_decoder(self, model: PreTrainedModel, wide: Tensors) -> Iterator[None]:
        """While a classifier runs whose decoder reads what its encoder reads, one further on and with a start of its
        own: the rows are the encoder's, and the decoder has no tokens there. Its states are as long as the ids."""
        rows = self.rows.get("input_ids", 0)
        if not rows or not ModelFacts.read(model).reads_its_end or "decoder_input_ids" in wide:
            yield
            return

        def without(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
            ids = kwargs["input_ids"]
            return args, {**kwargs, "input_ids": torch.cat([ids[:, :1], ids[:, rows + 1 :]], 1)}

        def again(_: nn.Module, args: Any, output: Any) -> Any:
            output.last_hidden_state = functional.pad(output.last_hidden_state, (0, 0, rows, 0))
            return output

        decoder = decoder_of(model)
        hooks = (
            decoder.register_forward_pre_hook(without, with_kwargs=True),
            decoder.register_forward_hook(again),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()

    def cut(
        self, model: PreTrainedModel, entry: str, wide: Tensors, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs as long as the inputs were. What a later entry reads (an encoder's states, caches) keeps
        its rows."""
        seq2seq = ModelFacts.read(model).encoder_decoder
        cut = dict(fields)
        if ENTRIES[entry].encodes:
            return cut
        for ids in self.wide(entry, seq2seq):
            lengths = [
                value.shape[1]
                for name, value in wide.items()
                if axes(name, value.ndim, entry, seq2seq)[1:] == (_label(ids),)
            ]
            for name, value in fields.items():
                tensor = isinstance(value, torch.Tensor) and value.ndim > 1
                if not tensor or CacheSlot.read(name) is not None:
                    continue
                # Scores and streams have their length elsewhere than in the second axis.
                for axis, size in enumerate(value.shape[1:], 1):
                    if any(statically_known_true(size == length) for length in lengths):
                        cut[name] = aten.slice.Tensor(cut[name], axis, self.rows[ids], sys.maxsize)
        return cut


NONE = Room()


def room_of(model: PreTrainedModel) -> Room:
    """What stands in front of a model's sequences: of a compiled one, its plan's."""
    plan = getattr(model, "plan", None)
    return NONE if plan is None else plan.room


def longest_of(model: PreTrainedModel) -> int | None:
    """The most tokens of a text that a model has positions for, besides the rows in front; None where any number."""
    positions = ModelFacts.read(model).longest
    return None if positions is None else room_of(model).longest(positions)


def _label(ids: str) -> str:
    """The axis that ids are read along."""
    return "target" if argument(ids).follows == "target" else "seq"


def _steps(ids: str, entry: str, seq2seq: bool) -> bool:
    return ENTRIES[entry].steps and (argument(ids).follows == "target" or not seq2seq)


def _positions(value: torch.Tensor, rows: int) -> torch.Tensor:
    first = torch.arange(rows, device=value.device, dtype=value.dtype)
    return torch.cat([first.expand(*value.shape[:-1], rows), value + rows], -1)


def _given_positions(facts: ModelFacts, tensors: Tensors) -> torch.Tensor:
    """`position_ids`, or what a model takes when it is given none: its own count where it has one, or on from
    what the cache holds."""
    if "position_ids" in tensors:
        return tensors["position_ids"]
    ids = tensors.get("input_ids", tensors.get("inputs_embeds"))
    assert ids is not None  # a model that takes position_ids reads tokens
    keys = keys_of(tensors)
    past: Any = tensors.get(FILLED, 0 if keys is None else keys.shape[2])
    if facts.counted is not None and ids.ndim == 2:
        return facts.counted(ids, past)
    new = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
    places: torch.Tensor = new + past
    return places


def _padded(facts: ModelFacts, name: str, value: torch.Tensor, rows: int) -> torch.Tensor:
    row = argument(name)
    fill = facts.ordinary if row.role == "ids" else row.front
    if fill is None or value.ndim != 2:
        raise CaptureError(
            f"{facts.name}: rows are put in front of the tokens, and nothing says what "
            f"'{name}' {list(value.shape)} has there; leave it out, or give ids and a mask of two axes"
        )
    if fill == FIRST:
        return torch.cat([value[:, :1].expand(-1, rows), value], 1)
    return functional.pad(value, (rows, 0), value=int(fill))
