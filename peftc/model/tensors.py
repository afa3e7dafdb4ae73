"""The delta tensors as a module tree, so that `.to()`, optimizers, DDP and FSDP treat them as any other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import Protocol

import torch
from torch import nn

from peftc.graph.layers import submodule
from peftc.language.expr import names
from peftc.language.ports import SITES, STORED
from peftc.plan.edit import Edit, Parameter
from peftc.rewrite.evaluate import evaluate
from peftc.sites.site import Site


class Deltas(nn.Module):
    """A tree of modules that follows the paths of the delta tensors; it computes nothing itself."""

    def place(self, path: str, value: torch.Tensor, trainable: bool) -> None:
        """Paths follow the backbone's, whose names are its own: one called `half` or `type` stands in the
        registries like any other, and torch's method of that name stays."""
        *owners, last = path.split(".")
        owner: nn.Module = self
        for name in owners:
            if name not in owner._modules:
                owner._modules[name] = nn.Module()
            owner = owner._modules[name]  # type: ignore[assignment]
        if trainable:
            owner._parameters[last] = nn.Parameter(value)
        else:
            owner._buffers[last] = value

    def remove(self, path: str) -> None:
        """Take the tensor at a path away, and the modules that hold nothing then."""
        owner, _, last = path.rpartition(".")
        module = submodule(self, owner)
        module._parameters.pop(last, None)
        module._buffers.pop(last, None)
        while owner and not any((module._parameters, module._buffers, module._modules)):
            owner, _, name = owner.rpartition(".")
            module = submodule(self, owner)
            del module._modules[name]

    def values(self) -> dict[str, torch.Tensor]:
        """Every delta tensor by its path, frozen ones and those of sets that are not in use too."""
        return {**dict(self.named_parameters()), **dict(self.named_buffers())}


def started(
    edits: Iterable[Edit],
    read: Callable[[str], torch.Tensor],
    device: torch.device,
    dtype: torch.dtype,
    activations: Activations | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> Iterator[tuple[Parameter, torch.Tensor]]:
    """Every parameter of a plan, shared ones once, and what it starts as; `read` fetches a backbone weight.

    `values` are what they start as where that is known, by path: then nothing is drawn or computed."""
    seen: set[str] = set()
    for edit in edits:
        for parameter in edit.parameters:
            if parameter.path in seen:
                continue
            seen.add(parameter.path)
            if values is not None:
                yield parameter, values[parameter.path].detach().to(device, dtype, copy=True)
            elif parameter.formula is None or device.type == "meta":
                yield parameter, initial(parameter, device, dtype)
            else:
                yield parameter, _formed(edit, parameter, read, activations).to(device, dtype)


class Activations(Protocol):
    """What the ports of a site hold while the backbone reads the words of an entry."""

    def at(self, edit: Edit, length: int) -> dict[str, torch.Tensor]: ...


def _formed(
    edit: Edit,
    parameter: Parameter,
    read: Callable[[str], torch.Tensor],
    activations: Activations | None,
) -> torch.Tensor:
    """What a formula of the site's own weight, or of its activations, is here."""
    assert parameter.formula is not None
    env = weights_at(edit.site, read)
    if parameter.experts:
        chosen = edit.entry.where.experts or range(parameter.experts)
        of = [{name: value[expert] for name, value in env.items()} for expert in chosen]
        return torch.stack([evaluate(parameter.formula, one, {}) for one in of])
    if edit.entry.words is not None and not set(names(parameter.formula)) <= env.keys():
        if activations is None:
            return torch.zeros(parameter.shape)
        env |= activations.at(edit, parameter.rows)
    return evaluate(parameter.formula, env, {})


def weights_at(site: Site, read: Callable[[str], torch.Tensor]) -> dict[str, torch.Tensor]:
    """The site's own W and b as specs see them: of a linear [out, in], of a fused one its slice, of a
    convolution the matrix of its kernels."""
    own = SITES[site.at].having(*STORED)
    return {
        port: weight.read(read(weight.path).detach())
        for port, weight in site.weights.items()
        if port in own
    }


def initial(parameter: Parameter, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """A new tensor by the spec's `init:`. Matrices are [in, out], so fan-in is the first axis."""
    value = torch.empty(parameter.shape, device=device, dtype=dtype)
    if device.type == "meta":
        return value
    if parameter.experts:
        one = replace(parameter, shape=parameter.seen, experts=0)
        return torch.stack([initial(one, device, dtype) for _ in range(parameter.experts)])
    args = parameter.init_args
    with torch.no_grad():
        match parameter.init:
            case "zeros":
                return value.zero_()
            case "ones":
                return value.fill_(1.0)
            case "constant":
                return value.fill_(args[0])
            case "normal":
                return value.normal_(0.0, args[0] if args else 0.02)
            case "uniform":
                return value.uniform_(-args[0], args[0])
            case "linear":  # torch.nn.Linear's default
                bound = 1 / math.sqrt(args[0])
                return value.uniform_(-bound, bound)
            case "kaiming_uniform":  # a = sqrt(5), as loralib
                bound = 1 / math.sqrt(parameter.shape[0])
                return value.uniform_(-bound, bound)
            case "identity":
                return nn.init.eye_(value)
    raise AssertionError(f"init '{parameter.init}' is in the language but not here")
