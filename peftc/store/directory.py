"""Directories that peftc writes: filled beside, moved into place, known by their manifest."""

from __future__ import annotations

import ctypes
import glob
import hashlib
import json
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError, fault, no_room

try:
    import fcntl
except ImportError:  # Windows: what a killed write leaves there stays
    fcntl = None  # type: ignore[assignment]

MANIFEST = "peftc.json"
FILES, UNFINISHED = "files", "unfinished"  # keys of a manifest
WEIGHTS = ".data"
CERTIFICATES = ("certificate.json", "certificate.md")
NUMBERS = (".safetensors", ".onnx", WEIGHTS)
# Without these nothing reads a directory, so they come after what they speak of.
LAST = ("adapter_config.json", "config.json", MANIFEST)
FORMAT = 2
READS = (1, FORMAT)  # 1: the spec in data of its own (peftc.store.format1)
MAX_MANIFEST_BYTES = 4 << 20


_HERE, _EXCHANGE = -100, 2  # of Linux: AT_FDCWD, RENAME_EXCHANGE


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


def write_directory(path: Path, fill: Callable[[Path], Mapping[str, Any] | None]) -> None:
    """Fill a temporary directory beside `path` and move its files there, with what `fill` returns as their manifest.

    A kill at any moment leaves the old files or the new ones; or, where the system cannot exchange two directories, a
    manifest that says that the write was interrupted. The manifest gets the size and the SHA-256 of each file. A file
    that stands in the way and is not ours is an error; other files (Trainer's) are left alone, but certificates of
    what stood there before.
    """
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path)
        temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
        with held(temporary):
            try:
                manifest = fill(temporary)
                if manifest is not None:
                    _put(temporary / MANIFEST, {**manifest, FILES: _facts(temporary)})
                _flush(temporary)
                _refuse_foreign(path, [one.name for one in temporary.iterdir()])
                _move(temporary, path)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def room(path: Path) -> Iterator[None]:
    """Raise DeltaError where a write of `path` finds none on the disk."""
    try:
        yield
    except Exception as error:
        if not no_room(error):
            raise
        raise DeltaError(
            f"{path} is not written: no room on the disk; make some and run it again"
        ) from error


def _move(temporary: Path, path: Path) -> None:
    if not path.exists():
        os.chmod(temporary, 0o755)
        os.replace(temporary, path)
        return _sync(path.parent)
    if _exchanged(temporary, path):
        return _sync(path.parent)
    if (temporary / MANIFEST).is_file():
        # Files can only be replaced one by one: until the last, no reader may take them for one artefact.
        _put(temporary / UNFINISHED, {"format": FORMAT, UNFINISHED: True})
        os.replace(temporary / UNFINISHED, path / MANIFEST)
        _sync(path)
    for one in sorted(temporary.iterdir(), key=lambda one: (one.name in LAST, one.name)):
        if one.name == MANIFEST:
            _sync(path)  # the others are there before it says so
        os.replace(one, path / one.name)
    _sync(path)


def _exchanged(temporary: Path, path: Path) -> bool:
    """Let two directories change places in one step; `path` keeps what is not ours. False where the system cannot, or
    where there are folders in `path`, which cannot be in two places."""
    new, old = ({one.name for one in where.iterdir()} for where in (temporary, path))
    others = sorted(old - new - _ours(path))
    if path.is_symlink() or any((path / name).is_dir() for name in others):
        return False
    try:
        for name in others:
            os.link(path / name, temporary / name, follow_symlinks=False)
        os.chmod(temporary, stat.S_IMODE(path.stat().st_mode))
        _sync(temporary)
        return exchange(temporary, path)
    except OSError:  # links, or renames of this kind, are not for this file system
        return False


def _ours(path: Path) -> set[str]:
    """What a directory has that is of what was written there, and of nothing else."""
    try:
        written = read_manifest(path, ()).get(FILES, {})
    except DeltaError:  # damaged, or another's
        written = {}
    return {*written, *CERTIFICATES}


