"""Parity: every output of an ONNX graph against torch on a grid of shapes, and the certificate of it."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from peftc.export.graph import Case, ExportError, Graph, longest
from peftc.export.precision import Precision, providers_for
from peftc.runtime.session import Session

# The outputs that are distributions over their last axis.
CHOICES = ("logits", "start_logits", "end_logits")


@dataclass(frozen=True)
class Parity:
    """The difference of an output between ONNX Runtime and torch in float32 that came nearest to its bound; and, of all
    that is a distribution, the mean KL in nats, and the share of positions with the same likeliest label or word."""

    graph: str
    cases: int
    error: float
    tolerance: float
    divergence: float = 0.0
    agreement: float = 1.0


def grid(graph: Graph, most: int) -> Iterator[Case]:
    """Batch x lengths x padding; a single token has nothing to pad."""
    for rows, sizes in itertools.product((1, 3), graph.cases):
        if sizes[0] <= most:
            for padding in ("none", "left", "right") if sizes[0] > 2 else ("none",):
                yield Case(rows, *sizes, padding)


@dataclass
class _Output:
    """What the grid has shown of one output so far: its largest value, the largest difference and where, and of how many
    positions the likeliest is the same."""

    scale: float = 0.0
    error: float = 0.0
    worst: Case | None = None
    divergence: float = 0.0
    same: int = 0
    positions: int = 0

    def see(self, want: torch.Tensor, got: torch.Tensor, case: Case) -> None:
        if not want.numel():
            return
        self.scale = max(self.scale, want.abs().max().item())
        error = (want - got).abs().max().item()
        if not error <= self.error:  # true for nan
            self.error, self.worst = error, case

    def see_choices(self, want: torch.Tensor, got: torch.Tensor) -> None:
        """Of logits [..., labels or words]."""
        left, right = want.double().log_softmax(-1), got.double().log_softmax(-1)
        self.divergence += (left.exp() * (left - right)).sum().item()
        self.same += int((left.argmax(-1) == right.argmax(-1)).sum())
        self.positions += left[..., 0].numel()


def check(model: PreTrainedModel, graph: Graph, file: Path, precision: Precision) -> Parity:
    """Raises ExportError where an output is out of the bounds of `precision`, not finite or of another shape.

    The bound is a share of the largest value that an output takes on the whole grid: one case may have small
    values alone.
    """
    reference = graph.reference or graph.program
    session, code = Session.open(file, providers_for(precision)), reference.code()
    generator = torch.Generator().manual_seed(0)
    seen = {name: _Output() for name in graph.outputs}
    cases = list(grid(graph, longest(model, "seq") - 8))
    for case in cases:
        tokens = graph.feeds(case, generator)
        inputs = graph.full(tokens)
        with torch.no_grad():
            given = inputs if graph.reference is None else tokens
            want = graph.fields(model, reference, given, code)
        got = session.run_as_it_is({graph.names[name]: value for name, value in inputs.items()})
        for ours, theirs in graph.outputs.items():
            one, other = want[ours], got[theirs]
            if graph.reference is not None and ours in graph.rows:
                other = other[:, :, other.shape[2] - one.shape[2] :]
            if one.shape != other.shape:
                raise ExportError(
                    f"{graph.role}: '{theirs}' is {list(other.shape)}, in torch "
                    f"{list(one.shape)}, at {case}"
                )
            mask, axis = tokens.get("attention_mask"), graph.padded.get(ours)
            left, right = (_real(tensor, mask, axis) for tensor in (one, other))
            seen[ours].see(left, right, case)
            if ours in CHOICES:
                seen[ours].see_choices(left, right)
    return _verdict(graph, seen, len(cases), precision)


def _verdict(graph: Graph, seen: Mapping[str, _Output], cases: int, precision: Precision) -> Parity:
    chosen = [seen[name] for name in CHOICES if name in seen]
    positions = sum(one.positions for one in chosen) or 1
    divergence = sum(one.divergence for one in chosen) / positions
    agreement = sum(one.same for one in chosen) / positions if chosen else 1.0
    nearest = Parity(graph.role, cases, 0.0, 0.0)
    for ours, one in seen.items():
        bound = precision.share * one.scale
        if not one.error <= bound:  # true for nan
            raise ExportError(
                f"{graph.role}: '{graph.outputs[ours]}' differs from torch by {one.error:.1e}, "
                f"more than {bound:.1e} ({precision.why}), at {one.worst}"
            )
        found = Parity(graph.role, cases, one.error, bound, divergence, agreement)
        nearest = max(nearest, found, key=lambda p: p.error / (p.tolerance or 1.0))
    if not (divergence <= precision.divergence and agreement >= precision.agreement):
        raise ExportError(
            f"{graph.role}: in {precision.name} {agreement:.1%} of {positions} choices are torch's and the KL is "
            f"{divergence:.2g}; at least {precision.agreement:.0%} and at most {precision.divergence:g} are asked for"
        )
    return nearest if nearest.tolerance else found


def _real(value: torch.Tensor, mask: torch.Tensor | None, axis: int | None) -> torch.Tensor:
    """`value` where `mask` [batch, length] is set along `axis`, from the end on: the rows in front are no padding."""
    if axis is None or mask is None:
        return value
    size = value.shape[axis]
    mask = functional.pad(mask, (max(size - mask.shape[1], 0), 0), value=1).bool()
    return value.movedim(axis, 1)[mask[:, mask.shape[1] - size :]]
