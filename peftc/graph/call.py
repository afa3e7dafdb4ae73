"""Call: the inputs of one call, the lengths of what they hold, and which of their axes may be of any length."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from transformers import PreTrainedModel

from peftc.graph.arguments import Argument, Labels, argument, axes
from peftc.graph.entries import ENTRIES, Tensors
from peftc.graph.facts import ModelFacts
from peftc.graph.state import readable


@dataclass(frozen=True, eq=False)
class Call:
    """The inputs of one call of an entry, tensors by argument name; what is known of them is worked out once."""

    entry: str
    inputs: Tensors
    encoder_decoder: bool

    @staticmethod
    def of(model: PreTrainedModel, entry: str, inputs: Tensors) -> Call:
        return Call(entry, inputs, ModelFacts.read(model).encoder_decoder)

    @property
    def labels(self) -> Labels:
        """The dynamic axes of every input. A size that is not the batch's is fixed, and None: a mask's axis of one for
        all heads, a position row for all texts, the classes of a multi-label head. So is a step of one token, which
        sees all that is behind it, and a static cache."""
        return self._read[0]

    @property
    def signature(self) -> Hashable:
        """What a graph depends on of its inputs: names, kinds, and the sizes of the axes that are fixed."""
        return self._read[1]

    @cached_property
    def unpadded(self) -> bool:
        """Whether every token counts: what masks there are, are as long as what they mask, and ones. False where
        values cannot be asked for, as while tracing, and in a static cache, which has empty places."""
        if ENTRIES[self.entry].static:
            return False
        masks = {k: v for k, v in self.inputs.items() if argument(k).role == "mask"}
        if not masks:
            return True
        fit = all(
            v.ndim == 2 and self._lengths.get(self.named[k][1] or "", -1) == v.shape[1]
            for k, v in masks.items()
        )
        return fit and readable(masks.values()) and all(bool(v.all()) for v in masks.values())

    def sizes_of(self, labels: Collection[str]) -> tuple[tuple[str, int], ...]:
        """How long the axes are that go by these names."""
        if not labels:
            return ()
        every = ((a, n) for k, v in self.inputs.items() for a, n in zip(self.labels[k], v.shape))
        return tuple(sorted({(a, n) for a, n in every if a in labels}))  # type: ignore[misc]

    @cached_property
    def named(self) -> Labels:
        """The axes of every input by its name alone."""
        return {
            k: axes(k, v.ndim, self.entry, self.encoder_decoder) for k, v in self.inputs.items()
        }

    @cached_property
    def _lengths(self) -> Mapping[str, int]:
        """The size of each axis, by what it is read along."""
        sizes: dict[str, int] = {}
        long = [k for k in self.inputs if argument(k).role in _LONG]
        for labels, shape in dict.fromkeys((self.named[k], self.inputs[k].shape) for k in long):
            for label, size in zip(labels, shape, strict=True):
                sizes.setdefault(label or "", size)
        if ENTRIES[self.entry].steps:
            sizes["total"] = sizes.get("past", 0) + sizes.get("query", 0)
        return sizes

    @cached_property
    def _read(self) -> tuple[Labels, Hashable]:
        still = _STILL if ENTRIES[self.entry].static else ()
        # What layers hold is of few shapes, and a step asks of each again.
        known: dict[Hashable, tuple[tuple[str | None, ...], Hashable]] = {}
        found: dict[str, tuple[str | None, ...]] = {}
        groups: dict[Hashable, list[str]] = {}
        for name, one in self.inputs.items():
            row, shape = argument(name), one.shape
            alike = self.named[name], shape, row.role, row.square, one.dtype, one.device
            if alike not in known:
                labels = tuple(
                    label if label not in still and self._moves(row, one, axis, label) else None
                    for axis, label in enumerate(self.named[name])
                )
                fixed = (n if a is None else a for n, a in zip(shape, labels, strict=True))
                known[alike] = labels, (one.dtype, one.device, *fixed)
            found[name], kind = known[alike]
            groups.setdefault(kind, []).append(name)
        return found, frozenset((kind, *sorted(names)) for kind, names in groups.items())

    def _moves(self, row: Argument, value: torch.Tensor, axis: int, label: str | None) -> bool:
        """Whether an axis is as long as what it is named for, and so may be of any length."""
        size = value.shape[axis]
        if label in ("query", "total") and self._lengths[label] == 1:
            return False
        if label is None or (axis and row.role == "labels" and value.is_floating_point()):
            return False  # floating labels have one number for each class
        if self._lengths.get(label, size) == size:
            return True
        return not (size == 1 or row.role == "labels" or (row.square and value.ndim > 2))


# What says how long things are.
_LONG = ("ids", "states", "samples", "cache")
# What has one length in a static cache.
_STILL = ("past", "total")
