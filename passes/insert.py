"""Insert: write a Plan's deltas into a Program's graph."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from peftc.graph.program import Program
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder
from peftc.rewrite.pipeline import PassError
from peftc.rewrite.splicing import splice
from peftc.sites.index import Index
from peftc.sites.kinds import KINDS
from peftc.sites.site import Place


@dataclass(frozen=True)
class Insert:
    """Locates every edit on the graph as it was traced, then splices them in the order of the plan: a later one
    sees what an earlier one made. `dtypes` has those of the delta tensors by path, where they are not the
    graph's own."""

    edits: tuple[Edit, ...]
    dtypes: Mapping[str, torch.dtype] = field(default_factory=dict, hash=False)
    name: str = "insert"

    def run(self, program: Program) -> int:
        index = Index(program)
        located = [(edit, place) for edit in self.edits for place in _places(index, edit)]
        top: fx.Node = next(node for node in program.graph.nodes if node.op != "placeholder")
        shared = Builder(program.graph, program.training, memo={})
        for edit, place in located:
            splice(program, edit, place, shared, top, self.dtypes)
        if unread := list(_unread(program)):
            raise PassError(f"no edit reads {', '.join(unread)}")
        program.graph.eliminate_dead_code()  # of a value that a later edit does without
        return len(located)


def _unread(program: Program) -> Iterator[str]:
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.slots[node.name]
        if slot.kind == "delta" and not node.users:
            yield slot.name


def _places(index: Index, edit: Edit) -> tuple[Place, ...]:
    """Where an edit acts in this graph. A site may be missing from an entry (there is no encoder while
    decoding), but only with what it is made of."""
    kind, site = KINDS[edit.site.at], edit.site
    places = kind.locate(index, site)
    present = [] if places else list(kind.used(index, site))
    if present:
        entry = index.program.entry
        raise PassError(f"{edit.name} has no place in '{entry}', yet it uses {present[0]}")
    return places
