"""The schedule: which passes run, in which order. Read it aloud."""

from collections.abc import Mapping
from types import MappingProxyType

import torch

from passes.fold_affine import FoldAffine
from passes.fold_constants import FoldConstants
from passes.insert import Insert
from passes.normalize import Normalize
from peftc.plan.edit import Edit

FOLD = (FoldConstants(), FoldAffine())


def train(
    edits: tuple[Edit, ...], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
) -> tuple[Normalize, Insert]:
    """What every captured entry goes through, whatever the mode. `dtypes` are those of the deltas by path."""
    return (Normalize(), Insert(edits))


__all__ = ["FOLD", "FoldAffine", "FoldConstants", "Insert", "Normalize", "train"]
