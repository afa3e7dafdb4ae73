"""The driver: the public functions, and the only module that knows the library of passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from transformers import PreTrainedModel

import passes
from peftc.graph.arguments import dummy_inputs, forward_flags, seeded_inputs
from peftc.graph.capture import capture
from peftc.graph.facts import Stacks
from peftc.graph.program import Program
from peftc.graph.state import Fingerprint, evaluating, fingerprint
from peftc.language.reader import load_spec
from peftc.language.spec import Spec, combine
from peftc.model import backbones
from peftc.model.compiled import CompiledModel, attach, bare_copy
from peftc.model.saving import check_backbone
from peftc.model.sharing import require_bare
from peftc.model.words import Activations
from peftc.plan.algebra import constant_form
from peftc.plan.budget import BudgetError, Solved, solve
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan, Survey, make_plan
from peftc.rewrite import tying, verify
from peftc.rewrite.folding import Folding, Report
from peftc.rewrite.pipeline import PassResult, Pipeline
from peftc.sites.site import Site, find_sites
from peftc.store import deltas as delta
from peftc.store.directory import DeltaError, read_manifest

SpecLike = Spec | str | Path | Sequence[Spec | str | Path]


@dataclass
class Trace:
    """What a compilation tells while it runs: results of passes, `after` each one its name and subject, and
    the model whose graphs are being rewritten, once there is one."""

    after: Callable[[str, object], None] | None = None
    results: list[PassResult] = field(default_factory=list)
    _model: ref[CompiledModel] | None = None

    @property
    def model(self) -> CompiledModel | None:
        """Not held: who deletes a compiled model gets its memory back, whoever has the trace."""
        return None if self._model is None else self._model()

    @model.setter
    def model(self, model: CompiledModel) -> None:
        self._model = ref(model)

    def run(self, schedule: Sequence[Any], subject: Any) -> None:
        self.results += Pipeline(verify.check, self.after).run(schedule, subject)


@dataclass(frozen=True)
class Rewrite:
    """What every captured graph of a compiled model goes through. Copies and pickles tell no trace."""

    edits: tuple[Edit, ...]
    trace: Trace

    def __call__(self, program: Program, dtypes: Mapping[str, torch.dtype]) -> None:
        self.trace.run(passes.train(self.edits, dtypes), program)

    def __reduce__(self) -> Any:
        return Rewrite, (self.edits, Trace())


def as_spec(spec: SpecLike) -> Spec:
    """A Spec from a shipped name, a path, a Spec, or a sequence of these that act as one."""
    if isinstance(spec, Spec):
        return spec
    if isinstance(spec, str | Path):
        return load_spec(spec)
    return combine([as_spec(one) for one in spec])


def plan(
    model: PreTrainedModel, spec: SpecLike, *, example: Mapping[str, torch.Tensor] | None = None
) -> Plan:
    """Decide what `spec` does to `model`, without changing anything. Works on the meta device too.

    `example` is one batch by argument name, needed only where the inputs cannot be guessed.
    Raises PlanError with every problem found.
    """
    return _plan(model, as_spec(spec), _captured(model, example, Trace()))


@dataclass(frozen=True)
class Captured:
    """The `forward` Program in evaluation mode that plans are made from, and what it was captured with."""

    program: Program
    inputs: Mapping[str, torch.Tensor]
    flags: Mapping[str, bool]
    seen: Fingerprint


def _captured(
    model: PreTrainedModel, example: Mapping[str, torch.Tensor] | None, trace: Trace
) -> Captured:
    inputs, flags = example or dummy_inputs(model), forward_flags(model)
    with evaluating(model):
        seen = fingerprint(model)
        program = capture(model, "forward", inputs, flags, seen=seen)
    trace.run((passes.Normalize(),), program)
    return Captured(program, inputs, flags, seen)


def _plan(model: PreTrainedModel, spec: Spec, captured: Captured) -> Plan:
    planner = _planner(model, captured)
    if spec.auto is not None and spec.budget is None:
        raise BudgetError(
            f"'{spec.auto}' of {spec.name} is auto: set it, or give the spec a budget"
        )
    made = solve(spec, spec.budget, planner).plan if spec.auto and spec.budget else planner(spec)
    made.room.require(model)
    return made


def _planner(model: PreTrainedModel, captured: Captured) -> Callable[[Spec], Plan]:
    backbone = {path: tuple(weight.shape) for path, weight in model.named_parameters()}
    found = Survey.of(captured.program, Stacks.read(model))
    return lambda spec: make_plan(spec, found, backbone)


def plans(model: PreTrainedModel, specs: Sequence[SpecLike]) -> list[Plan]:
    """`plan` for several specs, each on its own; the model is traced once."""
    planner = _planner(model, _captured(model, None, Trace()))
    return [planner(as_spec(spec)) for spec in specs]


def within(model: PreTrainedModel, specs: Sequence[Spec], budget: str) -> list[Solved]:
    """Each spec at the largest size that the budget allows. Works on the meta device."""
    planner = _planner(model, _captured(model, None, Trace()))
    return [solve(spec, budget, planner) for spec in specs]


def survey(
    model: PreTrainedModel, *, example: Mapping[str, torch.Tensor] | None = None
) -> tuple[Site, ...]:
    """Every site of a model, in the order of the kinds of sites. Works on the meta device."""
    program = _captured(model, example, Trace()).program
    return find_sites(program, Stacks.read(model))


def compile(  # the name that users of torch expect
    model: PreTrainedModel,
    spec: SpecLike,
    *,
    example: Mapping[str, torch.Tensor] | None = None,
    trace: Trace | None = None,
) -> CompiledModel:
    """A model of the same class whose forward runs graphs with the deltas of `spec` inserted.

    Weights are shared with `model`, not copied, and frozen; `peftc.detach` gives the model back. Graphs
    are captured when an entry (forward, encode, prefill, decode) is first used.
    """
    require_bare(model)
    trace = trace or Trace()
    captured = _captured(model, example, trace)
    plan = _plan(model, as_spec(spec), captured)
    activations = Activations(model, captured.program)
    return _attach(model, plan, trace, captured=captured, activations=activations)


def _attach(
    model: PreTrainedModel,
    plan: Plan,
    trace: Trace,
    form: str = "training",
    captured: Captured | None = None,
    activations: Activations | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> CompiledModel:
    compiled = attach(model, plan, Rewrite(plan.edits, trace), form, activations, values)
    trace.model = compiled
    if captured is not None and not plan.room:  # rows in front change what is traced
        compiled.adopt(captured.program, captured.inputs, captured.flags, captured.seen)
    return compiled


def load(path: str | Path, backbone: PreTrainedModel | None = None) -> CompiledModel:
    """Deltas from disk on their backbone: the one given, or the one that their manifest names.

    Raises DeltaError when the directory is damaged or the backbone is another one.
    """
    path = Path(path)
    manifest = read_manifest(path)
    if backbone is None:
        backbone = _named_backbone(manifest)
    require_bare(backbone)
    trace = Trace()
    captured = _captured(backbone, None, trace)
    plan = _restored_plan(manifest, _plan(backbone, delta.spec_of(manifest, path), captured))
    check_backbone(manifest, backbone, plan)
    weights = dict(backbone.named_parameters())
    unfrozen = {one.path: tuple(weights[one.path].shape) for one in plan.unfrozen}
    deltas = {p.path: p.shape for edit in plan.edits for p in edit.parameters}
    expected = {**{f"deltas.{path}": shape for path, shape in deltas.items()}, **unfrozen}
    tensors = delta.read_tensors(path, expected)
    values = {path: tensors[f"deltas.{path}"] for path in deltas}
    model = _attach(backbone, plan, trace, manifest["form"], captured, values=values)
    with torch.no_grad():
        for name in unfrozen:
            weights[name].copy_(tensors[name])
    return model


def _restored_plan(manifest: Mapping[str, Any], plan: Plan) -> Plan:
    """The plan in the form that was saved: constants evaluated, folded edits gone."""
    edits = plan.edits
    if manifest["form"] == "stored":
        edits = tuple(constant_form(edit) for edit in edits)
    left = set(manifest["edits"])
    return replace(plan, edits=tuple(edit for edit in edits if edit.name in left))


def _named_backbone(manifest: Mapping[str, Any]) -> PreTrainedModel:
    named = manifest["backbone"]
    if not named["name"]:
        raise DeltaError(f"the deltas name no backbone ({named['class']}); pass backbone=model")
    return backbones.resolve(named["name"], cls=named["class"], settings=named.get("labels"))


def merge(model: CompiledModel, *, trace: Trace | None = None) -> tuple[PreTrainedModel, Report]:
    """Fold what algebra can fold into a copy of the backbone, in float64, cast once.

    Returns a plain Hugging Face model when everything folded; otherwise a compiled model with what is
    left over the folded backbone. The report names every delta, and what kept it if it stayed. Unfolded
    and folded are compared on a seeded batch.
    """
    trace = trace or Trace()
    backbone, folding = fold(model, trace, tying.separable)
    apart = folding.weights.keys() & folding.tied
    if apart:
        tying.untie(backbone)
    weights = dict(backbone.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for path, weight in folding.weights.items():
            weights[path].copy_(weight)
    merged: PreTrainedModel = backbone.train(model.training)
    if folding.edits:
        edits = tying.anchored(folding.edits, folding.separable if apart else frozenset())
        left = replace(model.plan, edits=edits)
        merged = _attach(backbone, left, trace, "stored", values=folding.tensors)
    return merged, _report(model, merged, folding)


def fold(
    model: CompiledModel,
    trace: Trace,
    separable: Callable[[PreTrainedModel], frozenset[str]] = lambda _: frozenset(),
) -> tuple[PreTrainedModel, Folding]:
    """A copy of the backbone as it is, and its weights with what folds, in float64.

    `separable` says which tied paths may get a weight of their own.
    """
    backbone = bare_copy(model)
    edits, tied = list(model.plan.edits), tying.tied(backbone)
    concerned = any(edit.site.anchors.get("W") in tied for edit in edits)
    folding = Folding(
        edits,
        dict(model.deltas.values()),
        backbone.get_parameter,
        tied,
        separable(backbone) if concerned else frozenset(),
    )
    trace.run(passes.FOLD, folding)
    return backbone, folding


def _report(model: CompiledModel, merged: PreTrainedModel, folding: Folding) -> Report:
    inputs = seeded_inputs(model)
    before, after = outputs(model, inputs), outputs(merged, inputs)
    bare = outputs(model.backbone, inputs)
    return Report(
        tuple(folding.outcomes),
        error=verify.difference(before, after),
        scale=verify.magnitude(before),
        changed=verify.difference(before, bare),
    )


def outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output tensors in evaluation mode, without a cache."""
    flags = forward_flags(model)
    with evaluating(model), torch.no_grad():
        fields = model(**inputs, **flags)
    return {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
