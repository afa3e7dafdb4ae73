"""Idle: code may ask for values and compute nothing with the answers.

Assertions (`assert not h.isnan().any()`) and the statistics of a run (I-BERT's range of each activation) ask for values,
which a trace has not. They are told yes, and in a second trace no, each but where that raises: where both graphs are
alike, what they compute does not hang on the answers. Nor does it where a mask is left out of which no place is true
(`if not mask.any(): mask = None`, FSMT): what is filled by such a mask is as it was.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.errors import CaptureError
from peftc.graph.alike import alike
from peftc.graph.answers import Answers, mark, marks
from peftc.graph.aten import MOVE, writes
from peftc.graph.program import Program, aten, is_call

# More answers than any forward asks for, but one that asks until it is told no.
_MOST = 10_000
_ANY = (torch.any, torch.Tensor.any)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_SAYS = "a mask is used"


class Place(NamedTuple):
    """What asks: a function's code, and its instruction."""

    code: Any
    instruction: int


class Idle(Answers):
    """Answers while a model is traced what nobody else does: as `needed` says, by the place that asks, or else `answer`;
    `last` is the place that asked last."""

    def __init__(self, answer: bool, needed: Mapping[Place, bool]) -> None:
        super().__init__(answer)
        self.needed, self.last = dict(needed), Place("", 0)
        self._any: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is not torch.Tensor.__bool__:
            result = func(*args, **(kwargs or {}))
            if func in _ANY and len(args) == 1 and not kwargs and args[0].dtype == torch.bool:
                self._any[result] = True
            return result
        if args[0] in self._any:
            mark(args[0], _SAYS)
        self.asked += 1
        if self.asked > _MOST:
            raise RuntimeError("its code asks for values again and again")
        self.last = _place()
        return self.needed.get(self.last, self.yes)


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
    if program is None or other is None:
        return None
    past = {node: before for one in marks(program, [_SAYS]) for node, before in _filled(one)}
    for traced in (program, other):
        for one in marks(traced, [_SAYS]):
            traced.graph.erase_node(one)
    return program if alike(program, other, past) else None


def _filled(asked: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What is filled by the mask that was asked for, and what it was before. One that is written into is another."""
    whole: Any = asked.args[0]
    masks = [whole.args[0]]
    for mask in masks:
        masks += [user for user in mask.users if is_call(user, *MOVE) and user not in masks]
    if any(writes(user) for mask in masks for user in mask.users):
        return
    for mask in masks:
        for user in mask.users:
            if is_call(user, *_FILL) and user.args[1] is mask and user.args[0] is not mask:
                yield user, user.args[0]


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
