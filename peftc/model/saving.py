"""Saving: what a compiled model writes of itself, and whether deltas belong to a backbone."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc.graph.placement import weights
from peftc.language import resolved
from peftc.model.sets import SetError
from peftc.plan.algebra import constant_form
from peftc.plan.plan import Plan
from peftc.rewrite.evaluate import constant_values
from peftc.store.deltas import DEFAULT, write
from peftc.store.directory import FORMAT, DeltaError
from peftc.store.fingerprint import fingerprint
from peftc.store.versions import versions


def save(
    model: Any,
    path: Path,
    names: Sequence[str],
    stored: bool = False,
    tensors: Mapping[str, torch.Tensor] | None = None,
) -> None:
    """Write these delta sets of a compiled model: `peftc.json` and `model.safetensors`.

    `tensors` are those of its state dict, where its own are parts of them; without it, its own.

    With `stored`, what is constant after training is evaluated first (the prefix without its MLP); such
    deltas serve and fold, but a reparametrisation can no longer be trained further. Raises SetError without a set.
    """
    if not names:
        raise SetError("no delta set is in use; say which to save, by its name")
    given = learned(model, names, tensors)
    sets = {name: model._sets.all[name] for name in names}
    written: dict[str, torch.Tensor] = {}
    for one in sets.values():
        written |= stored_values(one.plan, stored, given)
        written |= {own.path: given[own.path].detach() for own in one.plan.unfrozen}
    first, *others = [
        {
            "form": "stored" if stored else one.form,
            "spec": resolved.write(one.plan.spec),
            "spec_digest": resolved.digest(one.plan.spec),
            "edits": [edit.name for edit in one.plan.edits],
            "left": [edit.key for edit in one.plan.edits],
            **({} if name == DEFAULT else {"set": name}),
        }
        for name, one in sets.items()
    ]
    manifest = {
        "format": FORMAT,
        "versions": versions(),
        **first,
        **({"others": others} if others else {}),
        "backbone": {
            "name": model.config.name_or_path,
            "class": type(model).__name__,
            "labels": _labels(model),
            "fingerprint": fingerprint_under(model, names, tensors),
        },
    }
    write(path, manifest, written)


def fingerprint_under(
    model: Any, names: Iterable[str], tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, str]:
    """Of the backbone under these delta sets of a compiled model; `tensors` as in `save`."""
    plans = [model._sets.all[name].plan for name in names]
    free = frozenset(own.path for plan in plans for own in plan.unfrozen)
    return fingerprint(weights(model, {**(tensors or {}), **model._sets.base}), free)


def learned(
    model: Any, names: Sequence[str], tensors: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """What these delta sets train or hold, by the names of a state dict; `tensors` are those of one. Raises
    DeltaError when that lacks one."""
    slots = model.deltas.values()
    found: dict[str, torch.Tensor] = {}
    for name in names:
        one = model._sets.all[name]
        found |= {f"deltas.{path}": slots[path] for path in one.plan.tensors}
        found |= one.weights
    if tensors is None:
        return found
    lacking = sorted(found.keys() - tensors.keys())
    if lacking:
        raise DeltaError(
            f"the state_dict lacks '{lacking[0]}' ({len(lacking)} missing); give that of the compiled model"
        )
    return {key: tensors[key] for key in found}


def _labels(model: Any) -> dict[str, Any]:
    """What a classifier's head is built from: a checkpoint without a head does not say it."""
    config: dict[str, Any] = json.loads(model.config.to_json_string(use_diff=False))
    return {k: config[k] for k in ("id2label", "label2id") if k in config}


def stored_values(
    plan: Plan, stored: bool, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The delta tensors of a plan, constants evaluated when `stored`; by their names in the model, as `given`."""
    values = {path: given[f"deltas.{path}"] for path in plan.tensors}
    if stored:
        found: dict[str, torch.Tensor] = {}
        for edit in plan.edits:
            known = values | constant_values(edit, values)
            found |= {one.path: known[one.path] for one in constant_form(edit).parameters}
        values = found
    return {f"deltas.{path}": value for path, value in values.items()}


def check_backbone(
    manifest: Mapping[str, Any], model: PreTrainedModel, plans: Iterable[Plan]
) -> None:
    """Raise DeltaError unless `model` is the backbone that the deltas were made for."""
    want = manifest["backbone"]["fingerprint"]
    free = frozenset(one.path for plan in plans for one in plan.unfrozen)
    got = fingerprint(weights(model), free)
    name = manifest["backbone"]["name"] or manifest["backbone"]["class"]
    if want["layout"] != got["layout"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its parameters differ")
    if want["content"] != got["content"]:
        raise DeltaError(f"these deltas belong to another backbone ({name}): its weights differ")
