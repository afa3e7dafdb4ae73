"""The Index: one scan of a graph, from which all sites are found and located."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, TypeVar

from torch import fx

from peftc.graph.aten import (
    CONV,
    FLAT,
    LINEAR,
    MOVE,
    TURN,
    bias_of,
    is_convolution,
    projects,
    static_shape,
    weight_of,
)
from peftc.graph.program import Program, is_call, op_name
from peftc.sites.view import PLAIN, TURNED, Form, View, Weight, kernels

T = TypeVar("T")


@dataclass
class Index:
    """The calls of one graph by op, with their order; `is_head` tells which module paths are outside the pretrained body.
    The graph must not change while it is in use."""

    program: Program
    is_head: Callable[[str], bool] = lambda _: False
    _calls: dict[Any, list[fx.Node]] = field(default_factory=dict)
    _found: dict[Any, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.order: dict[fx.Node, int] = {}
        self.parameters: list[tuple[fx.Node, str]] = []
        for place, node in enumerate(self.program.graph.nodes):
            self.order[node] = place
            if node.op == "call_function":
                self._calls.setdefault(node.target, []).append(node)
            elif path := self.program.parameter(node):
                self.parameters.append((node, path))

    def calls(self, *ops: Any) -> list[fx.Node]:
        """The calls of these ops, in graph order."""
        found = [node for op in ops for node in self._calls.get(op, ())]
        return sorted(found, key=self.order.__getitem__)

    def once(self, find: Callable[[Index], Iterable[T]]) -> tuple[T, ...]:
        """All that `find` finds in this index; it is asked once."""
        if find not in self._found:
            self._found[find] = tuple(find(self))
        found: tuple[T, ...] = self._found[find]
        return found

    @cached_property
    def linears(self) -> tuple[fx.Node, ...]:
        """Linears in graph order, whatever their weight is."""
        return tuple(self.calls(*LINEAR))

    @cached_property
    def projections(self) -> tuple[fx.Node, ...]:
        """What multiplies the features of each token by a weight, in graph order."""
        return tuple(node for node in self.calls(*LINEAR, *CONV) if projects(node))

    @cached_property
    def convolutions(self) -> tuple[fx.Node, ...]:
        """Convolutions, transposed ones left out, in graph order."""
        return tuple(node for node in self.calls(*CONV) if is_convolution(node))

    @cached_property
    def _by_weight(self) -> dict[str, list[fx.Node]]:
        found: dict[str, list[fx.Node]] = {}
        for node in self.projections:
            weight = self.stored(weight_of(node))
            if weight is not None:
                found.setdefault(weight.path, []).append(node)
        return found

    def multiplying(self, path: str) -> list[fx.Node]:
        """What multiplies features by this parameter, in graph order: a module may run twice."""
        return self._by_weight.get(path, [])

    def stored(self, node: fx.Node | None) -> Weight | None:
        """The parameter that an operand is, as it is, turned, or with the last axes of several as one; None where
        something computes it."""
        if node is None:
            return None
        if path := self.program.parameter(node):
            return Weight(path)
        form = _form(node)
        if form is None:
            return None
        assert isinstance(node.args[0], fx.Node)
        inner = self.stored(node.args[0])
        return inner and Weight(inner.path, View(replace(form, of=inner.view.form)))

    def weights(self, node: fx.Node, view: View = PLAIN) -> dict[str, Weight]:
        """W and b of a linear or convolution as a spec sees them through `view`; none when W is computed."""
        weight, bias = self.stored(weight_of(node)), self.stored(bias_of(node))
        if weight is None:
            return {}
        form = (
            kernels(static_shape(weight_of(node))[1:]) if is_convolution(node) else weight.view.form
        )
        also = self.also(weight.path, node.target)
        found = {"W": Weight(weight.path, View(form, view.columns), also)}
        if bias is not None:
            found["b"] = Weight(bias.path, View(columns=view.columns))
        return found

    def also(self, path: str, own: Any) -> str:
        """The op that reads this parameter too, besides those that are `own` (views of it are looked through)."""
        return next((op_name(one) for one in self.readers(path) if one.target is not own), "")

    def readers(self, path: str) -> list[fx.Node]:
        """The calls that read a parameter, through moves."""
        return self._readers.get(path, [])

    @cached_property
    def _readers(self) -> dict[str, list[fx.Node]]:
        return {path: list(_reading(node)) for node, path in self.parameters}


def _reading(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_call(user, *MOVE, *TURN):
            yield from _reading(user)
        elif user.op == "call_function":
            yield user


def _form(node: fx.Node) -> Form | None:
    """How a matrix lies in what it is a view of; None where it is none."""
    if len(static_shape(node)) != 2:
        return None
    if is_call(node, *TURN):
        return TURNED
    if is_call(node, *FLAT) and tuple(node.args[1:2]) == (1,):
        return kernels(static_shape(node.args[0])[1:])
    return None
