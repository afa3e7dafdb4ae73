"""Counts: what a plan adds, as the papers count it, as it is stored, and while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod

from peftc.language.ports import SITES
from peftc.plan.algebra import constant_form
from peftc.plan.edit import Edit


@dataclass(frozen=True)
class Unfrozen:
    """A backbone parameter that trains (BitFit, the task head); `index` counts the entries of the spec."""

    path: str
    numel: int
    at: str
    index: int = 0


@dataclass(frozen=True)
class Counts:
    """Elements. `weights` as the paper counts (no biases, no head, no reparametrising MLP), `stored` with
    biases after constant folding, `training` all that trains."""

    backbone: int
    weights: int
    stored: int
    training: int


@dataclass(frozen=True)
class Quantized:
    """The backbone's parameters that are held as whole numbers: how many numbers they stand for, in how many bytes
    with their scales."""

    numel: int = 0
    bytes: int = 0

    @property
    def bits(self) -> float:
        """Of each number."""
        return 8 * self.bytes / self.numel if self.numel else 0.0


NONE = Quantized()


def numel(edits: Iterable[Edit]) -> int:
    unique = {p.path: p.numel for edit in edits for p in edit.parameters if p.trainable}
    return sum(unique.values())


def count(
    edits: Sequence[Edit], unfrozen: Sequence[Unfrozen], backbone: Mapping[str, tuple[int, ...]]
) -> Counts:
    stored = [constant_form(edit) for edit in edits]
    free = sum(one.numel for one in unfrozen)
    counted = sum(one.numel for one in unfrozen if not one.at or SITES[one.at].counted)
    return Counts(
        backbone=sum(prod(shape) for shape in backbone.values()),
        weights=counted + _matrices(stored),
        stored=free + numel(stored),
        training=free + numel(edits),
    )


def _matrices(edits: Sequence[Edit]) -> int:
    """Matrices alone, except for an entry that has none (IA3): there the vectors are the method."""
    counted: dict[str, int] = {}
    for edit in edits:
        mine = [p for p in edit.parameters if p.trainable]
        matrices = [p for p in mine if len(p.shape) > 1]
        counted |= {p.path: p.numel for p in matrices or mine}
    return sum(counted.values())
