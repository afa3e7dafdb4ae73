"""Changes: a graph before and after as one list of steps: what stayed, what was inserted and why, what is gone."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from peftc.graph.address import addresses
from peftc.graph.arguments import axes
from peftc.graph.aten import CUT, DROPOUT, MOVE
from peftc.graph.program import Program, aten, is_call
from peftc.plan.left import Key
from peftc.report.subject import Subject
from peftc.rewrite.constants import alone
from peftc.rewrite.folding import Outcome

KEPT, INSERTED, FOLDED, REMOVED = "kept", "inserted", "folded", "removed"
# (path, class) of the modules that a step was traced in, outermost first.
Modules = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Tensor:
    """What a step reads that is stored: its path, its kind of slot, its name in the spec or its last one, its sizes."""

    path: str
    kind: str
    name: str
    shape: str


@dataclass(frozen=True)
class Step:
    """A call of the graph. `entries` are the places in the spec of what inserted it or lets a tensor of it train; `by` is
    the pass that folded it and `into` what it became part of. A `minor` one moves values and computes none. `reads` are
    the names of other steps, `settings` the operands that are no tensors. `was` is what one that stayed was before, where
    it reads or gives something else now. One `ahead` is of parameters alone, and stands
    before all layers in the graph."""

    name: str
    op: str
    state: str = KEPT
    modules: Modules = ()
    shape: str = ""
    settings: str = ""
    tensors: tuple[Tensor, ...] = ()
    reads: tuple[str, ...] = ()
    entries: tuple[int, ...] = ()
    site: str = ""
    by: str = ""
    into: str = ""
    minor: bool = False
    address: str = ""
    ahead: bool = False
    was: Step | None = None

    @property
    def is_size(self) -> bool:
        """Whether it gives a number. Later layers read the sizes that the first one asked for."""
        return self.shape != "" and not self.shape.startswith("[")


def steps(subject: Subject) -> tuple[Step, ...]:
    """The steps of both graphs, those that are gone where they stood."""
    before, after = (_Reading.of(subject, one) for one in (subject.before, subject.after))
    known = {step.name: step for step in before.steps()}
    new = {step.name: _since(step, known.get(step.name)) for step in after.steps()}
    old = [step for step in known.values() if step.name not in new]
    places = {node.name: i for i, node in enumerate(subject.before.graph.nodes)}
    found: list[Step] = []
    for step in new.values():
        while old and places[old[0].name] < places.get(step.name, -1):
            found.append(_gone(old.pop(0)))
        found.append(step)
    return tuple(_at_their_sites([*found, *map(_gone, old)]))


def _at_their_sites(steps: Sequence[Step]) -> Iterator[Step]:
    """What one site alone reads goes there."""
    waiting: dict[str, list[Step]] = {}
    for step in steps:
        if step.ahead and step.site:
            waiting.setdefault(step.site, []).append(step)
            continue
        if any(path == step.site.rpartition(":")[0] for path, _ in step.modules):
            yield from waiting.pop(step.site, ())
        yield step
    for rest in waiting.values():
        yield from rest


def _since(step: Step, was: Step | None) -> Step:
    """A step of the graph after, and what it was."""
    same = was is None or (step.shape, step.tensors) == (was.shape, was.tensors)
    return step if same else replace(step, was=was)


def _gone(step: Step) -> Step:
    return replace(step, state=REMOVED, entries=(), address="")


@dataclass(frozen=True)
class _Reading:
    """Reads a graph. `axes` name its symbols, `modules` are those of each scope, `names` those of delta tensors in the
    spec, `trains` has the entries that let a parameter train."""

    program: Program
    axes: Mapping[str, str]
    modules: Mapping[str, Modules]
    names: Mapping[str, str]
    trains: Mapping[str, tuple[int, ...]]
    outcomes: Mapping[Key, Outcome]

    @staticmethod
    def of(subject: Subject, program: Program) -> _Reading:
        plan = subject.plan
        names = {one.path: one.name for edit in plan.edits for one in edit.parameters}
        trains = {one.path: (one.index,) for one in plan.unfrozen}
        found: dict[str, Modules] = {}
        for node in program.graph.nodes:
            stack = modules_of(node)
            for depth, (path, _) in enumerate(stack, 1):
                found.setdefault(path, stack[:depth])
        several = subject.model.config.is_encoder_decoder
        return _Reading(program, _axes(program, several), found, names, trains, subject.outcomes)

    def steps(self) -> Iterator[Step]:
        """In the order of the graph."""
        known, free = addresses(self.program), alone(self.program)
        last: Modules = ()
        for node in self.program.graph.nodes:
            if node.op not in ("placeholder", "output"):
                placed = "nn_module_stack" in node.meta
                last = modules_of(node) if placed else last  # of a mask: where what it follows is
                yield self._step(node, known[node], last, not placed and node in free)

    def _step(self, node: fx.Node, address: str, modules: Modules, ahead: bool) -> Step:
        edit: Key | None = node.meta.get("edit")
        tensors = tuple(self._tensors(node))
        entries = {index for one in tensors for index in self.trains.get(one.path, ())}
        state, by, into = KEPT, "", ""
        if edit is not None:
            entries.add(edit[0])
            state, by, into = self._state(edit, ahead)
        elif "delta" in node.meta:
            state = INSERTED
        if ahead:  # it stands before all layers
            modules = self.modules.get(edit[1].rpartition(":")[0], ()) if edit else ()
        return Step(
            node.name,
            op_of(node),
            state,
            modules,
            self._shape(node.meta.get("val")),
            _settings(node),
            tensors,
            tuple(one.name for one in node.all_input_nodes if one.op != "placeholder"),
            tuple(sorted(entries)),
            "" if edit is None else edit[1],
            by,
            into,
            _is_minor(node),
            address,
            ahead,
        )

    def _state(self, edit: Key, hoisted: bool) -> tuple[str, str, str]:
        """What became of what an edit inserted, by which pass, and what that is part of now."""
        of_all = [one for key, one in self.outcomes.items() if key[0] == edit[0]]
        mine = [one for one in of_all if not edit[1] or one.key == edit]
        if mine and all(one.folded for one in mine):
            return FOLDED, mine[0].by, mine[0].note
        if hoisted and mine and all(one.evaluated for one in mine):
            return FOLDED, mine[0].evaluated, "parameters"
        return INSERTED, "", ""

    def _tensors(self, node: fx.Node) -> Iterator[Tensor]:
        for one in node.all_input_nodes:
            slot = self.program.slot(one)
            if slot is not None and slot.kind != "input":
                name = self.names.get(slot.name, slot.name.rpartition(".")[2])
                yield Tensor(slot.name, slot.kind, name, self._shape(one.meta.get("val")))

    def _shape(self, value: Any) -> str:
        if isinstance(value, torch.Tensor):
            return "[" + ", ".join(self._size(one) for one in value.shape) + "]"
        if isinstance(value, int | torch.SymInt):
            return self._size(value)
        return ""

    def _size(self, size: Any) -> str:
        said = str(size.node.expr) if isinstance(size, torch.SymInt) else str(size)
        return re.sub(r"\bs\d+\b", lambda one: self.axes.get(one[0], one[0]), said)


def modules_of(node: fx.Node) -> Modules:
    """The modules that a node was traced in, below the model itself."""
    stack: Mapping[str, tuple[str, Any]] = node.meta.get("nn_module_stack") or {}
    found = []
    for path, kind in stack.values():
        own = path.partition(".")[2]
        if own:
            found.append((own, str(getattr(kind, "__name__", kind)).rpartition(".")[2]))
    return tuple(found)


def op_of(node: fx.Node) -> str:
    """The name of what a node calls, whoever inserted it."""
    schema = getattr(node.target, "_schema", None)
    name: str = schema.name if schema else str(getattr(node.target, "__name__", node.target))
    return name.rpartition("::")[2]


def _axes(program: Program, several: bool) -> dict[str, str]:
    """The symbol of each axis of the inputs, by what the axis is."""
    found: dict[str, str] = {}
    for node in program.graph.find_nodes(op="placeholder"):
        slot, value = program.slots[node.name], node.meta.get("val")
        if slot.kind == "input" and isinstance(value, torch.Tensor):
            names = axes(slot.name, value.ndim, program.entry, several)
            for size, name in zip(value.shape, names, strict=True):
                if isinstance(size, torch.SymInt) and name:
                    found.setdefault(str(size.node.expr), name)
    return found


def _settings(node: fx.Node) -> str:
    """The operands that are no tensors, as the graph has them."""
    values: Sequence[Any] = pytree.tree_leaves((node.args, node.kwargs))
    said = [str(one) for one in values if one is not None and not isinstance(one, fx.Node)]
    return ", ".join(said)


# What fills a tensor, or gives a size.
_FILLING = (aten.expand.default, aten.sym_size.int, aten.arange.default, aten.full.default)


def _is_minor(node: fx.Node) -> bool:
    """Whether a node moves values and computes none, or computes sizes, positions and masks of whole numbers."""
    value = node.meta.get("val")
    if isinstance(value, torch.Tensor) and not value.is_floating_point():
        return True
    if not isinstance(value, torch.Tensor | tuple | list):
        return True
    return is_call(node, *MOVE, *CUT, *_FILLING) or (is_call(node, *DROPOUT) and not node.args[2])
