"""Parity: every output of an ONNX graph against torch on a grid of shapes, and the certificate of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from peftc.export.graph import ExportError, Graph, longest
from peftc.model.compiled import run_program
from peftc.rewrite.tolerance import tolerance
from peftc.runtime.session import Session

LENGTHS = (1, 7, 33)
# (past, query) lengths of a decoder; a classifier and an encoder have neither.
STEPS = ((0, 1), (0, 3), (5, 1), (5, 3))


@dataclass(frozen=True)
class Parity:
    """The difference of an output between ONNX Runtime and torch that came nearest to its bound."""

    graph: str
    cases: int
    error: float
    tolerance: float


@dataclass(frozen=True)
class Case:
    """Sizes of one batch; `padding` is none, left or right and reaches into the first row."""

    rows: int
    length: int
    padding: str
    past: int
    query: int

    def mask(self) -> torch.Tensor:
        mask = torch.ones(self.rows, self.length, dtype=torch.long)
        if self.padding != "none":
            mask[0, slice(0, 2) if self.padding == "left" else slice(-2, None)] = 0
        return mask


def grid(graph: Graph, most: int) -> Iterator[Case]:
    """Batch x length x padding x step; a single token has nothing to pad."""
    steps = STEPS if any(name.startswith("past.self") for name in graph.inputs) else ((0, 0),)
    for rows, length, step in itertools.product((1, 3), LENGTHS, steps):
        if length <= most:
            for padding in ("none", "left", "right") if length > 2 else ("none",):
                yield Case(rows, length, padding, *step)


def check(model: PreTrainedModel, graph: Graph, file: Path) -> Parity:
    """Raises ExportError where an output is out of bounds, not finite or of another shape."""
    session = Session.open(file)
    generator = torch.Generator().manual_seed(0)
    cases, found = 0, (0.0, tolerance(1.0))
    for case in grid(graph, longest(model, "seq") - 8):
        inputs = _inputs(graph, case, generator)
        with torch.no_grad():
            want = run_program(model, graph.program, inputs)
        got = session.run({graph.names[name]: value for name, value in inputs.items()})
        for ours, theirs in graph.outputs.items():
            error, bound = _compare(want[ours], got[theirs], ours, inputs["attention_mask"])
            if not error <= bound:  # true for nan
                raise ExportError(
                    f"{graph.role}: '{theirs}' differs from torch by {error:.1e}, "
                    f"more than {bound:.1e}, at {case}"
                )
            found = max(found, (error, bound), key=lambda one: one[0] / (one[1] or 1.0))
        cases += 1
    return Parity(graph.role, cases, *found)


def _inputs(graph: Graph, case: Case, generator: torch.Generator) -> dict[str, torch.Tensor]:
    return {
        name: _input(name, real, case, graph.held[name], generator)
        for name, real in graph.inputs.items()
    }


def _input(
    name: str, real: torch.Tensor, case: Case, held: int, generator: torch.Generator
) -> torch.Tensor:
    """Values like those of `real`, in the sizes of `case`; `held` are rows in front."""
    if name == "attention_mask":
        return case.mask()
    if name == "token_type_ids":
        return (torch.arange(case.length) * 2 // case.length).repeat(case.rows, 1)
    if name.startswith("past."):
        length = held + (case.length if ".cross." in name else case.past)
        shape = (case.rows, real.shape[1], length, real.shape[3])
        return torch.randn(shape, generator=generator, dtype=real.dtype)
    pool = real.reshape(-1)
    size = (case.rows, case.length if name == "input_ids" else case.query)
    return pool[torch.randint(0, len(pool), size, generator=generator)]


def _compare(
    want: torch.Tensor, got: torch.Tensor, name: str, mask: torch.Tensor
) -> tuple[float, float]:
    """The largest difference and its bound; what stands at padding is no one's business."""
    if want.shape != got.shape:
        return float("inf"), 0.0
    if name == "last_hidden_state" or ".cross." in name:  # the rows in front are no padding
        length = want.shape[1 if want.ndim == 3 else 2]
        mask = functional.pad(mask, (length - mask.shape[1], 0), value=1)
    if name == "last_hidden_state":
        want, got = want[mask.bool()], got[mask.bool()]
    elif ".cross." in name:
        keep = mask.bool()[:, None, :, None].expand_as(want)
        want, got = want[keep], got[keep]
    return (want - got).abs().max().item(), tolerance(want.abs().max().item())
