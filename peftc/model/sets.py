"""Sets: the deltas of several specs on one backbone, of which some are in use."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.errors import PeftcError, suggest
from peftc.graph.cache import CacheSlot
from peftc.graph.facts import ModelFacts
from peftc.graph.placement import device_of, is_placed, weight
from peftc.graph.quantized import dequantized
from peftc.model.programs import Programs, Transform
from peftc.model.running import place
from peftc.model.tensors import Activations, Deltas, started
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan
from peftc.plan.sets import nothing, together, under
from peftc.store.deltas import DEFAULT


class SetError(PeftcError):
    """A delta set that is not there, or cannot be."""


@dataclass(frozen=True)
class Made:
    """What becomes a delta set: its plan, and what its tensors start as where that is known: `values` those of its
    deltas by the paths of the plan, `weights` those of the backbone that it trains. `activations` is for what starts
    as words."""

    plan: Plan
    form: str = "training"
    activations: Activations | None = None
    values: Mapping[str, torch.Tensor] | None = None
    weights: Mapping[str, torch.Tensor] = field(default_factory=dict)


class Compiler(Protocol):
    """What plans further sets, and rewrites graphs: the driver."""

    def made(self, backbone: PreTrainedModel, source: Any) -> Made: ...

    def rewrite(self, edits: tuple[Edit, ...]) -> Transform: ...

    @property
    def example(self) -> Mapping[str, torch.Tensor] | None: ...


@dataclass
class DeltaSet:
    """The deltas of one spec. Their paths among the model's deltas start with its name, but for the DEFAULT one.
    `weights` are its own of those of the backbone that its spec trains, by path."""

    plan: Plan
    form: str
    weights: dict[str, nn.Parameter]


@dataclass(frozen=True)
class InUse:
    """What some sets do together. `rows` stand in a cache before the tokens."""

    plan: Plan
    form: str
    programs: Programs
    rows: int


class Sets:
    """The delta sets of one compiled model; those in use, `names`, act in this order.

    Where a spec trains weights of the backbone, its set has its own, which stand in the backbone while the set is in
    use; else those stand there that the backbone came with, `base`. The first set trains the backbone's own, so that
    `base` is a copy.
    """

    def __init__(
        self, backbone: PreTrainedModel, deltas: Deltas, compiler: Compiler, name: str, made: Made
    ) -> None:
        self.backbone, self.deltas, self.compiler = backbone, deltas, compiler
        self.all: dict[str, DeltaSet] = {}
        self._bare = nothing(made.plan)
        self._made: dict[tuple[str, ...], InUse] = {}
        self._require_new(name)
        tensors = self._started(name, made)
        own = {one.path: self._stands(one.path) for one in made.plan.unfrozen}
        self.base = {path: _copied(one) for path, one in own.items()}
        self._include(name, made, tensors, own)
        self.names: tuple[str, ...] = (name,)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_made": {}}

    def add(self, name: str, made: Made) -> None:
        """Another set, not in use yet. Raises SetError for a name that cannot be."""
        self._require_new(name)
        tensors = self._started(name, made)
        for one in made.plan.unfrozen:
            self.base.setdefault(one.path, self._stands(one.path))
        own = {one.path: _copied(self.base[one.path]) for one in made.plan.unfrozen}
        self._include(name, made, tensors, own)

    def _include(
        self,
        name: str,
        made: Made,
        tensors: Mapping[str, tuple[torch.Tensor, bool]],
        own: dict[str, nn.Parameter],
    ) -> None:
        with torch.no_grad():
            for path, value in made.weights.items():
                own[path].copy_(value)
        for path, (value, trainable) in tensors.items():
            self.deltas.place(path, value, trainable)
        self.deltas.train(self.backbone.training)
        self.all[name] = DeltaSet(under(made.plan, below(name)), made.form, own)

    def _started(self, name: str, made: Made) -> dict[str, tuple[torch.Tensor, bool]]:
        """What the tensors of a set start as, by their paths there, and whether they train."""
        at = device_of(self.backbone), self.backbone.dtype
        every = started(made.plan.edits, self._read, *at, made.activations, made.values)
        paths = under(made.plan, below(name)).tensors
        return {
            path: (value, one.trainable) for path, (one, value) in zip(paths, every, strict=True)
        }

    def _read(self, path: str) -> torch.Tensor:
        return dequantized(weight(self.backbone, path))

    def _require_new(self, name: str) -> None:
        if name in self.all:
            raise SetError(
                f"there is a delta set '{name}'; remove it first, or choose another name"
            )
        require_name(name, self.backbone)

    def remove(self, names: Sequence[str]) -> None:
        """Forget sets. Raises SetError for one in use, or that is not there."""
        for name in self.known(names):
            if name in self.names:
                raise SetError(f"the delta set '{name}' is in use; use others, or None, first")
        for name in self.known(names):
            for path in self.all.pop(name).plan.tensors:
                self.deltas.remove(path)
            self._made = {k: v for k, v in self._made.items() if name not in k}

    def known(self, names: Sequence[str]) -> tuple[str, ...]:
        """The names, each once. Raises SetError for one that no set has."""
        for name in names:
            if name not in self.all:
                there = ", ".join(f"'{one}'" for one in self.all) or "none"
                raise SetError(
                    f"there is no delta set '{name}'; {suggest(name, self.all) or f'there are: {there}'}"
                )
        return tuple(dict.fromkeys(names))

    def use(self, names: Sequence[str]) -> InUse:
        """Let these sets act, and no others. Raises SetError, and PlanError or CaptureError where they cannot act
        together; those in use stay so then."""
        chosen = self.known(names)
        used = self.together(chosen)
        self._stand(chosen)
        self.names = chosen
        return used

    def together(self, names: tuple[str, ...]) -> InUse:
        """What these sets do together, worked out once."""
        if names not in self._made:
            chosen = [self.all[name] for name in names]
            plan = together([one.plan for one in chosen]) if chosen else self._bare
            plan.room.require(self.backbone)
            form = "training" if any(one.form == "training" for one in chosen) else "stored"
            rewrite = self.compiler.rewrite(plan.edits)
            programs = Programs(self.backbone, self.deltas, plan, rewrite)
            several = ModelFacts.read(self.backbone).encoder_decoder
            rows = plan.room.held(CacheSlot("self", 0, "key").name, several)
            self._made[names] = InUse(plan, form, programs, rows)
        return self._made[names]

    def train(self, names: Sequence[str]) -> None:
        """Let gradients reach what the specs of these sets train, and nothing else that is some set's."""
        slots = self.deltas.values()
        for name, one in self.all.items():
            for path, parameter in one.plan.tensors.items():
                slots[path].requires_grad_(parameter.trainable and name in names)
            for own in one.weights.values():
                own.requires_grad_(name in names)

    def forget(self) -> None:
        """Compute constants anew."""
        for one in self._made.values():
            one.programs.forget()

    def weights(self, names: Sequence[str]) -> dict[str, nn.Parameter]:
        """Of the weights that sets train, those that stand in the backbone while these are in use."""
        return self.base | {k: v for name in names for k, v in self.all[name].weights.items()}

    def _stands(self, path: str) -> nn.Parameter:
        registry, name = place(self.backbone, path)
        found: nn.Parameter = registry[name]
        return found

    def _stand(self, names: Sequence[str]) -> None:
        """Put the weights of these sets into the backbone, wherever the backbone ties them."""
        wanted = {id(self._stands(path)): one for path, one in self.weights(names).items()}
        changed = {i: one for i, one in wanted.items() if id(one) != i}
        if changed and is_placed(self.backbone):
            raise SetError(
                f"{type(self.backbone).__name__}: sets that train its weights cannot be switched while these are "
                "elsewhere until a module runs; load it without a device_map"
            )
        for module in self.backbone.modules() if changed else ():
            for name, old in module._parameters.items():
                if old is not None and id(old) in changed:
                    new = changed[id(old)]
                    new.data = new.data.to(old.device, old.dtype)
                    module._parameters[name] = new


def require_name(name: str, backbone: PreTrainedModel) -> None:
    """Raise SetError where no delta set of this backbone can be called so: its paths start with the name."""
    if not re.fullmatch(r"\w[\w-]*", name):
        raise SetError(f"'{name}' cannot name a delta set: use letters, digits, _ and -")
    if name in {*backbone._modules, "shared"}:
        raise SetError(f"'{name}' cannot name a delta set: a module of this model is called so")


def below(name: str) -> str:
    """What the paths of a set start with."""
    return "" if name == DEFAULT else name


def _copied(one: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(one.detach().clone(), requires_grad=False)
