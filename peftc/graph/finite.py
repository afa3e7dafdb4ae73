"""Finite: code that bounds values of half precision, where not all of them are finite, does so in a graph by a selection.

`if not isfinite(h).all(): h = clamp(h, ...)` asks for values, which a trace has not. It is told that some are not finite,
and the bounded value stands in the graph; then whether all are selects between it and the value as it was. That the code
does nothing else there is seen in a second trace, which is told that all are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.alike import alike
from peftc.graph.answers import Answers, mark, marks
from peftc.graph.program import Program, aten, is_call

# What asks of each value, what asks of all, and the answer where all are finite.
_EACH = {
    torch.isfinite: True,
    torch.isinf: False,
    torch.Tensor.isfinite: True,
    torch.Tensor.isinf: False,
}
_ALL = {torch.all: True, torch.Tensor.all: True, torch.any: False, torch.Tensor.any: False}
_ASKED = {True: "all values are finite", False: "some value is not finite"}
_BOUND = (aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default)


class Finite(Answers):
    """Says that some of all values that are asked for are not finite; in the other trace, that all are."""

    def __init__(self, yes: bool) -> None:
        super().__init__(yes)
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and args[0] in self._known:
            self.asked += 1
            answer: bool = self._known[args[0]]
            mark(args[0], _ASKED[answer])
            return answer is not self.yes
        result = func(*args, **(kwargs or {}))
        if func in _EACH:
            self._known[result] = _EACH[func]
        elif func in _ALL and len(args) == 1 and self._known.get(args[0]) is _ALL[func]:
            self._known[result] = _ALL[func]
        return result


def selected(program: Program, other: Program) -> bool:
    """Make what was traced as if some values were not finite select: each bounded value only where its own are not.
    `other` was traced as if all were. False, and nothing changed, where more than bounding hangs on the answers."""
    bounded: dict[fx.Node, fx.Node] = {}
    for one in marks(program, _ASKED.values()):
        value = _asked_of(one)
        found = [user for user in value.users if is_call(user, *_BOUND) and one < user]
        if len(found) != 1:
            return False
        bounded[found[0]] = one
    if not alike(program, other, {node: _asked_of(one) for node, one in bounded.items()}):
        return False
    for node, asked in bounded.items():
        whole, value = asked.args[0], _asked_of(asked)
        sides = (value, node) if asked.args[1] == _ASKED[True] else (node, value)
        with program.graph.inserting_after(node):
            one = program.graph.call_function(aten.where.self, (whole, *sides))
        one.meta.update(node.meta)
        for user in [*node.users]:
            if user is not one:
                user.replace_input_with(node, one)
        program.graph.erase_node(asked)
    return True


def _asked_of(mark: fx.Node) -> fx.Node:
    """h of `isfinite(h).all()`."""
    whole: Any = mark.args[0]
    value: fx.Node = whole.args[0].args[0]
    return value
