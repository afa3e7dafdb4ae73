"""Fingerprints: what tells one backbone from another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch


def fingerprint(
    weights: Iterable[tuple[str, torch.Tensor]], leave_out: frozenset[str] = frozenset()
) -> dict[str, str]:
    """Of a backbone's weights with their paths. `layout`: names and shapes. `content`: 64 elements of each tensor, rounded to
    bfloat16 so that a backbone loaded in half precision is still itself. `leave_out` are paths that the deltas
    replace."""
    layout, content = hashlib.sha256(), hashlib.sha256()
    for path, weight in weights:
        layout.update(f"{path}{list(weight.shape)}".encode())
        if path in leave_out:
            continue
        flat = weight.detach().reshape(-1)
        count = min(64, flat.numel())
        # In integers: the float32 of torch.linspace is not exact beyond 2**24 elements.
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        sample = flat[picks].to("cpu", torch.bfloat16).view(torch.int16)
        content.update(sample.numpy().tobytes())
    return {"layout": layout.hexdigest(), "content": content.hexdigest()}
