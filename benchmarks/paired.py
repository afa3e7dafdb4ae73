"""Two ways to do one thing, timed in turn: medians of ratios taken pair by pair, with an interval."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

NARROW = 0.04
# Pairs between two moves.
_STAY = 5


@dataclass(frozen=True)
class Row:
    """Two ways to do one thing: `steps` by name, ours first, and how many times the other's time ours may take. Of the
    `models` that they run the weights are moved now and then: where they lie makes a small step up to a seventh
    faster or slower, the same ops on the same numbers."""

    what: str
    steps: dict[str, Callable[[], object]]
    bound: float
    models: tuple[nn.Module, ...] = ()


def interval(ratios: list[float]) -> tuple[float, float]:
    """A 95 % interval of the median, by resampling."""
    draw = random.Random(0)
    size = len(ratios)
    medians = sorted(statistics.median(draw.choices(ratios, k=size)) for _ in range(1000))
    return medians[25], medians[974]


def finish() -> None:
    """Wait for all that is queued on an accelerator, where there is one."""
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()


def timed(step: Callable[[], object]) -> float:
    """Seconds of one call, until its last kernel has run."""
    finish()
    start = time.perf_counter()
    step()
    finish()
    return time.perf_counter() - start


def move(models: Iterable[nn.Module]) -> None:
    """Put every weight elsewhere in memory."""
    with torch.no_grad():
        for model in models:
            weights = [*model.parameters(), *model.buffers()]
            for weight, copied in zip(
                weights, [one.detach().clone() for one in weights], strict=True
            ):
                weight.data = copied


def told(row: Row, ratio: float, low: float, high: float) -> None:
    """A row's line."""
    (mine, other), verdict = row.steps, "ok" if ratio <= row.bound else "OVER"
    print(
        f"{row.what:<46}{mine} / {other:<12}{ratio:5.2f} [{low:.2f}, {high:.2f}]  <= {row.bound:<5} {verdict}",
        flush=True,
    )


def measure(row: Row, pairs: int, seconds: float) -> dict[str, Any]:
    """The ratio of a row, taken in pairs whose order changes, so that a slow moment hits both alike."""
    (mine, ours), (other, theirs) = row.steps.items()
    times: dict[str, list[float]] = {mine: [], other: []}
    start = time.perf_counter()
    low, high = 0.0, 1.0
    while len(times[mine]) < pairs or high - low > NARROW:
        if len(times[mine]) % _STAY == 0:
            move(row.models)
            for step in (ours, theirs, ours, theirs):
                step()
        order = [(mine, ours), (other, theirs)]
        for name, step in order if len(times[mine]) % 2 else reversed(order):
            times[name].append(timed(step))
        if len(times[mine]) >= pairs:
            low, high = interval([a / b for a, b in zip(*times.values(), strict=True)])
            if time.perf_counter() - start > seconds:
                break
    ratio = statistics.median(a / b for a, b in zip(*times.values(), strict=True))
    told(row, ratio, low, high)
    return {
        "ratio": ratio,
        "interval": [low, high],
        "bound": row.bound,
        "pairs": len(times[mine]),
        "seconds": {name: statistics.median(found) for name, found in times.items()},
    }
