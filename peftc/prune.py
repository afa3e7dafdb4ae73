"""Pruning: what deltas change in the weights, projected to an exact number of entries (Guo et al. 2021)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from transformers import PreTrainedModel

from peftc import driver
from peftc.errors import PeftcError
from peftc.language.expr import Name, substitute
from peftc.language.ports import SITES, STORED
from peftc.language.reader import load_spec
from peftc.language.spec import Entry, Spec, numbered, scopes
from peftc.merging import fold
from peftc.model.compiled import CompiledModel
from peftc.plan.budget import elements
from peftc.plan.plan import Plan
from peftc.rewrite import verify
from peftc.rewrite.folding import Folding
from peftc.sites.kinds import KINDS
from peftc.sites.site import Site

SPEC = "sparse_difference"
Tensors = Mapping[str, torch.Tensor]


class PruneError(PeftcError):
    """Deltas that are no difference of weights, or a number of entries that cannot be kept of them."""


@dataclass(frozen=True)
class Pruning:
    """`kept` numbers of `changed`, those that the deltas made differ from the `backbone`'s; all are counts.

    `moved` is max |pruned - before| over the outputs of one seeded batch, `scale` their largest value.
    """

    kept: int
    changed: int
    backbone: int
    moved: float
    scale: float


def prune(
    model: CompiledModel,
    keep: str | int = "0.5%",
    *,
    example: driver.Batch | None = None,
) -> tuple[CompiledModel, Pruning]:
    """Keep the entries of largest magnitude of what the deltas of `model` change, over all weights together (Guo et al.
    2021).

    `keep` is a share of the backbone's parameters, cut to a whole number as a budget's, or a number; of
    equal entries the model's earlier ones stay. `example` is one batch by argument name, where inputs cannot be
    guessed. The deltas may be of any method that folds into the
    weights. What trains of the backbone itself (a task head) is not cut: deltas at it become part of it.

    Returns a new model on a copy of the backbone, with a `sparse_difference` at each weight where something
    is kept: its mask is frozen, so that training goes on within it. Raises PruneError when a delta does not
    fold, or when `keep` is none or more than there is.
    """
    free = {one.path for one in model.plan.unfrozen}
    backbone, folding = fold(model, driver.Trace(), as_stored=_difference)
    if folding.edits:
        kept = folding.edits[0]
        raise PruneError(
            f"{kept.name} is no difference of weights: {folding.reasons[kept.key]}; prune deltas that fold, such as those "
            "of diff_pruning or lora"
        )
    differences = _differences(backbone, folding, free)
    changed = sum(int(torch.count_nonzero(one)) for one in differences.values())
    count = _count(keep, changed, model.plan.parameters.backbone)
    masks = largest(differences, count)
    pruned = driver.compile(
        backbone,
        _spec(model.plan, [k for k, v in masks.items() if v.any()]),
        example=example or model.example,
    )
    _fill(pruned, differences, masks)
    inputs = driver.sample(model, example)
    before, after = driver.outputs(model, inputs), driver.outputs(pruned, inputs)
    moved, scale = verify.difference(after, before), verify.magnitude(before)
    return pruned, Pruning(count, changed, model.plan.parameters.backbone, moved, scale)


def largest(differences: Tensors, count: int) -> dict[str, torch.Tensor]:
    """Masks of exactly `count` entries in all, those of largest magnitude; of equal ones the first."""
    sizes = [one.numel() for one in differences.values()]
    wide = [one.detach().reshape(-1).cpu() for one in differences.values()]
    flat = torch.cat([one if one.dtype == torch.float64 else one.float() for one in wide]).abs()
    least = float(np.partition(flat.numpy(), len(flat) - count)[len(flat) - count])
    chosen = flat > least
    chosen[(flat == least).nonzero().reshape(-1)[: count - int(chosen.sum())]] = True
    return {
        path: part.reshape(one.shape).to(one.device)
        for (path, one), part in zip(differences.items(), torch.split(chosen, sizes), strict=True)
    }


def _difference(stored: torch.Tensor, folded: torch.Tensor) -> torch.Tensor:
    """Folded less original, in float64, rounded to the weights' own type."""
    return (folded - stored.double()).to(stored.dtype)


