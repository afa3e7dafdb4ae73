"""Folding: what the fold passes work on: the edits left, their tensors, and the weights rewritten so far."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from peftc.plan.edit import Edit


@dataclass(frozen=True)
class Outcome:
    """What became of one edit: folded into `into`, or kept because of `reason`."""

    edit: str
    folded: bool
    note: str


@dataclass(frozen=True)
class Report:
    """What folded or did not, and the largest change of the model's output that folding made.

    `error` and `scale` are of the outputs of one seeded batch in evaluation mode: max |folded - unfolded|
    and max |unfolded|. `changed` is max |unfolded - backbone|: a merge that changes nothing is suspect.
    """

    outcomes: tuple[Outcome, ...]
    error: float = 0.0
    scale: float = 0.0
    changed: float = 0.0

    @property
    def folded(self) -> tuple[Outcome, ...]:
        return tuple(one for one in self.outcomes if one.folded)

    @property
    def kept(self) -> tuple[Outcome, ...]:
        return tuple(one for one in self.outcomes if not one.folded)


@dataclass
class Folding:
    """`read` fetches a backbone weight by path; `weights` holds the rewritten ones in float64. Of the `tied`
    paths the `separable` ones may get a weight of their own."""

    edits: list[Edit]
    tensors: dict[str, torch.Tensor]
    read: Callable[[str], torch.Tensor]
    tied: frozenset[str] = frozenset()
    separable: frozenset[str] = frozenset()
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    def weight(self, path: str) -> torch.Tensor:
        """A backbone weight as folded so far, in float64."""
        return self.weights[path] if path in self.weights else self.read(path).detach().double()
