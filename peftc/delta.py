"""Deltas on disk: safetensors, the resolved spec, and the fingerprint of the backbone they belong to."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peftc import sparse
from peftc.algebra import constant_form, constant_values
from peftc.errors import PeftcError
from peftc.planning import Plan
from peftc.spec import Spec, from_data, to_data

MANIFEST = "peftc.json"
# Trainer looks for this name when it resumes; the file holds deltas alone.
WEIGHTS = "model.safetensors"
FORMAT = 1
MAX_MANIFEST_BYTES = 4 << 20


class DeltaError(PeftcError):
    """A directory of deltas that cannot be read, written or used with this backbone."""


def fingerprint(model: PreTrainedModel, leave_out: frozenset[str] = frozenset()) -> dict[str, str]:
    """`layout`: names and shapes. `content`: 64 elements of each tensor, rounded to bfloat16 so that a
    backbone loaded in half precision is still itself. `leave_out` are paths that the deltas replace."""
    layout, content = hashlib.sha256(), hashlib.sha256()
    for path, weight in model.named_parameters():
        if path.startswith("deltas."):
            continue
        layout.update(f"{path}{list(weight.shape)}".encode())
        if path in leave_out:
            continue
        flat = weight.detach().reshape(-1)
        count = min(64, flat.numel())
        # In integers: the float32 of torch.linspace is not exact beyond 2**24 elements.
        picks = torch.arange(count, device=flat.device) * (flat.numel() - 1) // max(count - 1, 1)
        sample = flat[picks].to("cpu", torch.bfloat16).view(torch.int16)
        content.update(sample.numpy().tobytes())
    return {"layout": layout.hexdigest(), "content": content.hexdigest()}


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


def save(model: Any, path: Path, stored: bool = False) -> None:
    """Write the deltas of a compiled model: `peftc.json` and `model.safetensors`.

    A tensor of mostly zeros is written as its non-zeros (see `peftc.sparse`); reading gives the same bits.
    With `stored`, what is constant after training is evaluated first (the prefix without its MLP); such
    deltas serve and fold, but a reparametrisation can no longer be trained further.
    """
    plan: Plan = model.plan
    tensors = {f"deltas.{k}": v for k, v in stored_values(model, stored).items()}
    weights = dict(model.named_parameters())
    tensors |= {one.path: weights[one.path].detach() for one in plan.unfrozen}
    form = "stored" if stored else model.form
    manifest = {
        "format": FORMAT,
        "form": form,
        "spec": to_data(plan.spec),
        "spec_digest": plan.spec.digest(),
        "edits": [edit.name for edit in plan.edits],
        "backbone": {
            "name": model.config.name_or_path,
            "class": type(model).__name__,
            "labels": _labels(model),
            "fingerprint": fingerprint(model, frozenset(one.path for one in plan.unfrozen)),
        },
    }

    def fill(directory: Path) -> None:
        cpu = {k: v.detach().to("cpu").contiguous().clone() for k, v in tensors.items()}
        save_file(sparse.packed(cpu), directory / WEIGHTS, {"format": "pt"})
        os.chmod(directory / WEIGHTS, 0o644)  # safetensors writes for the owner alone
        (directory / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")

    write_directory(path, fill)


def _labels(model: Any) -> dict[str, Any]:
    """What a classifier's head is built from: a checkpoint without a head does not say it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {k: config[k] for k in ("id2label", "label2id") if k in config}


def stored_values(model: Any, stored: bool) -> dict[str, torch.Tensor]:
    """The delta tensors by path, constants evaluated when `stored`."""
    values: dict[str, torch.Tensor] = model.deltas.values()
    if not stored:
        return values
    found: dict[str, torch.Tensor] = {}
    for edit in model.plan.edits:
        computed = constant_values(edit, values)
        found |= {
            p.path: computed[p.path] if p.path in computed else values[p.path]
            for p in constant_form(edit).parameters
        }
    return found


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
        fits = manifest["format"] == FORMAT
        lacks = [key for key in keys if key not in manifest]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(f"{file} is damaged: {error}") from error
    if not fits:
        raise DeltaError(
            f"{file} has format {manifest['format']}; this peftc reads format {FORMAT}"
        )
    if lacks:
        kind = "an ONNX bundle" if "graphs" in manifest else "a directory of deltas"
        raise DeltaError(f"{path} is {kind}, not what is wanted here")
    return dict(manifest)


def spec_of(manifest: Mapping[str, Any], path: Path) -> Spec:
    """The resolved spec that the deltas carry."""
    try:
        return from_data(manifest["spec"])
    except (PeftcError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DeltaError(f"{path / MANIFEST} is damaged: {error}") from error


def check_backbone(manifest: Mapping[str, Any], model: PreTrainedModel, plan: Plan) -> None:
    """Raise DeltaError unless `model` is the backbone that the deltas were made for."""
    want = manifest["backbone"]["fingerprint"]
    got = fingerprint(model, frozenset(one.path for one in plan.unfrozen))
    name = manifest["backbone"]["name"] or manifest["backbone"]["class"]
    if want["layout"] != got["layout"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its parameters differ")
    if want["content"] != got["content"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its weights differ")


def read_tensors(path: Path, expected: Mapping[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
    """The tensors of `model.safetensors`, sparse ones made whole; names and shapes must be exactly the
    expected ones, which is checked before anything is read."""
    file = path / WEIGHTS
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
        raise DeltaError(f"{file} cannot be read: {error}") from error


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
