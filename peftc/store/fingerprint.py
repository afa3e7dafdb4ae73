"""Fingerprints: what tells one backbone from another."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel


def fingerprint(
    model: PreTrainedModel,
    leave_out: frozenset[str] = frozenset(),
    given: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, str]:
    """`layout`: names and shapes. `content`: 64 elements of each tensor, rounded to bfloat16 so that a
    backbone loaded in half precision is still itself. `leave_out` are paths that the deltas replace;
    `given` has whole weights by path, where the model's own are parts."""
    layout, content = hashlib.sha256(), hashlib.sha256()
    for path, weight in model.named_parameters():
        if path.startswith("deltas."):
            continue
        layout.update(f"{path}{list(weight.shape)}".encode())
        if path in leave_out:
            continue
        whole = weight if given is None else given.get(path, weight)
        flat = whole.detach().reshape(-1)
        count = min(64, flat.numel())
        # In integers: the float32 of torch.linspace is not exact beyond 2**24 elements.
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        sample = flat[picks].to("cpu", torch.bfloat16).view(torch.int16)
        content.update(sample.numpy().tobytes())
    return {"layout": layout.hexdigest(), "content": content.hexdigest()}