def exchange(one: Path, other: Path) -> bool:
    """Rename each of two to the other's name, at once. False where the system has no call for it. Raises OSError."""
    call = (
        getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if os.name == "posix"
        else None
    )
    if call is None:
        return False
    if call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE):
        raise OSError(ctypes.get_errno(), "renameat2", str(one), None, str(other))
    return True


def _facts(directory: Path) -> dict[str, dict[str, Any]]:
    """Size and digest of what holds numbers; settings and tokenizers may be edited by hand."""
    return {
        one.name: {"bytes": one.stat().st_size, "sha256": _digest(one)}
        for one in sorted(directory.iterdir())
        if one.suffix in NUMBERS
    }


def _digest(file: Path) -> str:
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def _put(file: Path, data: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(data, indent=2) + "\n")
    _sync(file)


def _flush(directory: Path) -> None:
    """To the disk: a rename must not get there before the content that it names."""
    for folder, _, names in os.walk(directory):
        for name in names:
            _sync(Path(folder) / name)
        _sync(Path(folder))


def _sync(path: Path) -> None:
    """The content of a file, or the names in a directory, to the disk, where the file system can."""
    if os.name == "nt":  # neither can be opened so there
        return
    opened = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError):
            os.fsync(opened)
    finally:
        os.close(opened)


def _prefix(path: Path) -> str:
    return f".{path.name}-peftc-"


@contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Lock a directory while it is written to; the system lets go of it when this process ends. Gives False, and locks
    nothing, where another holds it."""
    if fcntl is None:
        yield True
        return
    folder = os.open(directory, os.O_RDONLY)
    try:
        yield _locked(folder)
    finally:
        os.close(folder)


def _locked(folder: int) -> bool:
    try:
        fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks: nobody can sweep there either
        pass
    return True


def sweep(path: Path) -> None:
    """Remove what killed writes of `path` left beside it: temporary directories that nobody holds."""
    if fcntl is None:
        return
    for orphan in path.parent.glob(f"{glob.escape(_prefix(path))}*"):
        try:
            folder = os.open(orphan, os.O_RDONLY)
        except OSError:  # another write was faster
            continue
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(orphan, ignore_errors=True)
        except OSError:  # it is being written
            continue
        finally:
            os.close(folder)


def check_files(
    path: Path, manifest: Mapping[str, Any], *, content: bool, only: Collection[str] = ()
) -> None:
    """Raise DeltaError unless the files of a manifest are those that were written with it.

    Sizes are always compared, digests with `content`; `only` names some of the files. A manifest of before
    there were digests has none to compare.
    """
    written = manifest.get(FILES, {})
    try:
        wanted = {
            name: (int(one["bytes"]), str(one["sha256"]))
            for name, one in written.items()
            if not only or name in only
        }
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DeltaError(
            f"{path / MANIFEST} is damaged: '{FILES}' is not what it must be: {fault(error)}"
        ) from error
    for name, (size, digest) in wanted.items():
        file = path / Path(name).name
        if not file.is_file():
            raise DeltaError(f"{path} lacks {file.name}; write it again")
        if file.stat().st_size != size:
            raise DeltaError(
                f"{file} is damaged: it has {file.stat().st_size:,} bytes of {size:,}; write it again"
            )
        if content and _digest(file) != digest:
            raise DeltaError(
                f"{file} is not the file that {MANIFEST} was written with; write both again"
            )


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
        raise DeltaError(f"{file} is larger than {MAX_MANIFEST_BYTES >> 20} MiB")
    try:
        manifest = json.loads(file.read_text())
        unfinished = manifest.get(UNFINISHED)
        fits = manifest["format"] in READS
        lacks = [key for key in keys if key not in manifest]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise DeltaError(f"{file} is damaged: {fault(error)}") from error
    if unfinished:
        raise DeltaError(f"{path} is incomplete: its write was interrupted; write it again")
    if not fits:
        raise DeltaError(
            f"{file} has format {manifest['format']}; this peftc reads format {' and '.join(map(str, READS))}"
        )
    if lacks:
        kind = "an ONNX bundle" if "graphs" in manifest else "a directory of deltas"
        raise DeltaError(f"{path} is {kind}, not what is wanted here")
    return dict(manifest)
