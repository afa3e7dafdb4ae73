"""State: everything of a model that tracing can see, as a value to compare, and a quick look whether it changed."""

from __future__ import annotations

import contextlib
import functools
import operator
import types
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

# The registries of a module whose hooks a graph cannot run.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_REGISTRIES = ("_parameters", "_buffers", "_modules")
# transformers collects hidden states and attentions by hooks, which are part of a model's own code.
_OWN_HOOKS = "transformers.utils.output_capturing"
# What torch keeps beside them, and the notes that Hugging Face models make about themselves.
_NOTES = frozenset(
    {
        *vars(nn.Module()),
        *("name_or_path", "_name_or_path", "warnings_issued", "_is_hf_initialized"),
        *("transformers_version", "_commit_hash", "architectures"),
        "_output_capturing_hooks_installed",
    }
) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, Enum)
_KIND = operator.attrgetter("dtype", "device", "shape")
_ORDINARY = {torch.Tensor, nn.Parameter, nn.Buffer}


@dataclass(frozen=True)
class Fingerprint:
    """What tracing sees of a model, by value: two models of one fingerprint give one graph.

    `shared` is false where a part could be compared by identity only, as a closure: then the fingerprint holds
    for this model alone.
    """

    value: Hashable
    shared: bool


def fingerprint(model: nn.Module) -> Fingerprint:
    """The classes, modes and attributes of all modules, the configuration, and kind and ties of all tensors."""
    reading = _Reading({module: i for i, module in enumerate(model.modules())})
    modules = tuple(reading.module(path, one) for path, one in model.named_modules())
    return Fingerprint((modules, torch.get_default_dtype()), reading.shared)


@dataclass
class _Reading:
    """Makes values of what a model holds. `order` numbers its modules, `ties` its tensors."""

    order: Mapping[nn.Module, int]
    ties: dict[int, int] = field(default_factory=dict)
    shared: bool = True
    inside: set[int] = field(default_factory=set)

    def module(self, path: str, module: nn.Module) -> Hashable:
        return (
            path,
            type(module),
            type(module).forward,
            tuple(self._slot(*one) for one in module._parameters.items()),
            tuple(self._slot(*one) for one in module._buffers.items()),
            self._attributes(vars(module)),
        )

    def _slot(self, name: str, tensor: torch.Tensor | None) -> Hashable:
        if tensor is None:
            return (name, None)
        tie = self.ties.setdefault(id(tensor), len(self.ties))
        # Who traces a compiled model puts stand-ins of the same kind into the registries.
        stands_in = isinstance(tensor, FakeTensor | FunctionalTensor)
        kind = None if stands_in or type(tensor) in _ORDINARY else type(tensor)
        return (name, tie, kind, *_KIND(tensor))

    def _attributes(self, attributes: Mapping[str, Any]) -> Hashable:
        named = ((k, self.value(v)) for k, v in attributes.items() if k not in _NOTES)
        return tuple(sorted(named, key=operator.itemgetter(0)))

    def value(self, one: Any) -> Hashable:
        """`one` by value where it has one; else itself, held, so that its identity stays its own."""
        if isinstance(one, _PLAIN):
            return (type(one), one)
        if isinstance(one, torch.Tensor):
            return (type(one), *_KIND(one), _content(one))
        if isinstance(one, nn.Module) and one in self.order:
            return (nn.Module, self.order[one])
        if isinstance(one, functools.partial):
            return (type(one), *map(self.value, (one.func, one.args, one.keywords)))
        if isinstance(one, types.MethodType):
            return (type(one), self.value(one.__func__), self.value(one.__self__))
        if isinstance(one, types.BuiltinFunctionType) or _is_global(one):
            return one  # type: ignore[no-any-return]
        if isinstance(one, GenerationConfig):
            return None  # no forward reads it
        return self._inner(one)

    def _inner(self, one: Any) -> Hashable:
        """Containers and records by what they hold."""
        known = isinstance(one, _CONTAINERS) or _is_record(one)
        if not known or id(one) in self.inside:
            self.shared = False
            return _Held(one)
        self.inside.add(id(one))
        try:
            if isinstance(one, Mapping):
                items = ((self.value(k), self.value(v)) for k, v in one.items())
                return (type(one), *items)
            if isinstance(one, set | frozenset):
                return (type(one), frozenset(map(self.value, one)))
            if isinstance(one, list | tuple):
                return (type(one), *map(self.value, one))
            return (type(one), self._attributes(vars(one)))
        finally:
            self.inside.discard(id(one))


_CONTAINERS = (Mapping, set, frozenset, list, tuple)


@dataclass(frozen=True, eq=False)
class _Held:
    """An object that equals itself alone."""

    one: Any

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held) and other.one is self.one

    def __hash__(self) -> int:
        return id(self.one)


def _content(tensor: torch.Tensor) -> Hashable:
    """Plain tensors among the attributes become constants of a graph."""
    if tensor.is_meta:
        return None
    with _disable_current_modes():
        flat = tensor.detach().cpu().reshape(-1)
        return flat.view(torch.uint8).numpy().tobytes()


