"""State: everything of a model that tracing can see, as a value to compare; and models left as they were."""

from __future__ import annotations

import contextlib
import functools
import operator
import types
from collections.abc import Hashable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from typing import Any

import torch
from torch import nn
from torch._subclasses import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel

from peftc.graph.layers import Forward
from peftc.graph.placement import device_of, is_added, is_placed
from peftc.graph.program import Note
from peftc.graph.quantized import as_linears, is_four_bit, is_quantized, meant

# The registries of a module whose hooks a graph cannot run.
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
REGISTRIES = ("_parameters", "_buffers", "_modules")
# transformers collects hidden states and attentions by hooks, which are part of a model's own code, and lets
# embeddings require a gradient, which a graph does without.
_OWN_HOOKS = ("transformers.utils.output_capturing", "transformers.modeling_utils")
# What torch keeps beside them, and the notes that Hugging Face models make about themselves.
NOTES = frozenset(
    {
        *vars(nn.Module()),
        *("name_or_path", "_name_or_path", "warnings_issued", "_is_hf_initialized"),
        *("transformers_version", "_commit_hash", "architectures"),
        "_output_capturing_hooks_installed",
        # How it was loaded: weights by other names, and kernels, which stand in the modules' forwards.
        *("_weight_conversions", "_use_kernels"),
        # bitsandbytes', of weights that are traced as plain ones.
        *("quant_state", "support_avx512bf16_for_cpu"),
    }
) - {"training"}
# Whether layers are computed twice, which no trace follows.
UNTRACED = ("gradient_checkpointing", "_gradient_checkpointing_func")
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, type, Enum)
KIND = operator.attrgetter("dtype", "device", "shape")
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
            self._attributes({k: v for k, v in vars(module).items() if not is_added(module, k)}),
        )

    def _slot(self, name: str, tensor: torch.Tensor | None) -> Hashable:
        if tensor is None:
            return (name, None)
        tie = self.ties.setdefault(id(tensor), len(self.ties))
        # Who traces a compiled model puts stand-ins of the same kind into the registries.
        stands_in = isinstance(tensor, FakeTensor | FunctionalTensor)
        kind = None if stands_in or type(tensor) in _ORDINARY else type(tensor)
        return (name, tie, kind, *KIND(tensor))

    def _attributes(self, attributes: Mapping[str, Any]) -> Hashable:
        named = (
            (k, self.value(v))
            for k, v in attributes.items()
            if k not in NOTES and k not in UNTRACED and not isinstance(v, Forward)
        )
        return tuple(sorted(named, key=operator.itemgetter(0)))

    def value(self, one: Any) -> Hashable:
        """`one` by value where it has one; else itself, held, so that its identity stays its own."""
        if isinstance(one, PLAIN):
            return (type(one), one)
        if isinstance(one, torch.Tensor):
            return (type(one), *KIND(one), _content(one))
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
        known = isinstance(one, _CONTAINERS) or is_record(one)
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


_PLAIN_TENSORS = {torch.Tensor, nn.Parameter}
_TRACERS = (
    torch._C._TorchDispatchModeKey.FAKE,
    torch._C._TorchDispatchModeKey.PROXY,
    torch._C._TorchDispatchModeKey.FUNCTIONAL,
)


def readable(tensors: Iterable[torch.Tensor]) -> bool:
    """Whether the values of `tensors` can be asked for: ordinary tensors, and nobody traces what is done to them."""
    tensors = list(tensors)
    return (
        not traced()
        and set(map(type, tensors)) <= _PLAIN_TENSORS
        and not any(one.is_meta for one in tensors)
    )


def traced() -> bool:
    """Whether somebody traces what is done to tensors now."""
    return (
        torch.compiler.is_compiling()
        or (
            torch._C._len_torch_dispatch_stack() > 0
            and any(torch._C._get_dispatch_mode(one) is not None for one in _TRACERS)
        )
        or torch._C._functorch.peek_interpreter_stack() is not None
    )


