"""Answers: what is said, while a model is traced, to code that asks for values, which a trace has not."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import fx
from torch.overrides import TorchFunctionMode

from peftc.graph.program import Program, aten

_MARK = aten._assert_async.msg


class Answers(TorchFunctionMode):
    """Says `yes`, or no. `asked` counts; `odd`: something was asked that no second trace can settle."""

    def __init__(self, yes: bool) -> None:
        super().__init__()
        self.yes, self.asked, self.odd = yes, 0, False


def mark(asked: torch.Tensor, says: str) -> None:
    """Leave in a graph what was asked for, until `marks` are settled and erased."""
    _MARK(asked, says)


def marks(program: Program, says: Collection[str]) -> list[fx.Node]:
    """The marks that say one of these."""
    found = program.graph.find_nodes(op="call_function", target=_MARK)
    return [node for node in found if node.args[1] in says]
