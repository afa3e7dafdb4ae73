"""Pooling: how a model that says so (sentence-transformers' files beside its weights) makes one vector of a text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional
from transformers.utils.hub import cached_file

from peftc.export.graph import ExportError, Tensors

EMBEDDING = "sentence_embedding"
_FILE = "modules.json"


def _mean(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9)


def _most(states: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return states.masked_fill(mask == 0, -1e9).amax(1)


# By the settings of a Pooling module: of states [batch, length, d] and a mask [batch, length, 1], [batch, d].
_MODES: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "pooling_mode_cls_token": lambda states, mask: states[:, 0],
    "pooling_mode_mean_tokens": _mean,
    "pooling_mode_max_tokens": _most,
    "pooling_mode_mean_sqrt_len_tokens": lambda states, mask: (
        (states * mask).sum(1) / mask.sum(1).clamp(min=1e-9).sqrt()
    ),
}


@dataclass(frozen=True)
class Pooling:
    """`modes` side by side, then, where `normalized`, of length one."""

    modes: tuple[str, ...]
    normalized: bool

    def __call__(self, fields: Tensors, inputs: Tensors) -> dict[str, torch.Tensor]:
        states = fields["last_hidden_state"]
        mask = inputs["attention_mask"].unsqueeze(-1).to(states)
        mask = functional.pad(mask, (0, 0, states.shape[1] - mask.shape[1], 0), value=0)
        whole = torch.cat([_MODES[mode](states, mask) for mode in self.modes], -1)
        vector = functional.normalize(whole, dim=-1) if self.normalized else whole
        return {**fields, EMBEDDING: vector}

    @staticmethod
    def of(name: str) -> Pooling | None:
        """What is said beside the weights of a checkpoint; None where nothing is. Raises ExportError where a step is
        none of these."""
        modules = _read(name, _FILE)
        if not modules:
            return None
        modes: tuple[str, ...] = ()
        normalized = False
        for one in modules:
            kind = str(one["type"]).rpartition(".")[2]
            if kind == "Pooling":
                said = _read(name, f"{one['path']}/config.json") or {}
                modes = tuple(
                    m for m, on in said.items() if m.startswith("pooling_mode") and on is True
                )
            elif kind == "Normalize":
                normalized = True
            elif kind != "Transformer":
                raise ExportError(f"{name}: a '{kind}' in its {_FILE} has no ONNX graph here")
        odd = [mode for mode in modes if mode not in _MODES]
        if odd or not modes:
            said = f"by '{odd[0]}'" if odd else "by nothing"
            raise ExportError(f"{name} pools {said}; known are {', '.join(_MODES)}")
        return Pooling(modes, normalized)


def _read(name: str, file: str) -> Any:
    """A JSON file of a checkpoint that is here, a directory or of the hub's cache."""
    found = (
        cached_file(
            name,
            file,
            local_files_only=True,
            _raise_exceptions_for_gated_repo=False,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
        if name
        else None
    )
    if found is None:
        return None
    with open(found, encoding="utf-8") as content:
        return json.load(content)
