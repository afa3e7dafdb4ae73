"""Tied parameters: which share one tensor, which a configuration can set apart, and setting them apart."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.plan.edit import Edit


def groups(model: nn.Module) -> list[list[str]]:
    """The paths of each parameter that has several."""
    paths: dict[int, list[str]] = {}
    for path, weight in model.named_parameters(remove_duplicate=False):
        paths.setdefault(id(weight), []).append(path)
    return [group for group in paths.values() if len(group) > 1]


def tied(model: nn.Module) -> frozenset[str]:
    """The paths that share a tensor with another."""
    return frozenset(path for group in groups(model) for path in group)


def separable(model: PreTrainedModel) -> frozenset[str]:
    """The tied paths that stand alone in a model of the same configuration, but for `tie_word_embeddings`.

    Asked of transformers itself, on the meta device, with a configuration as a checkpoint would keep it.
    """
    config = copy.deepcopy(model.config)
    config.tie_word_embeddings = False
    config = type(config).from_dict(config.to_dict())
    with torch.device("meta"):
        apart = type(model)(config)
    return tied(model) - tied(apart)


def untie(model: PreTrainedModel) -> None:
    """Give every tied path a tensor of its own. A configuration ties all of them or none, so that a
    checkpoint loads as it was saved only when none is."""
    for first, *others in groups(model):
        weight = model.get_parameter(first)
        for path in others:
            owner, _, name = path.rpartition(".")
            own = nn.Parameter(weight.detach().clone(), weight.requires_grad)
            model.get_submodule(owner).register_parameter(name, own)
    model.config.tie_word_embeddings = False
    model.all_tied_weights_keys = {}


def own_path(edit: Edit) -> str:
    """Where the weight of an edit's site would be if nothing else shared it: in the site's own module."""
    return f"{edit.site.scope}.{edit.site.weights['W'].path.rpartition('.')[2]}"


def anchored(edits: Iterable[Edit], apart: frozenset[str]) -> tuple[Edit, ...]:
    """The edits with their sites at the paths that they have once `apart` are untied."""
    found = []
    for edit in edits:
        site = edit.site
        if "W" in site.weights and own_path(edit) in apart:
            own = replace(site.weights["W"], path=own_path(edit), also="")
            site = replace(site, weights={**site.weights, "W": own})
        found.append(replace(edit, site=site))
    return tuple(found)
