"""Directories that peftc writes: filled beside, moved into place, known by their manifest."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError

MANIFEST = "peftc.json"
FORMAT = 2
READS = (1, FORMAT)  # 1: the spec in data of its own (peftc.store.format1)
MAX_MANIFEST_BYTES = 4 << 20


class DeltaError(PeftcError):
    """A directory of deltas that cannot be read, written or used with this backbone."""


def require_ours(path: Path) -> None:
    """Raise DeltaError unless `path` is new, empty or a directory that peftc wrote."""
    if path.exists() and not path.is_dir():
        raise DeltaError(f"{path} is a file; choose a directory")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise DeltaError(
            f"{path} is not empty and was not written by peftc; choose another directory"
        )


def write_directory(path: Path, fill: Callable[[Path], None]) -> None:
    """Fill a temporary directory and move its files to `path`: a reader never sees half of them.

    A file that stands in the way and is not ours is an error; other files (Trainer's) are left alone.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        fill(temporary)
        _refuse_foreign(path, [one.name for one in temporary.iterdir()])
        if path.exists():
            for one in sorted(temporary.iterdir(), key=lambda one: one.name == MANIFEST):
                os.replace(one, path / one.name)
        else:
            os.chmod(temporary, 0o755)
            os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _refuse_foreign(path: Path, names: list[str]) -> None:
    if path.exists() and not path.is_dir():
        raise DeltaError(f"{path} is a file; choose a directory")
    if (path / MANIFEST).is_file():
        return
    foreign = [name for name in names if (path / name).exists()]
    if foreign:
        raise DeltaError(
            f"{path} holds a '{foreign[0]}' that peftc did not write; choose another directory"
        )


def read_manifest(
    path: Path, keys: tuple[str, ...] = ("form", "spec", "edits", "backbone")
) -> dict[str, Any]:
    """`peftc.json` of a directory. Raises DeltaError when it is missing, too large, damaged, or not of the
    kind that has `keys`."""
    file = path / MANIFEST
    if not file.is_file():
        raise DeltaError(f"{path} holds no {MANIFEST}: peftc did not write it")
    if file.stat().st_size > MAX_MANIFEST_BYTES:
        raise DeltaError(f"{file} is larger than {MAX_MANIFEST_BYTES} bytes")
    try:
        manifest = json.loads(file.read_text())
        fits = manifest["format"] in READS
        lacks = [key for key in keys if key not in manifest]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(f"{file} is damaged: {error}") from error
    if not fits:
        raise DeltaError(
            f"{file} has format {manifest['format']}; this peftc reads format {' and '.join(map(str, READS))}"
        )
    if lacks:
        kind = "an ONNX bundle" if "graphs" in manifest else "a directory of deltas"
        raise DeltaError(f"{path} is {kind}, not what is wanted here")
    return dict(manifest)