def _is_global(one: Any) -> bool:
    """Whether a function is one for the whole process: no closure, no lambda."""
    closed = not isinstance(one, types.FunctionType) or one.__closure__ is not None
    return not closed and "<" not in one.__qualname__


class Watch:
    """A look, quick enough for each call, whether anything changed that tracing sees: all attributes of all
    modules, configurations and containers among them, classes, hooks, and kinds of tensors.

    `count` rises with every change that a look finds. What it compares by is identity, in one sweep in C. Of
    `stores`, modules that run no code, only the tensors count.
    """

    def __init__(self, model: nn.Module, stores: nn.Module) -> None:
        self.model, self.stores = model, stores
        self.count = 0
        self.hooked: tuple[str, ...] = ()
        self._seen: tuple[Any, ...] | None = None

    def look(self) -> int:
        if self._seen is None or not self._same():
            self._learn()
            self.count += 1
        return self.count

    def _same(self) -> bool:
        try:
            return self._sweep() == self._seen
        except Exception:  # two tensors or arrays do not say whether they are equal
            return False

    def _sweep(self) -> tuple[Any, ...]:
        return (
            any(self._empty),
            *map(len, self._own),
            *map(operator.call, self._getters, self._own),
            *chain.from_iterable(map(dict.values, self._dicts)),
            *chain.from_iterable(self._lists),
            *map(type, self._modules),
            *map(_FORWARD, self._classes),
            *map(_KIND, self._tensors),
            *map(_VERSION, self._constants),
            torch.get_default_dtype(),
        )

    def _learn(self) -> None:
        self._modules = list(self.model.modules())
        self._classes = list(dict.fromkeys(map(type, self._modules)))
        every = [*self._modules, *self.stores.modules()]
        registries = [vars(m)[name] for m in every for name in _REGISTRIES]
        registries += [hooks for m in self._modules for hooks in _hooks(m)]
        # Most registries of most modules are empty, which is quicker to see of all than to look into each.
        self._empty = [one for one in registries if not one]
        self._dicts: list[dict[str, Any]] = [one for one in registries if one]
        # Of a module's own attributes torch's dozen never change, and every object that is looked at costs.
        self._own = [m.__dict__ for m in self._modules]
        self._getters = [
            operator.itemgetter(*(k for k in one if k not in _NOTES)) for one in self._own
        ]
        self._lists: list[Any] = []
        self._constants: list[torch.Tensor] = []
        seen: set[int] = set(map(id, registries))
        for module in self._modules:
            self._follow({k: v for k, v in vars(module).items() if k not in _NOTES}, seen)
        slots = (r.values() for m in every for r in (m._parameters, m._buffers))
        self._tensors = [one for one in chain.from_iterable(slots) if one is not None]
        self.hooked = tuple(
            path for path, m in self.model.named_modules() if any(map(_foreign, _hooks(m)))
        )
        self._seen = self._sweep()

    def _follow(self, attributes: Mapping[str, Any], seen: set[int]) -> None:
        """Containers and configurations change in place, so what they hold is watched too."""
        for one in attributes.values():
            if isinstance(one, (*_PLAIN, nn.Module)) or id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, torch.Tensor):
                self._constants.append(one)
            elif isinstance(one, dict):
                self._dicts.append(one)
                self._follow(one, seen)
            elif isinstance(one, list | tuple | set | frozenset):
                self._lists.append(one)
                self._follow(dict(enumerate(one)), seen)  # type: ignore[arg-type]
            elif _is_record(one):
                self._dicts.append(vars(one))
                self._follow({k: v for k, v in vars(one).items() if k not in _NOTES}, seen)


_FORWARD: Callable[[Any], Any] = operator.attrgetter("forward")
_VERSION: Callable[[Any], Any] = operator.attrgetter("_version")


def _is_record(one: Any) -> bool:
    """Whether an object is what its attributes are: a configuration, a dataclass, a namespace."""
    return isinstance(one, PreTrainedConfig | types.SimpleNamespace) or is_dataclass(one)


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and then each module's own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Tracing runs a model's code, which may set attributes and run hooks: here no hook runs, and every
    attribute and registry is afterwards as it was."""
    saved = [
        (vars(m), dict(vars(m)), [(vars(m)[n], dict(vars(m)[n])) for n in (*_REGISTRIES, *HOOKS)])
        for m in model.modules()
    ]
    try:
        for registry in (hooks for m in model.modules() for hooks in _hooks(m)):
            for key in _foreign(registry):
                del registry[key]
        yield
    finally:
        for attributes, before, registries in saved:
            _restore(attributes, before)
            for registry, entries in registries:
                _restore(registry, entries)


def _hooks(module: nn.Module) -> Iterator[dict[int, Any]]:
    return (vars(module)[name] for name in HOOKS)


def _foreign(hooks: Mapping[int, Any]) -> list[int]:
    """Hooks that are none of the model's own."""
    return [key for key, hook in hooks.items() if getattr(hook, "__module__", "") != _OWN_HOOKS]


def _restore(mapping: dict[str, Any], before: dict[str, Any]) -> None:
    """In place, and only where something is another: other threads may be reading."""
    if list(mapping) == list(before) and all(mapping[k] is v for k, v in before.items()):
        return
    mapping.clear()
    mapping.update(before)
