"""Idle: code may ask for values and compute nothing with the answers.

Assertions (`assert not h.isnan().any()`) and the statistics of a run (I-BERT's range of each activation) ask for values,
which a trace has not. They are told yes, and in a second trace no, each but where that raises: where both graphs are
alike, what they compute does not hang on the answers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from peftc.errors import CaptureError
from peftc.graph.alike import alike
from peftc.graph.program import Program

# More answers than any forward asks for, but one that asks until it is told no.
_MOST = 10_000


class Place(NamedTuple):
    """What asks: a function's code, and its instruction."""

    code: Any
    instruction: int


class Idle(TorchFunctionMode):
    """Answers while a model is traced what nobody else does: as `needed` says, by the place that asks, or else `answer`;
    `last` is the place that asked last."""

    def __init__(self, answer: bool, needed: Mapping[Place, bool]) -> None:
        super().__init__()
        self.answer, self.needed = answer, dict(needed)
        self.asked, self.last = 0, Place("", 0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__bool__:
            return func(*args, **(kwargs or {}))
        self.asked += 1
        if self.asked > _MOST:
            raise RuntimeError("its code asks for values again and again")
        self.last = _place()
        return self.needed.get(self.last, self.answer)


def _place() -> Place:
    """Who asks: the first outside torch and this package."""
    frame = sys._getframe(2)
    while _is_ours(frame):
        assert frame.f_back is not None
        frame = frame.f_back
    return Place(frame.f_code, frame.f_lasti)


def _is_ours(frame: FrameType) -> bool:
    return frame.f_globals["__name__"].partition(".")[0] in ("torch", "peftc")


def undecided(trace: Callable[[Idle], Program]) -> Program | None:
    """What `trace` makes with such answers; None where it fails all the same, or something hangs on them."""
    needed: dict[Place, bool] = {}
    program = _traced(trace, True, needed)
    other = program and _traced(trace, False, needed)
    return program if program and other and alike(program, other, {}) else None


def _traced(
    trace: Callable[[Idle], Program], answer: bool, needed: dict[Place, bool]
) -> Program | None:
    """The graph where all that is asked is answered so, but where that raises, which then stands in `needed`. An
    assertion raises whatever else is answered."""
    while True:
        answers = Idle(answer, needed)
        try:
            return trace(answers)
        except CaptureError as error:
            one = answers.last
            if one in needed or not (_is_raised(error) and _raises(trace, {**needed, one: answer})):
                return None
            needed[one] = not answer


def _raises(trace: Callable[[Idle], Program], needed: Mapping[Place, bool]) -> bool:
    try:
        trace(Idle(True, needed))
    except CaptureError as error:
        return _is_raised(error)
    return False


def _is_raised(error: CaptureError) -> bool:
    """Whether a trace ended where the model's own code raised."""
    cause = error.__cause__
    trace = None if cause is None else cause.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and not _is_ours(trace.tb_frame)
