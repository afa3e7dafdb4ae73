"""Layer drop: layers that training leaves out at random stand in a graph as what is not computed then (Fan et al. 2020).

`if torch.rand([]) < rate: continue` asks for a value, which a trace has not. It is told that no layer is left out, and
the draw stays in the graph; then it selects between what goes into the layer and what comes out of it, and what only
the latter needs is not run where the draw says so (`peftc.graph.code`): the numbers drawn are those of eager code, in
its order. That leaving out does nothing else is seen in a second trace, which is told that all are left out.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.alike import alike
from peftc.graph.answers import Answers, mark, marks
from peftc.graph.code import LEFT_OUT
from peftc.graph.program import Program, aten

# Comparisons of a draw, and whether they hold where nothing is left out: a draw is in [0, 1), the rate is 0 then.
_COMPARED = {
    torch.Tensor.__lt__: False,
    torch.Tensor.lt: False,
    torch.lt: False,
    torch.Tensor.__le__: False,
    torch.Tensor.le: False,
    torch.le: False,
    torch.Tensor.__gt__: True,
    torch.Tensor.gt: True,
    torch.gt: True,
    torch.Tensor.__ge__: True,
    torch.Tensor.ge: True,
    torch.ge: True,
}
_SAYS = {False: "a layer is left out", True: "a layer is kept"}


class Dropped(Answers):
    """Says that no draw leaves anything out; in the other trace, that all do."""

    def __init__(self, yes: bool) -> None:
        super().__init__(yes)
        self._known: Any = WeakTensorKeyDictionary()
        self._marked: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.__bool__ and isinstance(self._known.get(args[0]), bool):
            kept: bool = self._known[args[0]]
            if args[0] not in self._marked:  # code may ask before a layer and after it
                self.asked += 1
                self._marked[args[0]] = True
                mark(args[0], _SAYS[kept])
            return kept is self.yes
        result = func(*args, **(kwargs or {}))
        if func is torch.rand and result.ndim == 0:
            self._known[result] = "a draw"
        elif func in _COMPARED and self._known.get(args[0]) == "a draw":
            self._known[result] = _COMPARED[func]
        return result


def left_out(program: Program, other: Program) -> bool:
    """Make what was traced as if no layer were left out select. `other` was traced as if all were. False where more than
    the values of layers hangs on the draws."""
    asked = marks(program, _SAYS.values())
    chosen: dict[fx.Node, fx.Node] = {}
    for draw, end in zip(asked, [*asked[1:], None]):
        found = _through(draw, end)
        if found is None:
            return False
        before, after = found
        with program.graph.inserting_after(after):
            kept = draw.args[1] == _SAYS[True]
            sides = (after, before) if kept else (before, after)
            one = program.graph.call_function(aten.where.self, (draw.args[0], *sides))
        one.meta = {**after.meta, LEFT_OUT: sides.index(after) + 1}
        for user in [*after.users]:
            if user is not one:
                user.replace_input_with(after, one)
        chosen[one] = before
    for traced in (program, other):
        for one in marks(traced, _SAYS.values()):
            traced.graph.erase_node(one)
    return alike(program, other, chosen)


def _through(mark: fx.Node, end: fx.Node | None) -> tuple[fx.Node, fx.Node] | None:
    """What goes into the layer behind a mark, and what comes out of it: its last value, which others read."""
    layer = list[fx.Node]()
    key = None
    node = mark.next
    while node.op != "output" and node is not end:
        stack = [*node.meta.get("nn_module_stack", {})]
        outer = [*mark.prev.meta.get("nn_module_stack", {})]
        inside = stack[len(outer)] if len(stack) > len(outer) else None
        if inside is not None and key in (None, inside):
            key = inside
            layer.append(node)
        elif key is not None and inside is not None:
            break
        node = node.next
    mine = set(layer)
    given = [one for one in layer if _is_data(one) and any(user not in mine for user in one.users)]
    if len(given) != 1:
        return None
    (after,) = given
    for one in layer:
        for read in one.all_input_nodes:
            if read not in mine and _is_data(read) and _same(read, after):
                return read, after
    return None


def _is_data(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and node.op == "call_function"


def _same(one: fx.Node, other: fx.Node) -> bool:
    first, second = one.meta["val"], other.meta["val"]
    return bool(first.dtype == second.dtype and first.shape == second.shape)
