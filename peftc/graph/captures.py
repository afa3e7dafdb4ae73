"""Captures: graphs as they were traced, kept for the next model that is the same to tracing."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace

from peftc.graph.program import Program

# The masks of graphs that serve where these are asked for.
SERVES = {"dropped": ("dropped", "any"), "explicit": ("explicit", "any")}


@dataclass
class Captures:
    """Graphs as they were traced, for all models that tracing cannot tell apart: a graph holds no weights.

    At most `bound` graphs are kept, the latest used ones; None keeps all.
    """

    bound: int | None
    programs: OrderedDict[tuple[Hashable, str], Program] = field(default_factory=OrderedDict)

    def get(self, key: Hashable, masks: str, trace: Callable[[], Program]) -> Program:
        """A graph of its own for each caller, whose masks are "explicit" or "dropped", or one that serves both."""
        one = next((it for last in SERVES[masks] if (it := (key, last)) in self.programs), None)
        if one is None:
            program = trace()
            one = key, program.masks
            self.programs[one] = program
        self.programs.move_to_end(one)
        kept = _copied(self.programs[one])
        while self.bound is not None and len(self.programs) > self.bound:
            self.programs.popitem(last=False)
        return kept


CAPTURES = Captures(bound=8)


def _copied(program: Program) -> Program:
    return replace(
        program, graph=copy.deepcopy(program.graph), slots=dict(program.slots), replaced={}
    )
