"""Parity: every output of an ONNX graph against torch on a grid of shapes, and the certificate of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from peftc.export.graph import ExportError, Graph, longest
from peftc.export.precision import Precision, providers_for
from peftc.graph.grid import cases, real
from peftc.rewrite.compared import CHOICES, Compared, choices_of
from peftc.runtime.session import Session


@dataclass(frozen=True)
class Parity:
    """The difference of an output between ONNX Runtime and torch in float32 that came nearest to its bound, its largest value and the mean difference; and, of all
    that is a distribution, the mean KL in nats, and the share of positions with the same likeliest label or word."""

    graph: str
    cases: int
    error: float
    tolerance: float
    divergence: float = 0.0
    agreement: float = 1.0
    scale: float = 0.0
    mean: float = 0.0


def check(model: PreTrainedModel, graph: Graph, file: Path, precision: Precision) -> Parity:
    """Raises ExportError where an output is out of the bounds of `precision`, not finite or of another shape.

    The bound is a share of the largest value that an output takes on the whole grid: one case may have small
    values alone.
    """
    reference = graph.reference or graph.program
    session, code = Session.open(file, providers_for(precision)), reference.code()
    generator = torch.Generator().manual_seed(0)
    seen = {name: Compared() for name in graph.outputs}
    tried = list(cases(graph.cases, longest(model, "seq") - 8))
    for case in tried:
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
            left, right = (real(tensor, mask, axis) for tensor in (one, other))
            seen[ours].see(left, right, case, ours in CHOICES)
    return _verdict(graph, seen, len(tried), precision)


def _verdict(
    graph: Graph, seen: Mapping[str, Compared], tried: int, precision: Precision
) -> Parity:
    divergence, agreement, positions = choices_of(seen.values())
    nearest = Parity(graph.role, tried, 0.0, 0.0)
    for ours, one in seen.items():
        bound = precision.share * one.scale
        if not one.error <= bound:  # true for nan
            raise ExportError(
                f"{graph.role}: '{graph.outputs[ours]}' differs from torch by {one.error:.1e}, "
                f"more than {bound:.1e} ({precision.why}), at {one.worst}"
            )
        found = Parity(
            graph.role, tried, one.error, bound, divergence, agreement, one.scale, one.mean
        )
        nearest = max(nearest, found, key=lambda p: p.error / (p.tolerance or 1.0))
    if not (divergence <= precision.divergence and agreement >= precision.agreement):
        raise ExportError(
            f"{graph.role}: in {precision.name} {agreement:.1%} of {positions} choices are torch's and the KL is "
            f"{divergence:.2g}; at least {precision.agreement:.0%} and at most {precision.divergence:g} are asked for"
        )
    return nearest if nearest.tolerance else found
