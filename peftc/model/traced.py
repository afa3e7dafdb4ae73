"""Traced: a compiled model as torch.compile sees it: one graph for a kind of call, with guards on the state it is for.

torch.compile looks at Python once and keeps what it saw until one of its guards fails. What finds a graph is no code
to look at, so it is asked for a number, and what the graph depends on is read where torch.compile sees it read.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from weakref import WeakValueDictionary

import torch
import torch._dynamo
from torch import nn

from peftc.graph.call import Call
from peftc.graph.layers import submodule
from peftc.graph.program import Bound, Program
from peftc.graph.watch import Reading
from peftc.model.running import Runner, place, roots_of

# An entry; its inputs by name, type, and sizes, 0 where any from 2 on will do; its settings.
Kind = tuple[str, tuple[tuple[str, torch.dtype, tuple[int, ...]], ...], tuple[tuple[str, Any], ...]]


def kind_of(
    entry: str,
    inputs: Mapping[str, torch.Tensor],
    flags: Mapping[str, Any],
    exact: Collection[tuple[str, int]] = (),
) -> Kind:
    """What tells the graphs of one state apart while sizes are symbols, but those of the axes in `exact`."""
    tensors = []
    for name, value in inputs.items():
        sizes = []
        for axis, size in enumerate(value.shape):
            # An index is a number to torch.compile from here on, and no symbol.
            number = operator.index(size) if (name, axis) in exact else None
            sizes.append(number or (1 if size == 1 else 0))
        tensors.append((name, value.dtype, tuple(sizes)))
    return entry, tuple(tensors), tuple([(k, v) for k, v in flags.items()])


@dataclass(frozen=True)
class Traced:
    """A graph to be traced by somebody else. `order` fills its placeholders; `alike` are axes of one size, `bounds`
    the sizes that it holds for; `readings` is the state that it is for."""

    program: Program
    code: Callable[..., Any]
    order: tuple[tuple[str, str], ...]
    fields: Sequence[str] | None
    alike: tuple[tuple[tuple[str, int], ...], ...]
    bounds: tuple[Bound, ...]
    readings: tuple[Reading, ...]

    @staticmethod
    def of(runner: Runner, call: Call, readings: Sequence[Reading]) -> Traced:
        """As it is for a call."""
        named: dict[str, list[tuple[str, int]]] = {}
        fixed = []
        for name, axes in call.labels.items():
            for axis, label in enumerate(axes):
                if label is None:
                    size = call.inputs[name].shape[axis]
                    fixed.append(Bound(name, axis, size, size))
                else:
                    named.setdefault(label, []).append((name, axis))
        program = runner.program
        return Traced(
            program,
            runner.whole,
            tuple((slot.kind, slot.name) for slot in program.order()),
            runner.fields,
            tuple(tuple(axes) for axes in named.values()),
            (*program.bounds, *fixed),
            tuple(readings),
        )

    def outside(self, inputs: Mapping[str, torch.Tensor]) -> list[tuple[str, int]]:
        """The axes whose sizes the graph does not hold for."""
        found = []
        for bound in self.bounds:
            size = inputs[bound.name].shape[bound.axis]
            if size < bound.least or size > bound.most:
                found.append((bound.name, bound.axis))
        return found

    def holds(self, backbone: nn.Module, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Whether the graph is one for the model as it is and for inputs that fit each other."""
        for path, steps, value in self.readings:
            one: Any = submodule(backbone, path)
            for item, key in steps:
                one = one[key] if item else getattr(one, key)
            if one != value:
                return False
        for axes in self.alike:
            name, axis = axes[0]
            for other, at in axes[1:]:
                if inputs[name].shape[axis] != inputs[other].shape[at]:
                    return False
        return True

    def run(self, model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> dict[str, Any]:
        """The fields of the output, on the tensors that the model holds now."""
        roots = roots_of(model)
        arguments = []
        for kind, name in self.order:
            if kind == "input":
                arguments.append(inputs[name])
            elif kind == "constant":
                arguments.append(self.program.constants[name])
            else:
                registry, last = place(roots[kind], name)
                arguments.append(registry[last])
        results = self.code(*arguments)
        if self.fields is None:
            return self.program.structured(results)
        return dict(zip(self.fields, results, strict=True))


def find(
    store: Any,
    entry: str,
    backbone: nn.Module,
    inputs: Mapping[str, torch.Tensor],
    flags: Mapping[str, Any],
) -> Traced | None:
    """The graph for a call that torch.compile looks at; None where there is none before a call was made."""
    name = _ready(store.number, kind_of(entry, inputs, flags))
    one = None if name is None else getattr(store.traced, name)
    exact = [] if one is None else one.outside(inputs)
    if exact:
        one = getattr(store.traced, _ready(store.number, kind_of(entry, inputs, flags, exact)))
    return one if one is not None and one.holds(backbone, inputs) else None


# Who can make a Traced ready, by a number: torch.compile may know a number where it may not know a store.
_STORES: WeakValueDictionary[int, Any] = WeakValueDictionary()
_NUMBERS = itertools.count()


def enrol(store: Any) -> int:
    """A number for a store of graphs, whose `trace(kind)` gives the name of a Traced among its `traced`, or None."""
    number = next(_NUMBERS)
    _STORES[number] = store
    return number


@torch._dynamo.assume_constant_result  # type: ignore[untyped-decorator]
def _ready(store: int, kind: Kind) -> str | None:
    """The name of the Traced for a kind of call; torch.compile runs this while it looks, and not again. A graph is
    captured in a thread of its own, where nobody else is tracing."""
    with ThreadPoolExecutor(1) as alone:
        found: str | None = alone.submit(_STORES[store].trace, kind).result()
    return found
