"""Parity: every output of an ONNX graph against torch on a grid of shapes, and the certificate of it."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
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
    """The difference of an output between ONNX Runtime and torch in float32 that came nearest to its bound, its largest
    value and the mean difference; and, of all that is a distribution, the mean KL in nats, and the share of positions
    with the same likeliest label or word. `seconds` is what it took to find out."""

    graph: str
    cases: int
    error: float
    tolerance: float
    divergence: float = 0.0
    agreement: float = 1.0
    scale: float = 0.0
    mean: float = 0.0
    seconds: float = 0.0


def check(
    model: PreTrainedModel, graph: Graph, file: Path, precision: Precision, full: bool = False
) -> Parity:
    """A part of the grid, or the `full` one. Raises ExportError where an output is out of the bounds of `precision`,
    not finite or of another shape."""
    found, fault = compared(model, graph, file, precision, full)
    if fault:
        raise ExportError(fault)
    return found


def compared(
    model: PreTrainedModel, graph: Graph, file: Path, precision: Precision, full: bool
) -> tuple[Parity, str]:
    """What `check` finds, and what is wrong with it, or nothing. Raises ExportError where names or shapes
    differ.

    The bound is a share of the largest value that an output takes on the whole grid: one case may have small
    values alone.
    """
    start = time.perf_counter()
    reference = graph.reference or graph.program
    session, code = Session.open(file, providers_for(precision)), reference.code()
    asked = {graph.names[name] for name in graph.inputs} | {*graph.outputs.values()}
    odd = sorted(asked ^ {*session.inputs, *session.outputs})
    if odd:
        raise ExportError(f"{file} is of another model: only one of both has '{odd[0]}'")
    generator = torch.Generator().manual_seed(0)
    seen = {name: Compared() for name in graph.outputs}
    tried = cases(graph.cases, longest(model, "seq") - 8, full)
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
    found = _nearest(graph, seen, len(tried), precision)
    found = replace(found, seconds=round(time.perf_counter() - start, 2))
    return found, _fault(graph, seen, found, precision)


def _nearest(
    graph: Graph, seen: Mapping[str, Compared], tried: int, precision: Precision
) -> Parity:
    def near(one: Compared) -> float:
        ratio = one.error / (precision.share * one.scale or 1.0)
        return math.inf if math.isnan(ratio) else ratio

    divergence, agreement, _ = choices_of(seen.values())
    one = max(seen.values(), key=near)
    bound = precision.share * one.scale
    return Parity(graph.role, tried, one.error, bound, divergence, agreement, one.scale, one.mean)


def _fault(graph: Graph, seen: Mapping[str, Compared], found: Parity, precision: Precision) -> str:
    for ours, one in seen.items():
        bound = precision.share * one.scale
        if not one.error <= bound:  # true for nan
            return (
                f"{graph.role}: '{graph.outputs[ours]}' differs from torch by {one.error:.1e}, "
                f"more than {bound:.1e} ({precision.why}), at {one.worst}"
            )
    if found.divergence <= precision.divergence and found.agreement >= precision.agreement:
        return ""
    *_, positions = choices_of(seen.values())
    return (
        f"{graph.role}: in {precision.name} {found.agreement:.1%} of {positions} choices are torch's and the KL is "
        f"{found.divergence:.2g}; at least {precision.agreement:.0%} and at most {precision.divergence:g} are asked for"
    )
