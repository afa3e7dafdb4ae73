"""Placement: weights that stand elsewhere until their module runs, as accelerate keeps those of a `device_map`.

accelerate hooks the modules that have weights, down to single linears, by a forward of its own on each. A graph runs
none of these modules, so what runs a part of it asks their hooks for the weights, and gives them back after.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn

from peftc.graph.quantized import dequantized, is_four_bit

# What accelerate sets on modules, beside a `forward`, which is its own where a hook is.
ADDED = frozenset({"_hf_hook", "_old_forward", "hf_device_map", "to", "cuda", "npu", "xpu"})


def hook_of(module: nn.Module) -> Any:
    """accelerate's hook on a module, or None."""
    return vars(module).get("_hf_hook")


def is_placed(model: nn.Module) -> bool:
    """Whether accelerate places the weights of a model, or of a part of it."""
    return any(hook_of(module) is not None for module in model.modules())


def is_added(module: nn.Module, name: str) -> bool:
    """Whether an attribute of a module is accelerate's."""
    return hook_of(module) is not None and (name in ADDED or name == "forward")


def device_of(model: nn.Module) -> torch.device:
    """Where a model's weights are while they are used: those of its first module."""
    for module in model.modules():
        device = getattr(hook_of(module), "execution_device", None)
        if device is not None:
            return torch.device(device)
    return next(model.parameters()).device


def weights(
    model: nn.Module, given: Mapping[str, torch.Tensor] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every weight of a backbone with its path and its values, tied ones once. `given` has whole weights by path, where
    the model's own are parts; of four bits it has the bytes alone. What a hook holds is read, and what is quantised is
    what it stands for, one at a time."""
    # accelerate separates what a model ties, and then each stands under every name.
    apart = getattr(model, "all_tied_weights_keys", None) if is_placed(model) else None
    for path, own in model.named_parameters():
        if not path.startswith("deltas.") and path not in (apart or ()):
            whole = own if given is None or is_four_bit(own) else given.get(path, own)
            held = weight(model, path) if whole.is_meta and is_placed(model) else whole
            yield path, dequantized(held)


def weight(model: nn.Module, path: str) -> torch.Tensor:
    """A weight with its values, which a hook on its module, or on one around that, may hold."""
    owner, _, name = path.rpartition(".")
    found: Any = model.get_submodule(owner)._parameters[name]
    while found.is_meta:
        held = getattr(hook_of(model.get_submodule(owner)), "weights_map", None)
        if held is not None:
            return held[name]  # type: ignore[no-any-return]
        if not owner:
            break
        owner, _, inner = owner.rpartition(".")
        name = f"{inner}.{name}"
    return found  # type: ignore[no-any-return]


@contextlib.contextmanager
def present(modules: Iterable[nn.Module]) -> Iterator[Any]:
    """While modules' own weights are where they are used. Gives what moves values there."""
    hooks = [(hook_of(module), module) for module in modules]
    try:
        for hook, module in hooks:
            hook.pre_forward(module)
        device = getattr(hooks[0][0], "execution_device", None) if hooks else None
        yield (
            (lambda values: values)
            if device is None
            else (lambda values: send_to_device(values, device))
        )
    finally:
        for hook, module in hooks:
            hook.post_forward(module, None)
