"""Compared: how far apart one output is, computed in two ways, over all that was tried."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

# The outputs that are distributions over their last axis: labels or words.
CHOICES = ("logits", "start_logits", "end_logits")


@dataclass
class Compared:
    """Of one output: its largest value, the largest difference and where, the mean one; of a distribution also the KL,
    summed in nats, and at how many positions the likeliest is the same."""

    scale: float = 0.0
    error: float = 0.0
    worst: object = None
    total: float = 0.0
    numbers: int = 0
    divergence: float = 0.0
    same: int = 0
    positions: int = 0

    @property
    def mean(self) -> float:
        return self.total / max(self.numbers, 1)

    def see(self, want: torch.Tensor, got: torch.Tensor, where: object, choices: bool) -> None:
        """Two tensors of one shape, on one device."""
        if not want.numel():
            return
        want, got = want.double(), got.double()
        gap = (want - got).abs()
        self.scale = max(self.scale, want.abs().max().item())
        self.total, self.numbers = self.total + gap.sum().item(), self.numbers + gap.numel()
        error = gap.max().item()
        if not error <= self.error:  # true for nan
            self.error, self.worst = error, where
        if choices:
            left, right = want.log_softmax(-1), got.log_softmax(-1)
            self.divergence += (left.exp() * (left - right)).sum().item()
            self.same += int((left.argmax(-1) == right.argmax(-1)).sum())
            self.positions += left[..., 0].numel()


def choices_of(seen: Iterable[Compared]) -> tuple[float, float, int]:
    """Of several outputs: the mean KL, the share of positions with the same likeliest, and how many there are."""
    found = [one for one in seen if one.positions]
    positions = sum(one.positions for one in found)
    if not positions:
        return 0.0, 1.0, 0
    divergence, same = (sum(getattr(one, k) for one in found) for k in ("divergence", "same"))
    return divergence / positions, same / positions, positions
