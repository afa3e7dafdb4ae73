"""Room: rows that deltas put in front of a sequence, and how an entry's inputs make place for them.

An entry is traced with its inputs already longer, so masks, positions, causality and cross attention follow
from the model's own code; the pass `insert` then fills the rows at the embedding.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.nn import functional
from transformers import PreTrainedModel

from peftc.graph.arguments import CaptureError, Tensors, axes, reads_its_end

# Labels that no loss counts, as torch's cross entropy has it.
_IGNORED = -100
# What stands at the new places of an input, by the end of its name. Ids are chosen by `_unspecial`.
_FILL = {"attention_mask": 1, "labels": _IGNORED, "token_type_ids": 0}


@dataclass(frozen=True)
class Room:
    """How many `rows` are put in front of what an input of ids names, and by how many places a prefix moves
    the positions of the tokens (`shift`)."""

    rows: Mapping[str, int] = field(default_factory=dict)
    shift: int = 0

    def __bool__(self) -> bool:
        return bool(self.rows) or self.shift > 0

    def require(self, model: PreTrainedModel) -> None:
        """Raise CaptureError where positions cannot be moved, because the model is not told them, and where
        the decoder of a classifier would read as tokens what keeps the rows' place."""
        if self.rows and reads_its_end(model):
            raise CaptureError(
                f"{type(model).__name__}: its decoder reads the encoder's ids, and rows in front of them are no "
                "tokens; use prefix_tuning"
            )
        if self.shift and "position_ids" not in inspect.signature(type(model).forward).parameters:
            raise CaptureError(
                f"{type(model).__name__} takes no position_ids, so 'positions: shift' moves nothing; "
                "leave it out, or use a decoder that takes them"
            )

    def held(self, name: str, seq2seq: bool) -> int:
        """Rows that an input has already, because an earlier entry made it: states and caches."""
        own = "decoder_input_ids" if seq2seq else "input_ids"
        if name.startswith("past.self."):
            return self.rows.get(own, 0)
        if name.startswith("past.cross.") or name == "encoder_hidden_states":
            return self.rows.get("input_ids", 0)
        return 0

    def longest(self, positions: int) -> int:
        """How many tokens fit into so many positions."""
        return positions - max(self.rows.values(), default=0)

    def wide(self, entry: str, seq2seq: bool) -> frozenset[str]:
        """The ids that get rows in this entry; when decoding from a cache, it holds them."""
        return frozenset(ids for ids in self.rows if not _steps(ids, entry, seq2seq))

    def widened(
        self, model: PreTrainedModel, entry: str, tensors: Tensors
    ) -> dict[str, torch.Tensor]:
        """The inputs of `entry` with place for the rows, positions moved. Raises CaptureError."""
        seq2seq = bool(model.config.is_encoder_decoder)
        wide = dict(tensors)
        for ids, rows in self.rows.items():
            steps = _steps(ids, entry, seq2seq)
            for name, value in tensors.items():
                if self.held(name, seq2seq):
                    continue
                label = (*axes(name, value.ndim, entry, seq2seq), None, None)[1]
                if name.endswith("position_ids") and label == ("query" if steps else _label(ids)):
                    wide[name] = value + rows if steps else _positions(value, rows)
                elif label == ("total" if steps else _label(ids)):
                    wide[name] = _padded(model, name, value, rows)
                elif name.endswith("_positions") and not seq2seq:  # where an answer starts and ends
                    wide[name] = value + rows
        if self.shift:
            wide["position_ids"] = _given_positions(model, wide) + self.shift
        return wide

    def cut(
        self, model: PreTrainedModel, entry: str, wide: Tensors, fields: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Outputs as long as the inputs were. What a later entry reads (an encoder's states, caches) keeps
        its rows."""
        seq2seq = bool(model.config.is_encoder_decoder)
        cut = dict(fields)
        if entry.startswith("encode"):
            return cut
        for ids in self.wide(entry, seq2seq):
            lengths = [
                value.shape[1]
                for name, value in wide.items()
                if axes(name, value.ndim, entry, seq2seq)[1:] == (_label(ids),)
            ]
            for name, value in fields.items():
                if (
                    name.startswith("past.")
                    or not isinstance(value, torch.Tensor)
                    or value.ndim < 2
                ):
                    continue
                if any(statically_known_true(value.shape[1] == length) for length in lengths):
                    cut[name] = value[:, self.rows[ids] :]
        return cut


NONE = Room()


def room_of(model: PreTrainedModel) -> Room:
    """What stands in front of a model's sequences: of a compiled one, its plan's."""
    plan = getattr(model, "plan", None)
    return NONE if plan is None else plan.room


def _label(ids: str) -> str:
    """The axis that ids are read along, as `peftc.inputs` names it."""
    return "target" if ids.startswith("decoder_") else "seq"


def _steps(ids: str, entry: str, seq2seq: bool) -> bool:
    return entry == "decode" and (ids.startswith("decoder_") or not seq2seq)


def _positions(value: torch.Tensor, rows: int) -> torch.Tensor:
    first = torch.arange(rows, device=value.device, dtype=value.dtype)
    return torch.cat([first.expand(*value.shape[:-1], rows), value + rows], -1)


def _given_positions(model: PreTrainedModel, tensors: Tensors) -> torch.Tensor:
    """`position_ids`, or what a model takes when it is given none: its own count of what is no padding
    (RoBERTa and its kin), or on from what the cache holds."""
    if "position_ids" in tensors:
        return tensors["position_ids"]
    ids = tensors.get("input_ids", tensors.get("inputs_embeds"))
    assert ids is not None  # a model that takes position_ids reads tokens
    counts = "create_position_ids_from_input_ids"
    own: Any = next((one for one in model.modules() if hasattr(one, counts)), None)
    if own is not None and ids.ndim == 2:
        counted: torch.Tensor = getattr(own, counts)(ids, own.padding_idx)
        return counted
    past = tensors["past.self.0.key"].shape[2] if "past.self.0.key" in tensors else 0
    return torch.arange(past, past + ids.shape[1], device=ids.device).unsqueeze(0)


def _padded(model: PreTrainedModel, name: str, value: torch.Tensor, rows: int) -> torch.Tensor:
    fill = next((one for end, one in _FILL.items() if name.endswith(end)), None)
    if name.endswith("input_ids"):
        fill = _unspecial(model)
    if fill is None or value.ndim != 2:
        raise CaptureError(
            f"{type(model).__name__}: rows are put in front of the tokens, and nothing says what "
            f"'{name}' {list(value.shape)} has there; leave it out, or give ids and a mask of two axes"
        )
    return functional.pad(value, (rows, 0), value=fill)


def _unspecial(model: PreTrainedModel) -> int:
    """The first id to which the configuration gives no meaning: neither padding nor an end."""
    said = {**model.config.get_text_config().to_dict(), **model.config.to_dict()}
    named = [v for k, v in said.items() if k.endswith(("_token_id", "_token_index"))]
    special = {one for v in named for one in (v if isinstance(v, list | tuple) else (v,))}
    return next(i for i in range(len(special) + 1) if i not in special)
