"""Packed: what autograd keeps of a training step for the way back, found by one run on fake tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode

from peftc.graph.program import Program
from peftc.model.running import run_program


@dataclass(frozen=True)
class Kept:
    """A storage of `size` bytes, and the node that was running when it was first kept."""

    node: fx.Node
    size: int


def packed(
    model: nn.Module, program: Program, inputs: Mapping[str, torch.Tensor]
) -> tuple[Kept, ...]:
    """Every storage that the graph saves for backward, once, in the order of the nodes: what
    `torch.autograd.graph.saved_tensors_hooks` sees, without the storages of parameters, buffers, deltas and inputs.

    No value is read: `model` may be hollow. Sizes and types are all that is used of the tensors.
    """
    walk = _Packing(program)
    run_program(model, program, inputs, walk.on_fakes)
    return tuple(walk.found.values())


class _Packing(fx.Interpreter):
    """Runs a Program and notes the storages that autograd packs, by their identity: each is held, so that no later
    one has its place."""

    def __init__(self, program: Program) -> None:
        super().__init__(program.root, graph=program.graph)
        self.program = program
        self.found: dict[int, Kept] = {}
        self._held: list[torch.Tensor] = []
        self._own: set[int] = set()
        self._now: fx.Node

    def on_fakes(self, *arguments: torch.Tensor) -> Any:
        """Run on what stands for `arguments`."""
        mode = FakeTensorMode(
            allow_non_fake_inputs=True
        )  # a graph may hold small tensors of its own
        fakes = [mode.from_tensor(one) for one in arguments]
        for slot, fake in zip(self.program.order(), fakes, strict=True):
            if slot.kind != "constant":
                self._own.add(_identity(fake))
        with mode, torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(self._pack, _back):
            return self.run(*fakes)

    def run_node(self, n: fx.Node) -> Any:
        self._now = n
        return super().run_node(n)

    def _pack(self, one: torch.Tensor) -> torch.Tensor:
        identity = _identity(one)
        if identity not in self._own and identity not in self.found:
            self._held.append(one)
            self.found[identity] = Kept(self._now, one.untyped_storage().nbytes())
        return one


def _identity(one: torch.Tensor) -> int:
    identity: int = one.untyped_storage()._cdata
    return identity


def _back(one: torch.Tensor) -> torch.Tensor:
    return one