def _is_global(one: Any) -> bool:
    """Whether a function is one for the whole process: no closure, no lambda."""
    closed = not isinstance(one, types.FunctionType) or one.__closure__ is not None
    return not closed and "<" not in one.__qualname__


def is_record(one: Any) -> bool:
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
def noting(model: nn.Module) -> Iterator[list[Note]]:
    """The notes that the model's code makes meanwhile, known in the end."""
    configs = _configurations(model)
    unset = [(i, k) for i, one in enumerate(configs) for k, v in vars(one).items() if v is None]
    notes: list[Note] = []
    yield notes
    read = ((i, k, vars(configs[i]).get(k)) for i, k in unset)
    notes += [Note(i, k, v) for i, k, v in read if v is not None and isinstance(v, PLAIN)]


def note(model: nn.Module, notes: Iterable[Note]) -> None:
    """Write down what a forward would have."""
    if notes:
        configs = _configurations(model)
        for one in notes:
            setattr(configs[one.config], one.name, one.value)


def _configurations(model: nn.Module) -> list[PreTrainedConfig]:
    """Each once, in the order of the modules that have it, what it holds behind it."""
    found: dict[int, PreTrainedConfig] = {}
    inside = [one for module in model.modules() for one in vars(module).values()]
    while inside:
        configs = [
            one for one in inside if isinstance(one, PreTrainedConfig) and id(one) not in found
        ]
        found |= {id(one): one for one in configs}
        inside = [value for one in configs for value in vars(one).values()]
    return [*found.values()]


@contextlib.contextmanager
def undisturbed(model: PreTrainedModel) -> Iterator[None]:
    """Tracing runs a model's code, which may set attributes and run hooks: here no hook runs, and every
    attribute and registry is afterwards as it was."""
    saved = [
        (vars(m), dict(vars(m)), [(vars(m)[n], dict(vars(m)[n])) for n in (*REGISTRIES, *HOOKS)])
        for m in model.modules()
    ]
    try:
        for registry in (hooks for m in model.modules() for hooks in hooks_of(m)):
            for key in foreign(registry):
                del registry[key]
        for module in model.modules():
            if getattr(module, "gradient_checkpointing", False):
                vars(module)["gradient_checkpointing"] = False
        _whole(model)
        for module in model.modules():
            for name in [k for k in vars(module) if is_added(module, k)]:
                del vars(module)[name]
        as_linears(model)
        yield
    finally:
        for attributes, before, registries in saved:
            _restore(attributes, before)
            for registry, entries in registries:
                _restore(registry, entries)


def _whole(model: PreTrainedModel) -> None:
    """In place of weights that are held in parts by several processes, or elsewhere, or as whole numbers, plain ones
    without values: tracing reads sizes and types."""
    device = device_of(model) if is_placed(model) else None
    for registry in (r for m in model.modules() for r in (m._parameters, m._buffers)):
        for name, one in registry.items():
            if one is None:
                continue
            away = device is not None and one.device != device
            if isinstance(one, DTensor) or away or is_quantized(one):
                # Four bits stand for a matrix of any type, and are read in that of the model.
                dtype = model.dtype if is_four_bit(one) else one.dtype
                like = torch.empty(meant(one)[0], dtype=dtype, device=device or one.device)
                like.untyped_storage().resize_(0)
                registry[name] = nn.Parameter(like, one.requires_grad)


def hooks_of(module: nn.Module) -> Iterator[dict[int, Any]]:
    return (vars(module)[name] for name in HOOKS)


def foreign(hooks: Mapping[int, Any]) -> list[int]:
    """Hooks that are none of the model's own."""
    return [key for key, hook in hooks.items() if getattr(hook, "__module__", "") not in _OWN_HOOKS]


def _restore(mapping: dict[str, Any], before: dict[str, Any]) -> None:
    """In place, and only where something is another: other threads may be reading."""
    if list(mapping) == list(before) and all(mapping[k] is v for k, v in before.items()):
        return
    mapping.clear()
    mapping.update(before)
