"""Alike: whether two graphs compute the same, node by node, whatever they compute besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from operator import getitem
from typing import Any

import torch
from torch import fx, nn

from peftc.graph.aten import VIEW, operand, shares, writes
from peftc.graph.program import Program, is_call


def alike(program: Program, other: Program, past: Mapping[fx.Node, fx.Node]) -> bool:
    """Whether both give the same, where each node of `program` in `past` is the one that goes past it."""
    known: dict[object, str] = {}
    mine, theirs = dict(_axes(program)), dict(_axes(other))
    same = {theirs[axis]: size for axis, size in mine.items()}
    one, two = _Names(known, past, {}, {}).of(program), _Names(known, {}, same, {}).of(other)
    return bool(one == two)


def _axes(program: Program) -> Iterator[tuple[tuple[str, int], Any]]:
    """(input, axis) and what its size is called; layers that meet call sizes the same that are apart without them."""
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.slots[node.name]
        if slot.kind == "input":
            for axis, size in enumerate(node.meta["val"].shape):
                if isinstance(size, torch.SymInt):
                    yield (slot.name, axis), size.node.expr


@dataclass(frozen=True)
class _Names:
    """Names for what nodes compute: nodes of any graph that compute the same have one name in `known`. `first` has what
    views are views of, and its shape."""

    known: dict[object, str]
    past: Mapping[fx.Node, fx.Node]
    sizes: Mapping[Any, Any]
    first: dict[str, tuple[str, str]]

    def of(self, program: Program) -> Any:
        """What a program gives."""
        inputs = program.graph.find_nodes(op="placeholder")
        names = {node: self._name(program.slots[node.name]) for node in inputs}
        return self._given(program.root, program.graph, names, ())

    def _name(self, key: object) -> str:
        return self.known.setdefault(key, f"%{len(self.known)}")

    def _given(
        self, root: nn.Module, graph: fx.Graph, names: dict[fx.Node, Any], within: Any
    ) -> Any:
        """What a graph gives of inputs with these names, `within` the settings of the graphs around it."""
        for node in graph.nodes:
            if node.op == "output":
                return fx.map_arg(node.args[0], names.__getitem__)
            if node in self.past:
                names[node] = names[self.past[node]]
            elif node.op != "placeholder":
                names[node] = self._made(root, node, names, within)
                if writes(node):
                    names |= dict.fromkeys(_written(node), names[node])
        raise AssertionError("a graph has an output")

    def _made(
        self, root: nn.Module, node: fx.Node, names: Mapping[fx.Node, Any], within: Any
    ) -> Any:
        value, args = node.meta.get("val"), node.args
        if isinstance(value, torch.SymInt):
            return self._name(str(value.node.expr.xreplace(self.sizes)))
        if node.op == "get_attr":
            return self._name((node.op, node.target))
        parts = [i for i, one in enumerate(args) if _part(root, one) is not None]
        if len(parts) == 1:  # a region: without gradients, or in another precision
            (at,) = parts
            inner: Any = _part(root, args[at])
            inputs = inner.graph.find_nodes(op="placeholder")
            given = (names[one] if isinstance(one, fx.Node) else one for one in args[at + 1 :])
            settings = (*within, str(node.target), *args[:at])
            return self._given(inner, inner.graph, dict(zip(inputs, given, strict=True)), settings)
        if is_call(node, *VIEW) and isinstance(args[0], fx.Node):
            return self._viewed(names[args[0]], args[0], node)
        of = names.get(args[0]) if is_call(node, getitem) else None  # type: ignore[arg-type]
        if isinstance(of, tuple):
            return of[args[1]]  # type: ignore[index]
        read = repr(fx.map_arg((args, node.kwargs), names.__getitem__))
        return self._name((node.op, str(node.target), read, within))

    def _viewed(self, of: Any, source: fx.Node, view: fx.Node) -> Any:
        """A value in another shape, which is itself again in its own."""
        first, own = self.first.get(of, (of, self._shape(source)))
        shape = self._shape(view)
        name = first if shape == own else self._name(("view", first, shape))
        self.first[name] = first, own
        return name

    def _shape(self, node: fx.Node) -> str:
        sizes = (
            s.node.expr.xreplace(self.sizes) if isinstance(s, torch.SymInt) else s
            for s in node.meta["val"].shape
        )
        return str([*sizes])


def _part(root: nn.Module, one: object) -> fx.GraphModule | None:
    """The graph that an argument is."""
    if not isinstance(one, fx.Node) or one.op != "get_attr":
        return None
    part = getattr(root, str(one.target), None)
    return part if isinstance(part, fx.GraphModule) else None


def _written(node: fx.Node) -> Iterator[fx.Node]:
    """What holds something else once `node` wrote into its argument: that, and what it is a view of."""
    one = node
    while (one is node or shares(one)) and one.op == "call_function":
        first = operand(one, 0)
        if first is None:
            return
        yield first
        one = first
