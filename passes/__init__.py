"""The schedule: which passes run, in which order. Read it aloud."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from passes.fold_affine import FoldAffine
from passes.fold_constants import FoldConstants
from passes.insert import Insert
from passes.normalize import Normalize
from passes.penalize import Penalize
from peftc.plan.edit import Edit

FOLD = (FoldConstants(), FoldAffine())


def train(
    edits: tuple[Edit, ...], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
) -> tuple[Normalize, Insert, Penalize]:
    """What every captured entry goes through, whatever the mode. `dtypes` are those of the deltas by path, where
    they are not the model's."""
    return (Normalize(), Insert(edits, dtypes), Penalize(edits))


__all__ = ["FOLD", "FoldAffine", "FoldConstants", "Insert", "Normalize", "Penalize", "train"]
