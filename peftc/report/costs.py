"""Costs: kernels and FLOPs of a forward, bytes that a training step saves, before and after; nothing is computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from passes import Normalize
from peftc import driver
from peftc.errors import PeftcError
from peftc.graph.arguments import dummy_inputs, forward_flags, resized
from peftc.graph.call import Call
from peftc.graph.capture import capture
from peftc.graph.facts import ModelFacts
from peftc.graph.program import Program
from peftc.language.reader import parse_spec
from peftc.model.hollow import hollow
from peftc.model.running import run_program
from peftc.report.subject import Subject
from peftc.rewrite.constants import alone
from peftc.saved import saved

Sizes = Sequence[int]
# Moves nothing and is no view by its schema.
_FREE = ("aten._unsafe_view.default", "aten.detach.default", "aten._reshape_alias.default")


@dataclass(frozen=True)
class Costs:
    """Of a batch of `rows`, each of `length` tokens (None for a model that reads none): of a forward in evaluation
    kernels (what is dispatched and is no view) and FLOPs, of a training step bytes that are saved for backward; each
    (before, after). Before, all of the backbone trains. `why` some are missing, where they are."""

    rows: int
    length: int | None
    kernels: tuple[int, int] | None = None
    flops: tuple[int, int] | None = None
    saved: tuple[int, int] | None = None
    why: str = ""


def costs(subject: Subject, rows: int, length: int) -> Costs:
    """`length` is cut to what the model has positions for."""
    bare = hollow(subject.bare, torch.device("cpu"))
    facts = ModelFacts.read(bare)
    reads = facts.main_input == "input_ids" or facts.encoder_decoder
    longest = None if facts.longest is None else subject.plan.room.longest(facts.longest)
    tokens = None if not reads else min(length, longest or length)
    found = Costs(rows, tokens)
    try:
        inputs = _inputs(bare, rows, tokens)
        before = _forward(bare, _own(bare, inputs), inputs)
        after = _as_it_runs(subject, inputs) or before
        kernels, flops = (before[0], after[0]), (before[1], after[1])
        found = Costs(rows, tokens, kernels, flops)
        trained, mine = (
            saved(subject.bare, one, rows, tokens).bytes for one in (_all(bare), subject.specs)
        )
        return Costs(rows, tokens, kernels, flops, (trained, mine))
    except (PeftcError, DataDependentOutputException, DynamicOutputShapeException) as error:
        return Costs(rows, tokens, found.kernels, found.flops, why=str(error))


def _as_it_runs(subject: Subject, inputs: Mapping[str, torch.Tensor]) -> tuple[int, int] | None:
    """(kernels, FLOPs) with the deltas that are not folded; None where none are left."""
    spec, model = subject.plan.spec, subject.model
    gone = {
        index
        for index in range(len(spec.entries))
        if (mine := [one for key, one in subject.outcomes.items() if key[0] == index])
        and all(one.folded for one in mine)
    }
    left = tuple(one for index, one in enumerate(spec.entries) if index not in gone)
    if not left:
        return None
    if gone:
        model = driver.compile(
            hollow(subject.bare, subject.bare.device), replace(spec, entries=left)
        )
    model = hollow(model, torch.device("cpu"))
    return _forward(model, model.lean_program(inputs), inputs)


def _inputs(model: Any, rows: int, length: int | None) -> dict[str, torch.Tensor]:
    inputs = dummy_inputs(model)
    labels = Call.of(model, "forward", inputs).labels
    sizes = {"batch": rows, "seq": length or 0, "target": length or 0}
    return {name: resized(one, labels[name], sizes) for name, one in inputs.items()}


def _own(model: Any, inputs: Mapping[str, torch.Tensor]) -> Program:
    """The model's own code for these inputs, with masks where it makes some."""
    call, flags = Call.of(model, "forward", inputs), forward_flags(model)
    program = capture(model, call, flags, drop=call.unpadded)
    outside = {
        call.labels[one.name][one.axis]
        for one in program.bounds
        if not one.least <= inputs[one.name].shape[one.axis] <= one.most
    }
    if exact := frozenset(label for label in outside if label):  # code that counts by a size
        program = capture(model, call, flags, drop=call.unpadded, exact=exact)
    Normalize().run(program)
    return program


def _all(model: nn.Module) -> Any:
    """The spec of fine-tuning, by the last name of each parameter."""
    names = sorted({path.rpartition(".")[2] for path, _ in model.named_parameters()})
    return parse_spec(f"deltas:\n  - train: [{', '.join(names)}]", "fine-tuning")


def _forward(
    model: nn.Module, program: Program, inputs: Mapping[str, torch.Tensor]
) -> tuple[int, int]:
    """(kernels, FLOPs) of a graph, by one run on fake tensors. What it computes of parameters alone is computed once, and
    not counted."""
    kernels = _Kernels()
    flops = FlopCounterMode(display=False, custom_mapping={_ON_CPU: _attention})
    interpreter = _Counting(program, kernels, flops)

    def on_fakes(*arguments: torch.Tensor) -> Any:
        mode = FakeTensorMode(allow_non_fake_inputs=True)
        fakes = [mode.from_tensor(one) for one in arguments]
        with mode, torch.no_grad(), flops, kernels:
            return interpreter.run(*fakes)

    run_program(model, program, inputs, on_fakes)
    return kernels.count, int(flops.get_total_flops()) - interpreter.free


class _Counting(fx.Interpreter):
    """Runs a Program; `free` are the FLOPs of what is computed once."""

    def __init__(self, program: Program, kernels: _Kernels, flops: FlopCounterMode) -> None:
        super().__init__(program.root, graph=program.graph)
        self.alone, self.free = alone(program), 0
        self.kernels, self.flops = kernels, flops

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or n not in self.alone:
            return super().run_node(n)
        before = self.kernels.count, self.flops.get_total_flops()
        value = super().run_node(n)
        self.kernels.count = before[0]
        self.free += int(self.flops.get_total_flops() - before[1])
        return value


# torch counts attention on every device but this one.
_ON_CPU = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def _attention(q: Sizes, k: Sizes, v: Sizes, *_: Any, **__: Any) -> int:
    """FLOPs of queries [batch, heads, queries, width] on keys and values: two products."""
    batch, heads, queries, width = q
    return 2 * batch * heads * queries * k[-2] * (width + v[-1])


class _Kernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts what is dispatched, without views."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten" and not (func.is_view or str(func) in _FREE):
            self.count += 1
        return func(*args, **(kwargs or {}))
