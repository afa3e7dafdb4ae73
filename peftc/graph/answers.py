"""Answers: what is said, while a model is traced, to code that asks for values, which a trace has not."""

from __future__ import annotations

from torch.overrides import TorchFunctionMode


class Answers(TorchFunctionMode):
    """Says `yes`, or no. `asked` counts; `odd`: something was asked that no second trace can settle."""

    def __init__(self, yes: bool) -> None:
        super().__init__()
        self.yes, self.asked, self.odd = yes, 0, False
