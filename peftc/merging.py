"""Merge: what algebra folds goes into a copy of the backbone, and numbers say that it still computes the same."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import NoReturn, TypeVar

import torch
from transformers import PreTrainedModel

import passes
from peftc.driver import Batch, Compiler, Trace, attached, outputs, sample
from peftc.errors import PeftcError
from peftc.graph.placement import is_placed
from peftc.graph.quantized import (
    backbone_bytes,
    dequantized,
    open_up,
    quantized,
    require_straight,
)
from peftc.model.compiled import CompiledModel, bare_copy
from peftc.model.sets import Made
from peftc.plan import left
from peftc.plan.edit import Edit
from peftc.plan.sets import apart
from peftc.rewrite import tying, verify
from peftc.rewrite.folding import Folding, Report, rounded
from peftc.rewrite.tolerance import tolerance as rounding
from peftc.rewrite.widths import Shapes, refit, refitted

Model = TypeVar("Model", bound=PreTrainedModel)


class MergeError(PeftcError):
    """A fold after which the model would compute something else."""


def merge(
    model: CompiledModel,
    *,
    tolerance: float | None = None,
    example: Batch | None = None,
    trace: Trace | None = None,
    dequantize: bool = False,
    shares: bool = False,
) -> tuple[PreTrainedModel, Report]:
    """Fold what algebra can fold of the deltas of `model` into a copy of its backbone, in float64, cast once.

    Returns a plain Hugging Face model when everything folded; otherwise a compiled model with what is
    left over the folded backbone. The report names every delta, and what kept it if it stayed. Unfolded
    and folded are compared on a seeded batch (`example`, where inputs cannot be guessed): raises MergeError
    when an output moves by more than `tolerance` of the largest one; without it, by more than rounding
    (`peftc.rewrite.tolerance`). `model` stays as it is; `trace` is told what the passes did.

    A quantised weight holds no sum with a delta. MergeError says so; with `dequantize`, each that something folds into
    becomes an ordinary one, and the report's `held` tells the bytes that this takes. Weights that nothing folds into
    are copied, but where the result `shares` them: then neither of both models may be changed in place.
    """
    if is_placed(model.backbone):
        raise MergeError(
            f"{type(model).__name__}: its weights are elsewhere until a module runs; save the deltas, and merge them "
            "into the backbone as you load it without a device_map"
        )
    trace = trace or Trace()
    backbone, folding = fold(model, trace, tying.separable, refitted, shares=shares)
    untied = folding.weights.keys() & folding.tied
    if untied:
        tying.untie(backbone)
    small = quantized(backbone).keys() & folding.weights.keys()
    if small and not dequantize:
        _refuse(backbone, sorted(small))
    require_straight(backbone, small)
    open_up(backbone, small)
    quantizer = getattr(backbone, "hf_quantizer", None)
    if quantizer is not None and not quantized(backbone):
        quantizer.remove_quantization_config(backbone)
    if folding.like is not None:
        refit(backbone, folding.like, folding.weights)
    weights = dict(backbone.named_parameters(remove_duplicate=False))
    # Memory of its own, whatever the old one was shared with.
    for path, weight in folding.weights.items():
        weights[path].data = weight.to(weights[path].device).contiguous()
    merged: PreTrainedModel = backbone.train(model.training)
    if folding.edits:
        edits = tying.anchored(folding.edits, folding.separable if untied else frozenset())
        merged = _rest(
            model, backbone, edits, folding, Compiler(trace, example=example or model.example)
        )
    held = backbone_bytes(model.backbone), backbone_bytes(merged)
    report = _report(model, merged, folding, sample(model, example), held)
    limit = rounding(report.scale, model.dtype) if tolerance is None else tolerance * report.scale
    if tolerance is None and not report.error <= limit and model.dtype == torch.float32:
        # Float32 may round more than this in a model of large activations; a wrong fold is as wrong in float64.
        in_full = wide(model)
        inputs = sample(in_full, example)
        report = _report(in_full, wide(merged), folding, inputs, held)
        once = outputs(model, sample(model, example))
        own = verify.difference(outputs(in_full, inputs), once)
        if limit < report.error <= own:
            # Folded weights, rounded once, do to it what its own float32 does; before that they are right.
            merge(in_full, example=example, dequantize=dequantize)
            limit = own
    _require_equal(report, limit)
    return merged, report


def _refuse(backbone: PreTrainedModel, paths: Sequence[str]) -> NoReturn:
    kind = type(backbone.get_parameter(paths[0])).__name__
    raise MergeError(
        f"{type(backbone).__name__}: '{paths[0]}' ({len(paths)} in all) is quantised ({kind}), and its whole numbers do "
        "not hold a sum with a delta; keep the deltas apart, or merge(dequantize=True), --dequantize, makes ordinary "
        "weights of what they fold into"
    )


def _rest(
    model: CompiledModel,
    backbone: PreTrainedModel,
    edits: Sequence[Edit],
    folding: Folding,
    compiler: Compiler,
) -> CompiledModel:
    """What did not fold, on the folded backbone, in the sets that it is of."""
    plans = model.parts()
    several = zip(plans.items(), apart(list(plans.values()), edits), strict=True)
    (name, first), *others = [
        (name, Made(left.keep(plan, mine), "stored", values=folding.tensors))
        for (name, plan), mine in several
        if mine
    ]
    rest = attached(backbone, first, compiler, name)
    for other, made in others:
        rest.include(other, made)
    rest.use(rest.delta_sets)
    return rest


def _require_equal(report: Report, bound: float) -> None:
    if report.error != 0 and not report.error <= bound:  # true for nan
        raise MergeError(
            f"folding moved the outputs by {report.error:.3g} of {report.scale:.3g}, more than {bound:.1e}: "
            "keep the deltas apart; if this much is known to be rounding, merge(tolerance=...) takes more"
        )


def fold(
    model: CompiledModel,
    trace: Trace,
    separable: Callable[[PreTrainedModel], frozenset[str]] = lambda _: frozenset(),
    refitted: Callable[[PreTrainedModel, Shapes], PreTrainedModel | None] | None = None,
    as_stored: Callable[[torch.Tensor, torch.Tensor], torch.Tensor] = rounded,
    shares: bool = False,
) -> tuple[PreTrainedModel, Folding]:
    """A copy of the backbone as it is, and the folding of the deltas into its weights.

    `separable` says which tied paths may get a weight of their own, `refitted` gives a model that has parameters of
    other shapes, `as_stored(stored, folded)` what is kept of a folded weight, which is float64; the copy `shares` the
    weights. Raises MergeError where a delta holds infinities or no numbers.
    """
    slots = model.deltas.values()
    values = {path: slots[path] for path in model.plan.tensors}
    odd = [path for path, value in values.items() if not torch.isfinite(value).all()]
    if odd:
        raise MergeError(f"delta '{odd[0]}' holds numbers that are not finite; train it again")
    backbone = bare_copy(model, shares)
    edits, tied = list(model.plan.edits), tying.tied(backbone)
    concerned = any(
        "W" in edit.site.weights and edit.site.weights["W"].path in tied for edit in edits
    )
    # A tied weight that trains is one weight: apart, the spec would unfreeze another of the two.
    trains = any(one.path in tied for one in model.plan.unfrozen)
    folding = Folding(
        edits,
        values,
        lambda path: dequantized(backbone.get_parameter(path)),
        tied,
        separable(backbone) if concerned and not trains else frozenset(),
        as_stored,
        None if refitted is None else partial(refitted, backbone),
    )
    trace.run(passes.FOLD, folding)
    return backbone, folding


def wide(model: Model) -> Model:
    """A copy in float64, on the CPU: not every device has that."""
    made: Model = copy.deepcopy(model).cpu()
    open_up(made)
    if isinstance(made, CompiledModel):  # whose backbone has modules of its own
        open_up(made.backbone)
    return made.double()


def _report(
    model: CompiledModel,
    merged: PreTrainedModel,
    folding: Folding,
    inputs: Batch,
    held: tuple[int, int],
) -> Report:
    start = time.perf_counter()
    before, after = outputs(model, inputs), outputs(merged, inputs)
    bare = outputs(model.backbone, inputs)
    return Report(
        folding.outcomes(model.plan.edits),
        error=verify.difference(before, after),
        scale=verify.magnitude(before),
        changed=verify.difference(before, bare),
        held=held,
        seconds=time.perf_counter() - start,
    )
