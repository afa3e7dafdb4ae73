"""The schedule: which passes run, in which order. Read it aloud."""

from passes.fold_affine import FoldAffine
from passes.fold_constants import FoldConstants
from passes.insert import Insert
from passes.normalize import Normalize
from peftc.plan.edit import Edit

FOLD = (FoldConstants(), FoldAffine())


def train(edits: tuple[Edit, ...]) -> tuple[Normalize, Insert]:
    """What every captured entry goes through, whatever the mode."""
    return (Normalize(), Insert(edits))


__all__ = ["FOLD", "FoldAffine", "FoldConstants", "Insert", "Normalize", "train"]
