"""Deltas on disk: safetensors, the resolved spec, and the fingerprint of the backbone they belong to."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from peftc.errors import PeftcError, fault
from peftc.language import resolved
from peftc.language.spec import Spec
from peftc.store import format1, sparse
from peftc.store.directory import MANIFEST, DeltaError, check_files, read_manifest, write_directory

# Trainer looks for this name when it resumes; the file holds deltas alone.
WEIGHTS = "model.safetensors"


def write(path: Path, manifest: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
    """`peftc.json` and `model.safetensors` at `path`.

    A tensor of mostly zeros is written as its non-zeros (see `peftc.store.sparse`); reading gives the same bits.
    """

    def fill(directory: Path) -> Mapping[str, Any]:
        cpu = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        save_file(sparse.packed(cpu), directory / WEIGHTS, {"format": "pt"})
        os.chmod(directory / WEIGHTS, 0o644)  # safetensors writes for the owner alone
        return manifest

    write_directory(path, fill)


FORMS = ("training", "stored")
# The set that a model is compiled with, unless it is given a name.
DEFAULT = "default"


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of a directory of deltas, its parts of the kinds that they must be. Raises DeltaError."""
    manifest = read_manifest(path)
    backbone = manifest["backbone"] if isinstance(manifest["backbone"], dict) else {}
    prints = backbone.get("fingerprint")
    others = manifest.get("others", [])
    names = [one.get("set", DEFAULT) for one in [manifest, *others]] if _dicts(others) else []
    holds = {
        "set": all(isinstance(one, str) for one in names) and len({*map(str, names)}) == len(names),
        "others": _dicts(others),
        "backbone": all(isinstance(backbone.get(key), str) for key in ("name", "class")),
        "fingerprint": isinstance(prints, dict)
        and all(isinstance(prints.get(key), str) for key in ("layout", "content")),
    }
    for one in sets_of(manifest) if holds["others"] else ():
        holds |= {
            "form": one.get("form") in FORMS,
            "edits": isinstance(one.get("edits"), list),
            "left": isinstance(one.get("left", []), list),
        }
        if not all(holds.values()):
            break
    odd = [key for key, held in holds.items() if not held]
    if odd:
        raise DeltaError(f"{path / MANIFEST} is damaged: '{odd[0]}' is not what it must be")
    return manifest


def _dicts(others: object) -> bool:
    return isinstance(others, list) and all(isinstance(one, dict) for one in others)


def sets_of(manifest: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a manifest says of each set that its directory holds."""
    first = {key: value for key, value in manifest.items() if key != "others"}
    every = [first, *manifest.get("others", [])]
    return [{"format": manifest["format"], "set": DEFAULT, **one} for one in every]


def spec_of(manifest: Mapping[str, Any], path: Path) -> Spec:
    """The resolved spec that the deltas carry, checked as any spec is. Raises DeltaError."""
    try:
        said = manifest["spec"] if manifest["format"] > 1 else format1.converted(manifest["spec"])
        return resolved.read(said)
    except (PeftcError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(f"{path / MANIFEST} is damaged: {fault(error)}") from error


def read_tensors(
    path: Path, manifest: Mapping[str, Any], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """The tensors of `model.safetensors`, sparse ones made whole.

    It must be the file that the manifest was written with, its names and shapes exactly the expected ones;
    both are checked before a tensor is read. Raises DeltaError.
    """
    file = path / WEIGHTS
    check_files(path, manifest, content=True, only=(WEIGHTS,))
    try:
        with safe_open(file, framework="pt") as handle:
            sizes = {key: tuple(handle.get_slice(key).get_shape()) for key in handle.keys()}  # noqa: SIM118
            _check_names(file, sizes, expected)
            sparse.check_sizes(sizes, expected)
            stored = {key: handle.get_tensor(key) for key in sizes}
        return sparse.unpacked(stored, expected)
    except sparse.SparseError as error:
        raise DeltaError(f"{file} is damaged: {error}; save the deltas again") from error
    except (SafetensorError, OSError) as error:
        raise DeltaError(f"{file} cannot be read: {error}; save the deltas again") from error


def _check_names(
    file: Path, sizes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    wanted = sparse.names(expected.keys(), sizes.keys())
    missing, extra = sorted(wanted - sizes.keys()), sorted(sizes.keys() - wanted)
    if missing or extra:
        odd = f"lacks '{missing[0]}'" if missing else f"has '{extra[0]}', which the spec does not"
        raise DeltaError(f"{file} {odd} ({len(missing)} missing, {len(extra)} unknown)")
    for key, shape in expected.items():
        if key in sizes and sizes[key] != tuple(shape):
            raise DeltaError(
                f"{file}: '{key}' has the shape {list(sizes[key])}, expected {list(shape)}"
            )
