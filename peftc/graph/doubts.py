"""Doubts: what code asks of values, of which a second trace shows that nothing hangs on it but what the graph then selects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from peftc.graph.answers import Answers
from peftc.graph.dropped import Dropped, left_out
from peftc.graph.finite import Finite, selected
from peftc.graph.loops import Loops, rows_join
from peftc.graph.program import Program


@dataclass(frozen=True)
class Doubt:
    """`answers` in both traces; `settled` makes the first graph one for either answer, where the second, which was told
    no, is otherwise alike. `refusal` is said where it is not."""

    answers: Callable[[bool], Answers]
    settled: Callable[[Program, Program], bool]
    refusal: str


# The last is asked first.
DOUBTS = (
    Doubt(Finite, selected, "whether values are finite decides more than whether they are bounded"),
    Doubt(Dropped, left_out, "a random number decides more than whether a layer is left out"),
    Doubt(Loops, rows_join, "a loop over what was chosen does more than add rows"),
)
