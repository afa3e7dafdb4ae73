"""Folding: what the fold passes work on: the edits left, their tensors, and the weights rewritten so far."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from peftc.plan.edit import Edit

Key = tuple[int, str]


@dataclass(frozen=True)
class Outcome:
    """What became of one edit: folded into `note`, or kept because of it. `key` tells it from others of its plan, `by` is
    the pass that folded it; `evaluated` the one that made parameters of what it computed of parameters alone."""

    edit: str
    folded: bool
    note: str
    key: Key = (0, "")
    by: str = ""
    evaluated: str = ""


@dataclass(frozen=True)
class Report:
    """What folded or did not, and the largest change of the model's output that folding made.

    `error` and `scale` are of the outputs of one seeded batch in evaluation mode: max |folded - unfolded|
    and max |unfolded|. `changed` is max |unfolded - backbone|: a merge that changes nothing is suspect. `held` is
    the bytes of the backbone's parameters before and after: what was quantised takes more once something folded in.
    `seconds` is how long the comparison took.
    """

    outcomes: tuple[Outcome, ...]
    error: float = 0.0
    scale: float = 0.0
    changed: float = 0.0
    held: tuple[int, int] = (0, 0)
    seconds: float = 0.0

    @property
    def folded(self) -> tuple[Outcome, ...]:
        return tuple(one for one in self.outcomes if one.folded)

    @property
    def kept(self) -> tuple[Outcome, ...]:
        return tuple(one for one in self.outcomes if not one.folded)


def rounded(stored: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """What a weight becomes: the folded one, float64, rounded once to the type it is stored in."""
    return folded.to(stored.dtype)


@dataclass
class Folding:
    """`read` fetches a backbone weight by path. Of the `tied` paths the `separable` ones may get a weight of
    their own. Fold passes take edits out of `edits` and say where they went (`folded`) or why they stay
    (`reasons`), by the edit's key; `by` names the pass that took one, `evaluated` the one that computed its
    constants. `refitted` gives a model on the meta device that has parameters of other shapes, all of these at
    once, or None, and is None where no shape may change; `like` is the one that was taken. `weights` has what
    `as_stored` makes of a stored weight and its folded value as soon as all of a weight's edits are done, so that
    no float64 copy is kept."""

    edits: list[Edit]
    tensors: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]
    tied: frozenset[str] = frozenset()
    separable: frozenset[str] = frozenset()
    as_stored: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = rounded
    refitted: Callable[[Mapping[str, torch.Size]], PreTrainedModel | None] | None = None
    like: PreTrainedModel | None = None
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    folded: dict[Key, str] = field(default_factory=dict)
    reasons: dict[Key, str] = field(default_factory=dict)
    by: dict[Key, str] = field(default_factory=dict)
    evaluated: dict[Key, str] = field(default_factory=dict)

    def now(self, path: str) -> torch.Tensor:
        """A weight with what was folded into it so far, float64."""
        found = self.weights[path] if path in self.weights else self.read(path)
        return found.detach().double()

    def put(self, path: str, value: torch.Tensor) -> None:
        """A rewritten weight, float64, as the model stores it."""
        self.weights[path] = self.as_stored(self.read(path).detach(), value)

    def outcomes(self, edits: tuple[Edit, ...]) -> tuple[Outcome, ...]:
        """What became of each of the edits that the folding started with."""
        return tuple(
            Outcome(
                edit.name,
                edit.key in self.folded,
                self.folded.get(edit.key) or self.reasons.get(edit.key, ""),
                edit.key,
                self.by.get(edit.key, ""),
                self.evaluated.get(edit.key, ""),
            )
            for edit in edits
        )
