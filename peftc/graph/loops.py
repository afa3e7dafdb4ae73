"""Loops over the experts that tokens chose are, in a graph, loops over all of them.

`for one in (mask.sum((1, 2)) > 0).nonzero(): rows = where(mask[one]) ...` asks which were chosen, which a trace has not. It
is told that all were: of one that nobody chose no rows are found, and nothing is added or put. That the loop does nothing
else is seen in a second trace, which is told that none were (Switch Transformers, NLLB-MoE, LongCat-Flash).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.alike import alike
from peftc.graph.answers import Answers
from peftc.graph.aten import operand
from peftc.graph.program import Program, aten, is_call

# What is known of a value: how many rows of a mask are chosen for each of its places, for which places there are any, the
# numbers of these; or the mask of one.
_COUNT, _CHOSEN, _PLACES, _ROW = "count", "chosen", "places", "row"
_SUM = (torch.sum, torch.Tensor.sum)
_GREATER = (torch.gt, torch.greater, torch.Tensor.gt, torch.Tensor.greater, torch.Tensor.__gt__)
_NONZERO = (torch.nonzero, torch.Tensor.nonzero)
_FOUND = (torch.where, *_NONZERO)
_JOINS = (
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_put.default,
    aten.index_put_.default,
)


class Loops(Answers):
    """Goes through all experts; in the other trace, through none. A loop that finds rows by more than its mask is odd."""

    def __init__(self, yes: bool) -> None:
        super().__init__(yes)
        self._mask: torch.Tensor | None = None  # of the loop that runs
        self._place = 0  # where it is
        self._known: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        first = args[0] if args and isinstance(args[0], torch.Tensor) else None
        what, mask = ("", None) if first is None else self._known.get(first, ("", first))
        if func is torch.Tensor.unbind and what == _PLACES and mask is not None:  # by __iter__
            return self._each(args[0], mask)
        if func is torch.Tensor.__format__ and args[0].ndim == 0:
            return format(args[0].item(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _FOUND and isinstance(result, tuple) and self._mask is not None:
            self.odd |= what != _ROW or mask is not self._mask
            torch._check(result[0].shape[0] > 0)  # type: ignore[no-untyped-call]  # in eager code
        elif isinstance(result, torch.Tensor):
            made = self._made(func, what, args, kwargs or {})
            if made:
                self._known[result] = made, mask
        return result

    def _made(self, func: Any, what: str, args: Any, kwargs: Any) -> str:
        """What the result of a call is, of a value that is `what`."""
        given = kwargs.get("dim", args[1] if len(args) > 1 else None)
        if func in _SUM and not what:
            axes = {given} if isinstance(given, int) else {*(given or ())}
            whole = args[0].ndim
            return _COUNT if {axis % whole for axis in axes} == {*range(1, whole)} else ""
        if func in _GREATER and what == _COUNT:
            return _CHOSEN if given == 0 else ""
        if func in _NONZERO and what == _CHOSEN:
            return _PLACES
        if func is torch.Tensor.__getitem__ and not what and args[0] is self._mask:
            one = isinstance(given, int | torch.Tensor)
            return _ROW if one and int(given) == self._place else ""
        return _ROW if func is torch.Tensor.squeeze and what == _ROW else ""

    def _each(self, places: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        self.asked, self._mask = self.asked + 1, mask
        try:
            for place in range(mask.shape[0] if self.yes else 0):
                self._place = place
                yield torch.tensor([place], device=places.device)
        finally:
            self._mask = None


def rows_join(program: Program, other: Program) -> bool:
    """Whether all that the loops of a graph do is to add or put rows that they found; in `other` they do nothing."""
    joins: dict[fx.Node, fx.Node] = {}
    for node in program.graph.nodes:
        whole = operand(node, 0) if is_call(node, *_JOINS) else None
        if whole is not None and any(map(_is_found, node.all_input_nodes)):
            joins[node] = whole
    return alike(program, other, joins)


def _is_found(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and bool(free_unbacked_symbols(value))
