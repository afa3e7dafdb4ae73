"""The Program: one captured entry of a model, as a graph that is a pure function of its slots."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from peftc.graph.code import function_of

aten = torch.ops.aten


@dataclass(frozen=True)
class Slot:
    """What fills a placeholder: a `parameter`, `buffer` or `delta` by its path, a `constant`, an `input`."""

    kind: str
    name: str


@dataclass(frozen=True)
class Read:
    """A port that is an operand: assigning it changes what this one consumer reads."""

    user: fx.Node
    index: int

    @property
    def node(self) -> fx.Node:
        value = self.user.args[self.index]
        assert isinstance(value, fx.Node)
        return value


@dataclass(frozen=True)
class Value:
    """A port that is a result: assigning it changes what every consumer reads."""

    node: fx.Node


@dataclass(frozen=True)
class Bound:
    """An axis of an input that the graph holds for in a range of sizes."""

    name: str
    axis: int
    least: int
    most: int


@dataclass(frozen=True)
class Output:
    """A field that a graph returns."""

    user: fx.Node
    index: int

    @property
    def node(self) -> fx.Node:
        value = self.user.args[0][self.index]  # type: ignore[index]
        assert isinstance(value, fx.Node)
        return value


@dataclass(frozen=True)
class Held:
    """A prefix of so many `rows` in front of what a cache has: `wide` puts it before `keys`, which are those of the
    input `name`, `past`, and of now. `prefix` is that of one row of a batch."""

    name: str
    wide: fx.Node
    past: fx.Node
    keys: fx.Node
    prefix: fx.Node
    rows: int


@dataclass(frozen=True)
class Reader:
    """What reads a quantised weight in a graph that runs: a `linear`, which may compute in a type of its own, and what
    makes the `whole` matrix."""

    linear: Callable[..., torch.Tensor]
    whole: Callable[..., torch.Tensor]
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Note:
    """What a forward decided once and wrote into its configuration, into a field that held None, as classifiers do
    with `problem_type` when they first see labels. `config` numbers the model's configurations. Who reads the field
    goes the same way when it holds this value."""

    config: int
    name: str
    value: Hashable


@dataclass
class Program:
    """A captured entry. `slots` maps each placeholder to what fills it; the graph holds no state, and what it calls
    is in `root`. `wide` are the inputs of ids whose sequences it was traced with rows in front of. `masks` are
    "explicit" or, for batches in which every token counts, "dropped", where the model makes that difference; else
    "any". `held` are the prefixes that a cache can hold; `quantized` what reads the parameters that are no plain
    tensors, by their paths."""

    entry: str
    graph: fx.Graph
    root: nn.Module
    slots: dict[str, Slot]
    constants: dict[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    training: bool = False
    output_type: Callable[..., Any] = dict
    wide: frozenset[str] = frozenset()
    bounds: tuple[Bound, ...] = ()
    masks: str = "any"
    notes: Sequence[Note] = ()
    held: tuple[Held, ...] = ()
    quantized: Mapping[str, Reader] = field(default_factory=dict)
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)
    _filled: dict[Slot, fx.Node] = field(default_factory=dict, init=False)

    @property
    def inputs(self) -> frozenset[str]:
        """The names of the arguments that this entry was captured with."""
        return frozenset(slot.name for slot in self.slots.values() if slot.kind == "input")

    def slot(self, node: fx.Node) -> Slot | None:
        return self.slots.get(node.name) if node.op == "placeholder" else None

    def parameter(self, node: object) -> str | None:
        """The path of the backbone parameter that `node` is, or None."""
        return self._named(node, "parameter")

    def input(self, node: object) -> str | None:
        """The name of the argument that `node` is, or None."""
        return self._named(node, "input")

    def _named(self, node: object, kind: str) -> str | None:
        slot = self.slot(node) if isinstance(node, fx.Node) else None
        return slot.name if slot is not None and slot.kind == kind else None

    def current(self, node: fx.Node) -> fx.Node:
        """`node`, or what the latest edit put in its place."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def placeholder(self, name: str, slot: Slot) -> fx.Node:
        """The placeholder filled by `slot`; added behind the others when there is none yet."""
        if not self._filled:
            for node in self.graph.find_nodes(op="placeholder"):
                self._filled[self.slots[node.name]] = node
        if slot not in self._filled:
            last = next(reversed(self._filled.values()), None)
            with self.graph.inserting_after(last) if last else self.graph.inserting_before():
                added: fx.Node = self.graph.placeholder(name)
            self.slots[added.name], self._filled[slot] = slot, added
        return self._filled[slot]

    def splice(self, port: Read | Value, new: fx.Node, inserted: Sequence[fx.Node]) -> None:
        """Put `new` where `port` was. The only function that changes edges of the graph."""
        if isinstance(port, Read):
            port.user.update_arg(port.index, new)
            return
        old = self.current(port.node)
        if new is old:  # nothing is left of the edit here, as of dropout in evaluation
            return
        keep = set(inserted)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)
        self.replaced[old] = new

    def output(self, name: str) -> Output | None:
        """Where the graph returns the field `name`, if it does."""
        returned = next(node for node in self.graph.nodes if node.op == "output")
        fields = list(self.out_spec.context or ())
        return Output(returned, fields.index(name)) if name in fields else None

    @cached_property
    def _sample(self) -> Any:
        """A traced floating tensor, which knows the type and device of the graph and how to fake more."""
        values = [node.meta.get("val") for node in self.graph.find_nodes(op="placeholder")]
        tensors = [one for one in values if isinstance(one, torch.Tensor)]
        return next((one for one in tensors if one.is_floating_point()), tensors[0])

    @property
    def dtype(self) -> torch.dtype:
        """The floating type of the weights that the graph was traced with."""
        dtype: torch.dtype = self._sample.dtype
        return dtype

    def fake(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """What stands for a tensor while a graph is rewritten: its sizes and type, without values."""
        sample = self._sample
        with sample.fake_mode:
            return torch.empty(tuple(shape), dtype=dtype, device=sample.device)

    def copied(self) -> tuple[Program, dict[fx.Node, fx.Node]]:
        """A Program of the same nodes in a graph of its own, and which is which."""
        graph, of = fx.Graph(), dict[fx.Node, fx.Node]()
        graph.output(graph.graph_copy(self.graph, of))
        made = replace(self, graph=graph, slots=dict(self.slots), replaced={}, held=())
        return made, of

    def code(self) -> Callable[..., Any]:
        """The graph as it is now, as a function of its placeholders in their order."""
        return function_of(self.root, self.graph)

    def order(self) -> Iterator[Slot]:
        """What fills the placeholders, in their order."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                yield self.slots[node.name]

    def structured(self, results: Any) -> dict[str, Any]:
        """What the graph returned, as the fields of the output."""
        fields: dict[str, Any] = pytree.tree_unflatten(results, self.out_spec)
        return fields


def behind(
    node: fx.Node, stops: Callable[[fx.Node], object] = lambda _: False
) -> dict[fx.Node, None]:
    """A node and all that it is computed from, first operands first; not what is behind a node that `stops`."""
    found: dict[fx.Node, None] = {}
    stack = [node]
    while stack:
        one = stack.pop()
        if one not in found:
            found[one] = None
            stack += [] if stops(one) else reversed(one.all_input_nodes)
    return found


def scope_of(node: fx.Node) -> str:
    """The path of the innermost module that `node` was traced in."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    path: str = next(reversed(stack.values()))[0]
    return path.partition(".")[2]


def op_name(node: fx.Node) -> str:
    """`grouped_mm` of `transformers.grouped_mm.default`."""
    return str(node.target).partition(".")[2].partition(".")[0] or str(node.target)


def is_call(node: object, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets
