"""Watch: a look, quick enough for each call, whether anything of a model changed that tracing can see."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import nn

from peftc.graph.state import KIND, NOTES, PLAIN, REGISTRIES, UNTRACED, foreign, hooks_of, is_record

# A plain value of a model: a module's path; the way from there, through attributes (False) and items (True); it.
Reading = tuple[str, tuple[tuple[bool, Any], ...], Any]


class Watch:
    """A look, quick enough for each call, whether anything changed that tracing sees: all attributes of all
    modules, configurations and containers among them, classes, hooks, and kinds of tensors.

    `count` rises with every change that a look finds, `writes` with every look but one that knows that no dict was
    written to: until it rises, every tensor is the object that it was. What it compares by is identity, in one sweep in C, and a dict
    that nobody wrote to is passed over. Of `stores`, modules that run no code, only the tensors count.
    """

    def __init__(self, model: nn.Module, stores: nn.Module) -> None:
        self.model, self.stores = model, stores
        self.count = self.writes = 0
        self.hooked: tuple[str, ...] = ()
        self._learnt = False
        self._known: list[int] = []
        self._seen: tuple[Any, ...] = ()
        self._others: tuple[Any, ...] = ()

    def look(self) -> int:
        if not self._learnt or not self._same():
            self._learn()
            self.count, self.writes = self.count + 1, self.writes + 1
        return self.count

    def _same(self) -> bool:
        try:
            return self._untouched() and self._beside() == self._others and self._of_kinds()
        except Exception:  # two tensors or arrays do not say whether they are equal
            return False

    def _untouched(self) -> bool:
        """Whether all dicts hold what they held: none was written to, or what was written is what was there."""
        empty, versions = not any(self._empty), self._versions()
        if empty and versions and versions == self._known:
            return True
        self.writes += 1
        same = empty and self._held() == self._seen
        if same:
            self._known = versions
        return same

    def _versions(self) -> list[int]:
        """Which write to each dict was the last."""
        return [] if _VERSION_OF is None else [*map(_VERSION_OF, self._written)]

    def _held(self) -> tuple[Any, ...]:
        return (
            *map(len, self._own),
            *map(operator.call, self._getters, self._own),
            *chain.from_iterable(map(dict.values, self._dicts)),
        )

    def _beside(self) -> tuple[Any, ...]:
        """What is in no dict."""
        return (
            *chain.from_iterable(self._lists),
            *map(type, self._modules),
            *map(_FORWARD, self._classes),
            *map(_VERSION, self._constants),
            torch.get_default_dtype(),
        )

    def _of_kinds(self) -> bool:
        """Whether tensors, which may have other data in place, are of the kinds that they were. torch's own guard is
        a third as long at it, and strict: where it sees more than a kind, as autocast, the kinds are compared."""
        quick = self._guard is not None and self._guard.check(*self._tensors)
        return quick or [*map(KIND, self._tensors)] == self._kinds

    def _learn(self) -> None:
        self._modules = list(self.model.modules())
        self._classes = list(dict.fromkeys(map(type, self._modules)))
        every = [*self._modules, *self.stores.modules()]
        registries = [vars(m)[name] for m in every for name in REGISTRIES]
        registries += [hooks for m in self._modules for hooks in hooks_of(m)]
        # Most registries of most modules are empty, which is quicker to see of all than to look into each.
        self._empty = [one for one in registries if not one]
        self._dicts: list[dict[str, Any]] = [one for one in registries if one]
        # Of a module's own attributes torch's dozen never change, and every object that is looked at costs.
        self._own = [m.__dict__ for m in self._modules]
        self._getters = [
            operator.itemgetter(*(k for k in one if k not in NOTES)) for one in self._own
        ]
        self._lists: list[Any] = []
        self._constants: list[torch.Tensor] = []
        seen: set[int] = set(map(id, registries))
        for module in self._modules:
            self._follow({k: v for k, v in vars(module).items() if k not in NOTES}, seen)
        slots = (r.values() for m in every for r in (m._parameters, m._buffers))
        # The guard takes each once; of one that is tied the others are it.
        self._tensors = [
            one for one in dict.fromkeys(chain.from_iterable(slots)) if one is not None
        ]
        self._kinds = [*map(KIND, self._tensors)]
        self._guard = _guard(self._tensors)
        self.hooked = tuple(
            path for path, m in self.model.named_modules() if any(map(foreign, hooks_of(m)))
        )
        self._written = [*self._own, *self._dicts]
        self._known = self._versions()
        self._seen, self._others, self._learnt = self._held(), self._beside(), True

    def readings(self) -> Iterator[Reading]:
        """Every plain value of the model that tracing sees, once, by a way to it."""
        seen: set[int] = set()
        for path, module in self.model.named_modules():
            for name, one in vars(module).items():
                if name not in NOTES and name not in UNTRACED:
                    for steps, value in _plain(one, ((False, name),), seen):
                        yield path, steps, value

    def _follow(self, attributes: Mapping[str, Any], seen: set[int]) -> None:
        """Containers and configurations change in place, so what they hold is watched too."""
        for one in attributes.values():
            if isinstance(one, (*PLAIN, nn.Module)) or id(one) in seen:
                continue
            seen.add(id(one))
            if isinstance(one, torch.Tensor):
                self._constants.append(one)
            elif isinstance(one, dict):
                self._dicts.append(one)
                self._follow(one, seen)
            elif isinstance(one, list | tuple | set | frozenset):
                if not isinstance(one, tuple | frozenset):
                    self._lists.append(one)
                self._follow(dict(enumerate(one)), seen)  # type: ignore[arg-type]
            elif is_record(one):
                self._dicts.append(vars(one))
                self._follow({k: v for k, v in vars(one).items() if k not in NOTES}, seen)


def _guard(tensors: list[torch.Tensor]) -> Any:
    """What checks all kinds in one call, by a part of torch that it does not document; None where that is not to be had."""
    try:
        made: Any = torch._C._dynamo.guards.TensorGuards
        sizes, strides = [[*one.shape] for one in tensors], [[*one.stride()] for one in tensors]
        return made(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides)
    except Exception:
        return None


# Numbers the latest write to a dict, by a part of torch that it does not document; None where that is not to be had.
_VERSION_OF: Callable[[dict[Any, Any]], int] | None = getattr(
    getattr(torch._C._dynamo, "guards", None), "dict_version", None
)
_FORWARD: Callable[[Any], Any] = operator.attrgetter("forward")
_VERSION: Callable[[Any], Any] = operator.attrgetter("_version")


def _plain(one: Any, steps: tuple[tuple[bool, Any], ...], seen: set[int]) -> Iterator[Any]:
    if isinstance(one, _COMPARED):
        if one == one:  # no nan
            yield steps, one
    elif id(one) not in seen:
        seen.add(id(one))
        inside: Any = ()
        if isinstance(one, dict):
            inside = ((True, key, value) for key, value in one.items())
        elif isinstance(one, list | tuple):
            inside = ((True, key, value) for key, value in enumerate(one))
        elif is_record(one):
            inside = ((False, key, value) for key, value in vars(one).items() if key not in NOTES)
        for item, key, value in inside:
            yield from _plain(value, (*steps, (item, key)), seen)


_COMPARED = (bool, int, float, str, type(None), torch.dtype)
