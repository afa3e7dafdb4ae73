"""The Program: one captured entry of a model, as a graph that is a pure function of its slots."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

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
class Columns:
    """The features [start, stop) in each of `groups` groups of `period` features: a slice of a fused
    projection, contiguous (one group) or interleaved by heads."""

    groups: int
    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    def index(self) -> torch.Tensor:
        """The features, in order."""
        first = torch.arange(self.groups)[:, None] * self.period
        return (first + torch.arange(self.start, self.stop)).flatten()


@dataclass(frozen=True)
class Form:
    """How specs see a value that a model has in another layout: an op with its arguments, and its inverse."""

    op: Any
    args: tuple[Any, ...]
    inverse: Any
    inverse_args: tuple[Any, ...]
    name: str


TURNED = Form(aten.transpose.int, (0, 1), aten.transpose.int, (0, 1), "turned")


@dataclass(frozen=True)
class Part:
    """A port inside another: some features of it along `axis` (0 or -1), of its other `form` where it has one."""

    whole: Read | Value
    axis: int = 0
    columns: Columns | None = None
    form: Form | None = None


@dataclass(frozen=True)
class Keys:
    """What follows the number of keys of an attention: its masks, and the views that have it among their
    sizes, at that place."""

    masks: tuple[Read, ...]
    sized: tuple[tuple[fx.Node, int], ...]


Port = Read | Value | Part


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


@dataclass
class Program:
    """A captured entry. `slots` maps each placeholder to what fills it; the graph holds no state. `wide` are
    the inputs of ids whose sequences it was traced with rows in front of."""

    entry: str
    module: fx.GraphModule
    slots: dict[str, Slot]
    constants: dict[str, torch.Tensor]
    out_spec: pytree.TreeSpec
    training: bool = False
    output_type: type = dict
    wide: frozenset[str] = frozenset()
    bounds: tuple[Bound, ...] = ()
    replaced: dict[fx.Node, fx.Node] = field(default_factory=dict)

    @property
    def graph(self) -> fx.Graph:
        return self.module.graph

    @property
    def inputs(self) -> frozenset[str]:
        """The names of the arguments that this entry was captured with."""
        return frozenset(slot.name for slot in self.slots.values() if slot.kind == "input")

    def slot(self, node: fx.Node) -> Slot | None:
        return self.slots.get(node.name) if node.op == "placeholder" else None

    def parameter(self, node: object) -> str | None:
        """The path of the backbone parameter that `node` is or stands for, or None."""
        if not isinstance(node, fx.Node):
            return None
        slot = self.slot(node)
        if slot is not None:
            return slot.name if slot.kind == "parameter" else None
        rewritten: str | None = node.meta.get("parameter")
        return rewritten

    def current(self, node: fx.Node) -> fx.Node:
        """`node`, or what the latest edit put in its place."""
        while node in self.replaced:
            node = self.replaced[node]
        return node

    def placeholder(self, name: str, slot: Slot) -> fx.Node:
        """The placeholder filled by `slot`; added behind the others when there is none yet."""
        last: fx.Node | None = None
        node: fx.Node
        for node in self.graph.nodes:
            if node.op != "placeholder":
                break
            if self.slots.get(node.name) == slot:
                return node
            last = node
        with self.graph.inserting_after(last) if last else self.graph.inserting_before():
            added: fx.Node = self.graph.placeholder(name)
        self.slots[added.name] = slot
        return added

    def splice(self, port: Read | Value, new: fx.Node, inserted: Sequence[fx.Node]) -> None:
        """Put `new` where `port` was. The only function that changes edges of the graph."""
        if isinstance(port, Read):
            port.user.update_arg(port.index, new)
            return
        old = self.current(port.node)
        keep = set(inserted)
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user not in keep)
        self.replaced[old] = new

    def output(self, name: str) -> Output | None:
        """Where the graph returns the field `name`, if it does."""
        returned = next(node for node in self.graph.nodes if node.op == "output")
        fields = list(self.out_spec.context or ())
        return Output(returned, fields.index(name)) if name in fields else None

    def finish(self) -> None:
        """Check the graph and compile it to code; call after edits."""
        self.graph.lint()
        self.module.recompile()

    def order(self) -> Iterator[Slot]:
        """What fills the placeholders, in their order."""
        for node in self.graph.nodes:
            if node.op == "placeholder":
                yield self.slots[node.name]

    def structured(self, results: Any) -> dict[str, Any]:
        """What the graph returned, as the fields of the output."""
        fields: dict[str, Any] = pytree.tree_unflatten(results, self.out_spec)
        return fields


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
