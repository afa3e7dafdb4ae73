"""Saving: what a compiled model writes of itself, and whether deltas belong to a backbone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc.language import resolved
from peftc.plan.algebra import constant_form
from peftc.plan.plan import Plan
from peftc.rewrite.evaluate import constant_values
from peftc.store.deltas import write
from peftc.store.directory import FORMAT, DeltaError
from peftc.store.fingerprint import fingerprint


def save(
    model: Any, path: Path, stored: bool = False, tensors: Mapping[str, torch.Tensor] | None = None
) -> None:
    """Write the deltas of a compiled model: `peftc.json` and `model.safetensors`.

    `tensors` are those of its state dict, where its own are parts of them; without it, its own.

    With `stored`, what is constant after training is evaluated first (the prefix without its MLP); such
    deltas serve and fold, but a reparametrisation can no longer be trained further.
    """
    plan: Plan = model.plan
    given = _given(model, tensors)
    written = {f"deltas.{k}": v for k, v in stored_values(model, stored, given).items()}
    written |= {one.path: given[one.path].detach() for one in plan.unfrozen}
    form = "stored" if stored else model.form
    manifest = {
        "format": FORMAT,
        "form": form,
        "spec": resolved.write(plan.spec),
        "spec_digest": resolved.digest(plan.spec),
        "edits": [edit.name for edit in plan.edits],
        "left": [edit.key for edit in plan.edits],
        "backbone": {
            "name": model.config.name_or_path,
            "class": type(model).__name__,
            "labels": _labels(model),
            "fingerprint": fingerprint(model, frozenset(one.path for one in plan.unfrozen), given),
        },
    }
    write(path, manifest, written)


def _given(model: Any, tensors: Mapping[str, torch.Tensor] | None) -> Mapping[str, torch.Tensor]:
    """Every tensor of the model by its path, those of a state dict first. Raises DeltaError when it lacks a
    delta."""
    own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers())
    if tensors is None:
        return own
    learned = {f"deltas.{path}" for path in model.deltas.values()}
    learned |= {one.path for one in model.plan.unfrozen}
    lacking = sorted(learned - tensors.keys())
    if lacking:
        raise DeltaError(
            f"the state_dict lacks '{lacking[0]}' ({len(lacking)} missing); give that of the compiled model"
        )
    return {**own, **tensors}


def _labels(model: Any) -> dict[str, Any]:
    """What a classifier's head is built from: a checkpoint without a head does not say it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {k: config[k] for k in ("id2label", "label2id") if k in config}


def stored_values(
    model: Any, stored: bool, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The delta tensors by path, constants evaluated when `stored`; `given` has them by their path in the model."""
    values = {path: given[f"deltas.{path}"] for path in model.deltas.values()}
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


def check_backbone(manifest: Mapping[str, Any], model: PreTrainedModel, plan: Plan) -> None:
    """Raise DeltaError unless `model` is the backbone that the deltas were made for."""
    want = manifest["backbone"]["fingerprint"]
    got = fingerprint(model, frozenset(one.path for one in plan.unfrozen))
    name = manifest["backbone"]["name"] or manifest["backbone"]["class"]
    if want["layout"] != got["layout"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its parameters differ")
    if want["content"] != got["content"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its weights differ")
