"""What a decoding step and a training step dispatch and keep."""

from __future__ import annotations

import measured
from torch import nn

Counts = dict[str, int]


def step(model: nn.Module, name: str) -> Counts:
    """One decoding step: what generating one token more adds."""
    inputs = measured.batch(name, rows=2, length=16)
    runs = [measured.generating(model, inputs, tokens) for tokens in (6, 7)]
    for run in runs:
        run()
    (few, some), (more, others) = (measured.kernels(run) for run in runs)
    fewer, most = (measured.flops(run) for run in runs)
    return {"kernels": more - few, "views": others - some, "flops": most - fewer}


def training(model: nn.Module, name: str, padded: bool) -> Counts:
    """Forward and backward of one batch."""
    inputs = measured.batch(name, padded=padded)
    run = measured.training_step(model, inputs)
    run()
    run()
    counted, views = measured.kernels(run)
    return {
        "kernels": counted,
        "views": views,
        "flops": measured.flops(run),
        "saved bytes": measured.saved_bytes(model, inputs),
        "peak bytes": measured.peak_bytes(run),
    }
