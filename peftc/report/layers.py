"""Layers: steps as the modules that they were traced in; layers of the same structure are one block, as often as it is."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from peftc.report.changes import Step
from peftc.report.sketch import runs


@dataclass(frozen=True)
class Block:
    """A module, or several of one structure that stand in one list: `paths` are theirs, `items` what is in the first."""

    path: str
    kind: str
    paths: tuple[str, ...]
    items: tuple[Block | Step, ...]

    def steps(self) -> Iterator[Step]:
        """All of it, in order."""
        for one in self.items:
            if isinstance(one, Block):
                yield from one.steps()
            else:
                yield one

    def blocks(self) -> Iterator[Block]:
        """It and the blocks in it, outermost first."""
        yield self
        for one in self.items:
            if isinstance(one, Block):
                yield from one.blocks()


@dataclass(frozen=True)
class Tree:
    """A graph as blocks. `stands` has for each step that is not shown the one that is shown for it, and so `places` for
    the paths of blocks."""

    root: Block
    stands: Mapping[str, str] = field(default_factory=dict)
    places: Mapping[str, str] = field(default_factory=dict)

    def step(self, name: str) -> str:
        """The step that is shown for one of this name."""
        while name in self.stands:
            name = self.stands[name]
        return name

    def place(self, path: str) -> str:
        """The block that is shown for one of this path."""
        while path in self.places:
            path = self.places[path]
        return path


def tree(steps: Sequence[Step], name: str = "") -> Tree:
    """Blocks of steps; what is of no module is in the root, which is called `name`."""
    growing = _Growing({step.name: step for step in steps})
    items = growing.level(steps, 0)
    return Tree(Block("", name, ("",), items), growing.stands, growing.places)


@dataclass
class _Growing:
    steps: Mapping[str, Step]
    stands: dict[str, str] = field(default_factory=dict)
    places: dict[str, str] = field(default_factory=dict)

    def level(self, steps: Sequence[Step], depth: int) -> tuple[Block | Step, ...]:
        """What stands in one module, whose steps have `depth` modules around them that are shown already."""
        groups: dict[str, list[Step]] = {}
        for step in steps:
            inside = len(step.modules) > depth
            groups.setdefault(step.modules[depth][0] if inside else f"{step.name}:", []).append(
                step
            )
        items: list[Block | Step] = []
        for path, mine in groups.items():
            if path.endswith(":"):
                items += mine
            else:
                inner = self.level(mine, depth + 1)
                items.append(Block(path, mine[0].modules[depth][1], (path,), inner))
        return tuple(self._merged(items))

    def _merged(self, items: Sequence[Block | Step]) -> Iterator[Block | Step]:
        """Elements of a list that have one structure are the first of them."""
        found: dict[Hashable, list[Block]] = {}
        for one in items:
            if isinstance(one, Block) and (listed := re.fullmatch(r"(.*\.)?\d+", one.path)):
                key = listed[1], one.kind, *self._said(one, one.path)
                found.setdefault(key, []).append(one)
        several = {id(mine[0]): mine for mine in found.values()}
        others = {id(one) for mine in found.values() for one in mine[1:]}
        for item in items:
            if id(item) in several:
                yield self._one(several[id(item)])
            elif id(item) not in others:
                yield item

    def _one(self, mine: Sequence[Block]) -> Block:
        first = mine[0]
        for other in mine[1:]:
            pairs = zip(_values(first), _values(other), strict=True)
            self.stands |= {there.name: here.name for here, there in pairs}
            for own, block in zip(first.blocks(), other.blocks(), strict=True):
                for path in block.paths:
                    self.places[path] = own.path
        return replace(first, paths=tuple(one.path for one in mine))

    def _said(self, item: Block | Step, root: str) -> Iterator[Hashable]:
        """What makes two layers one: all but their own paths, where they stand, and who asks for a size first."""
        if isinstance(item, Step):
            if not item.is_size:
                yield self._step(item, root)
            return
        yield _below(item.path, root), item.kind, len(item.paths)
        for one in item.items:
            yield from self._said(one, root)

    def _step(self, step: Step, root: str) -> Hashable:
        tensors = tuple((_below(t.path, root), t.kind, t.name, t.shape) for t in step.tensors)
        read = [self.steps[name] for name in step.reads if name in self.steps]
        reads = tuple(_read(one, root) for one in read if not one.is_size)
        own = step.op, step.state, step.shape, step.settings, step.entries, step.by
        return *own, tensors, reads


def _values(block: Block) -> Iterator[Step]:
    return (step for step in block.steps() if not step.is_size)


def _read(step: Step, root: str) -> str:
    """What a step reads, where it is of the same layer."""
    return step.op if any(path == root for path, _ in step.modules) else ""


def _below(path: str, root: str) -> str:
    """A path from a layer on; nothing of one elsewhere."""
    return path[len(root) :] if f"{path}.".startswith(f"{root}.") else ""


def span(paths: Sequence[str]) -> str:
    """`layers.0-11` of equal elements of a list; `layers.0-2,5` of some."""
    head = re.sub(r"\d+$", "", paths[0])
    numbers = [int(path[len(head) :]) for path in paths if path[len(head) :].isdecimal()]
    return head + runs(numbers) if numbers else paths[0]
