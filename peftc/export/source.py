"""The model that is exported, and what is known of it from one batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from peftc.driver import outputs, program_of
from peftc.export.graph import Tensors
from peftc.export.pooling import Pooling
from peftc.graph.facts import ModelFacts
from peftc.graph.program import Program
from peftc.graph.rows import Room, room_of
from peftc.model.compiled import CompiledModel


@dataclass(frozen=True, eq=False)
class Source:
    """A compiled or a plain model and one batch, tensors by argument name."""

    model: PreTrainedModel
    inputs: Tensors

    @cached_property
    def facts(self) -> ModelFacts:
        return ModelFacts.read(self.model)

    @cached_property
    def room(self) -> Room:
        return room_of(self.model)

    @property
    def reads(self) -> str:
        """The input that tells what it reads."""
        return self.facts.main_input

    @cached_property
    def _ran(self) -> Mapping[str, torch.Tensor] | Exception:
        try:
            return outputs(self.model, self.inputs)
        except Exception as error:  # whatever a model raises that is called otherwise
            return error

    @property
    def outputs(self) -> Mapping[str, torch.Tensor]:
        """What it gives of the batch, without a cache."""
        return {} if isinstance(self._ran, Exception) else self._ran

    @property
    def error(self) -> str:
        """Why it does not run on the batch, or nothing."""
        if not isinstance(self._ran, Exception):
            return ""
        return str(self._ran).splitlines()[0][:200] if str(self._ran) else type(self._ran).__name__

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """Sizes of axes by what they are."""
        found = {"words": self.facts.vocabulary or 0, "labels": self.model.config.num_labels or 0}
        for axis, size in zip(("batch", "length"), self.inputs[self.reads].shape, strict=False):
            found[axis] = size
        return found

    @cached_property
    def pooling(self) -> Pooling | None:
        return Pooling.of(self.model.config.name_or_path or "")

    def program(self, entry: str, inputs: Tensors) -> Program:
        """The graph of an entry."""
        return program_of(self.model, entry, inputs)


def plain(model: PreTrainedModel) -> PreTrainedModel:
    """Without its deltas: it gives tensors of the same names and axes, and needs no graph for it."""
    return model.backbone if isinstance(model, CompiledModel) else model


def masked(inputs: Tensors) -> dict[str, torch.Tensor]:
    """Ids and their mask; a batch without one has no padding."""
    ids = inputs["input_ids"]
    return {"input_ids": ids, "attention_mask": inputs.get("attention_mask", torch.ones_like(ids))}
