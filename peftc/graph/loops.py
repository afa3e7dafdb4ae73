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
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.alike import alike
from peftc.graph.aten import operand
from peftc.graph.program import Program, aten, is_call

# What is known of a value: it counts a mask's rows, says which there are, names them; or it is the mask of one.
_COUNT, _CHOSEN, _PLACES, _ROW = "count", "chosen", "places", "row"
# (what makes a value, what its first argument is, or "" for the mask itself): what that is then
_MADE = {
    (torch.sum, ""): _COUNT,
    (torch.Tensor.sum, ""): _COUNT,
    (torch.gt, _COUNT): _CHOSEN,
    (torch.greater, _COUNT): _CHOSEN,
    (torch.Tensor.gt, _COUNT): _CHOSEN,
    (torch.Tensor.__gt__, _COUNT): _CHOSEN,
    (torch.nonzero, _CHOSEN): _PLACES,
    (torch.Tensor.nonzero, _CHOSEN): _PLACES,
    (torch.Tensor.__getitem__, ""): _ROW,
    (torch.Tensor.squeeze, _ROW): _ROW,
}
_FOUND = (torch.where, torch.nonzero, torch.Tensor.nonzero)
_JOINS = (
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_put.default,
    aten.index_put_.default,
)


class Loops(TorchFunctionMode):
    """While a model is traced, it goes through `all_` experts, or none. `met` says whether there was such a loop, and
    `other` whether one found rows by more than its mask."""

    def __init__(self, all_: bool) -> None:
        super().__init__()
        self.all, self.met, self.other = all_, False, False
        self._mask: torch.Tensor | None = None  # of the loop that runs
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
            self.other |= what != _ROW or mask is not self._mask
            torch._check(result[0].shape[0] > 0)  # type: ignore[no-untyped-call]  # in eager code
        elif isinstance(result, torch.Tensor) and (func, what) in _MADE:
            self._known[result] = _MADE[func, what], mask
        elif isinstance(result, torch.Tensor) and (func, "") in _MADE:
            self._known[result] = _MADE[func, ""], first
        return result

    def _each(self, places: torch.Tensor, mask: torch.Tensor) -> Iterator[torch.Tensor]:
        self.met, self._mask = True, mask
        try:
            for place in range(mask.shape[0] if self.all else 0):
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
