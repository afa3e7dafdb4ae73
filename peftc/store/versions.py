"""Versions: what an artefact was made with."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence


def versions(more: Sequence[str] = ()) -> dict[str, str]:
    """Of Python, peftc, torch and transformers, and of those packages of `more` that are there."""
    found = {"python": sys.version.split()[0]}
    for name in ("peftc", "torch", "transformers", *more):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
