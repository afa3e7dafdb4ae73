"""The schedule: which passes run, in which order. Read it aloud."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch

from passes.beside import Beside
from passes.factors import Factors
from passes.fold_affine import FoldAffine
from passes.fold_constants import FoldConstants
from passes.held import HeldRows
from passes.insert import Insert
from passes.joined import Joined
from passes.masks import Masks
from passes.normalize import Normalize
from passes.norms import Norms
from passes.penalize import Penalize
from passes.products import Products
from passes.quantized import Quantized
from passes.rows import Rows
from passes.slices import Slices
from passes.turned import Turned
from passes.widen import Widen
from peftc.plan.edit import Edit

FOLD = (FoldConstants(), FoldAffine(), Widen())
# Makes a graph that runs in torch no heavier than its algebra; an exported one is left to its runtime.
LEAN = (Factors(), Slices(), Products(), Joined(), Turned(), Rows(), Norms(), Masks(), HeldRows())
# Of a graph that is exported: its weights are constants.
EXPORT = (Beside(),)


def train(
    edits: tuple[Edit, ...], dtypes: Mapping[str, torch.dtype] = MappingProxyType({})
) -> tuple[Normalize, Insert, Penalize]:
    """What every captured entry goes through, whatever the mode. `dtypes` are those of the deltas by path, where
    they are not the model's."""
    return (Normalize(), Insert(edits, dtypes), Penalize(edits))


__all__ = [
    "EXPORT",
    "FOLD",
    "LEAN",
    "Beside",
    "Factors",
    "FoldAffine",
    "FoldConstants",
    "HeldRows",
    "Insert",
    "Joined",
    "Masks",
    "Normalize",
    "Norms",
    "Penalize",
    "Products",
    "Quantized",
    "Rows",
    "Slices",
    "Turned",
    "Widen",
    "train",
]