def _differences(
    backbone: PreTrainedModel, folding: Folding, free: set[str]
) -> dict[str, torch.Tensor]:
    """What the deltas change, in the order of the model; into `free` parameters of `backbone` it goes whole."""
    found = {}
    with torch.no_grad():
        for path, weight in backbone.named_parameters():
            if path not in folding.weights:
                continue
            if path in free:
                weight.add_(folding.weights[path])
            else:
                found[path] = folding.weights[path]
    return found


def _count(keep: str | int, changed: int, backbone: int) -> int:
    count = elements(str(keep), backbone)
    if changed == 0:
        raise PruneError("the deltas change no weight: train them first")
    if count < 1:
        raise PruneError(f"to keep {keep} of {backbone:,} parameters is to keep none; keep more")
    if count > changed:
        raise PruneError(
            f"to keep {keep} is to keep {count:,} numbers, but the deltas change {changed:,}; keep {changed} "
            "or fewer"
        )
    return count


def _spec(plan: Plan, paths: list[str]) -> Spec:
    """A `sparse_difference` at each of these weights, and what trained of the backbone as it did."""
    shipped, owners = load_spec(SPEC), _owners(plan)
    places: dict[tuple[str, str], list[str]] = {}
    for path in paths:
        if path not in owners:
            raise PruneError(
                f"'{path}' is the weight of no linear, convolution, norm or embedding alone; prune deltas that "
                "leave it as it is"
            )
        site, port = owners[path]
        places.setdefault((site.at, port), []).append(site.scope)
    every: dict[str, list[str]] = {}
    for site in plan.sites:
        every.setdefault(site.at, []).append(site.scope)
    entries = [
        _entry(shipped.entries[0], at, port, scope)
        for (at, port), wanted in places.items()
        for scope in _scopes(wanted, every[at])
    ]
    trained = [entry for entry in plan.spec.entries if entry.train]
    title = f"{shipped.title}, of {plan.spec.name}"
    deltas = numbered([*([entry] for entry in entries), trained])
    return replace(shipped, title=title, entries=deltas, text="", path="")


def _owners(plan: Plan) -> dict[str, tuple[Site, str]]:
    """The site that a weight is whole at, and the port that it is there."""
    found: dict[str, tuple[Site, str]] = {}
    for site in plan.sites:
        folds = KINDS[site.at].folds
        for port in SITES[site.at].having(*STORED) if folds and folds.owns else ():
            if port in site.weights and not site.weights[port].also:
                found.setdefault(site.weights[port].path, (site, port))
    return found


def _scopes(wanted: list[str], every: list[str]) -> list[str]:
    """The fewest globs that mean exactly the wanted ones of every scope."""
    if set(wanted) == set(every):
        return ["*"]
    named: dict[str, list[str]] = {}
    for scope in wanted:
        named.setdefault(scope.rpartition(".")[2], []).append(scope)
    return [scope for group in named.values() for scope in scopes(group, every)]


def _entry(linear: Entry, at: str, port: str, scope: str) -> Entry:
    """The shipped entry, of a linear's weight, for another port or kind of site."""
    shape = tuple(Name(str(dim)) for dim in SITES[at].ports[port].shape)
    params = tuple(replace(param, shape=shape) for param in linear.params)
    assign = tuple((port, substitute(one, {"W": Name(port)})) for _, one in linear.assign)
    return replace(linear, at=at, scope=scope, params=params, assign=assign)


def _fill(model: CompiledModel, differences: Tensors, masks: Tensors) -> None:
    slots = model.deltas.values()
    with torch.no_grad():
        for edit in model.plan.edits:
            port = edit.entry.assign[0][0]
            weight = edit.site.weights[port]
            mask = masks[weight.path]
            values = {"mask": mask, "w": differences[weight.path].where(mask, 0)}
            for parameter in edit.parameters:
                slots[parameter.path].copy_(weight.read(values[parameter.name]))
