"""Loops over the experts that tokens chose are, in a graph, loops over all of them.

`for one in (counts > 0).nonzero(): ...` asks which were chosen, which a trace has not. It is told that all were. Of an
expert that nobody chose no rows are found then, and nothing is added: rows leave such a loop by being added or put to
places, in a graph that is taken (Switch Transformers, NLLB-MoE, LongCat-Flash).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.program import Program, aten, is_call

_FOUND = (torch.nonzero, torch.Tensor.nonzero, torch.where)
_JOINS = (
    aten.index_add.default,
    aten.index_add_.default,
    aten.index_put.default,
    aten.index_put_.default,
)


class Loops(TorchFunctionMode):
    """While a model is traced, it goes through all places of a vector where it would through those that are not zero.
    `met` says whether it did; what it finds by a mask meanwhile is not nothing, as in eager code."""

    def __init__(self) -> None:
        super().__init__()
        self.met = self._inside = False
        self._places: Any = WeakTensorKeyDictionary()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.Tensor.unbind and args[0] in self._places:  # by Tensor.__iter__
            return self._each(args[0])
        if func is torch.Tensor.__format__ and args[0].ndim == 0:
            return format(args[0].item(), *args[1:])
        result = func(*args, **(kwargs or {}))
        if func in _FOUND and isinstance(result, tuple) and self._inside:
            torch._check(result[0].shape[0] > 0)  # type: ignore[no-untyped-call]
        elif func in _FOUND and isinstance(result, torch.Tensor) and args[0].ndim == 1:
            self._places[result] = args[0].shape[0]
        return result

    def _each(self, found: torch.Tensor) -> Iterator[torch.Tensor]:
        self.met = self._inside = True
        try:
            for place in range(self._places[found]):
                yield torch.tensor([place], device=found.device)
        finally:
            self._inside = False


def rows_join(program: Program) -> bool:
    """Whether rows that were found, of which there may be none, reach other values by being added or put to places."""
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor) and not free_unbacked_symbols(value):
            read = (one.meta.get("val") for one in node.all_input_nodes)
            found = any(
                isinstance(one, torch.Tensor) and free_unbacked_symbols(one) for one in read
            )
            if found and not is_call(node, *_JOINS):
                return False
    return True
