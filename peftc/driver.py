"""The driver: plan, compile and load, and what the other verbs are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from transformers import PreTrainedModel

import passes
from peftc.graph.arguments import dummy_inputs, forward_flags, seeded_inputs
from peftc.graph.call import Call
from peftc.graph.capture import capture, exclusive
from peftc.graph.facts import Stacks
from peftc.graph.program import Program
from peftc.graph.quantized import held_bytes, keep_as_stored, meant, quantized
from peftc.graph.state import Fingerprint, evaluating, fingerprint
from peftc.language.reader import load_spec
from peftc.language.spec import Spec, combine
from peftc.model import backbones
from peftc.model.compiled import CompiledModel, attach
from peftc.model.saving import check_backbone
from peftc.model.sets import Made, below, require_name
from peftc.model.sharing import require_bare
from peftc.model.words import Activations
from peftc.plan import left
from peftc.plan.algebra import constant_form
from peftc.plan.budget import BudgetError, Solved, solve
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan, make_plan
from peftc.plan.sets import together, under
from peftc.rewrite import verify
from peftc.rewrite.pipeline import PassResult, Pipeline
from peftc.sites.kinds import Survey
from peftc.sites.site import Site
from peftc.store import deltas as delta
from peftc.store.deltas import DEFAULT
from peftc.store.directory import MANIFEST, DeltaError

Batch = Mapping[str, torch.Tensor]
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
    """What every captured graph of a compiled model goes through; those that run here are made `lean` too, by the
    passes of LEAN but those `without` which they should be. Copies and pickles tell no trace."""

    edits: tuple[Edit, ...]
    trace: Trace
    without: frozenset[str] = frozenset()

    def __call__(self, program: Program, dtypes: Mapping[str, torch.dtype], lean: bool) -> None:
        more: list[Any] = [one for one in passes.LEAN if lean and one.name not in self.without]
        more += [passes.Quantized()] if program.quantized else []
        self.trace.run((*passes.train(self.edits, dtypes), *more), program)

    def __reduce__(self) -> Any:
        return Rewrite, (self.edits, Trace(), self.without)


def as_specs(spec: SpecLike) -> tuple[Spec, ...]:
    """The Specs of a shipped name, a path, a Spec, or a sequence of these that act as one."""
    if isinstance(spec, Spec):
        return (spec,)
    if isinstance(spec, str | Path):
        return (load_spec(spec),)
    return tuple(found for one in spec for found in as_specs(one))


@exclusive
def plan(model: PreTrainedModel, spec: SpecLike, *, example: Batch | None = None) -> Plan:
    """Decide what `spec` does to `model`, without changing anything. Works on the meta device too.

    `spec` is a shipped name, a path, a Spec, or several of these that act as one. `example` is one batch by argument
    name (ids and masks [batch, tokens]), needed only where the inputs cannot be guessed. Gives the edits, the misses
    with their reasons, and the counts of parameters, as numbers of elements. Raises SpecError with every problem of a
    spec, PlanError with every problem at this model, CaptureError where it cannot be traced, BudgetError.
    """
    return _plan(model, as_specs(spec), _captured(model, example, Trace()))


@dataclass(frozen=True)
class Captured:
    """The `forward` Program in evaluation mode that plans are made from, and what it was captured with."""

    program: Program
    inputs: Mapping[str, torch.Tensor]
    flags: Mapping[str, bool]
    seen: Fingerprint


def _captured(model: PreTrainedModel, example: Batch | None, trace: Trace) -> Captured:
    inputs, flags = example or dummy_inputs(model), forward_flags(model)
    with evaluating(model):
        seen = fingerprint(model)
        call = Call.of(model, "forward", inputs)
        program = capture(model, call, flags, seen=seen, drop=call.unpadded)
    trace.run((passes.Normalize(),), program)
    return Captured(program, inputs, flags, seen)


def _plan(model: PreTrainedModel, specs: Sequence[Spec], captured: Captured) -> Plan:
    made = _made(specs, _planner(model, captured))
    made.room.require(model)
    return made


def _made(specs: Sequence[Spec], planner: Callable[[Spec], Plan]) -> Plan:
    """The plan of several specs as one; each budget is of its own spec, so it is decided before they join."""
    return planner(combine([_decided(spec, planner) for spec in specs]))


def _decided(spec: Spec, planner: Callable[[Spec], Plan]) -> Spec:
    if spec.auto is None:
        return spec
    if spec.budget is None:
        raise BudgetError(
            f"'{spec.auto}' of {spec.name} is auto: set it, or give the spec a budget"
        )
    return solve(spec, spec.budget, planner).plan.spec


@exclusive
def planner(model: PreTrainedModel) -> Callable[[Spec], Plan]:
    """What plans a spec, one after another; the model is traced once. It checks no sizes of the model's cache."""
    return _planner(model, _captured(model, None, Trace()))


def _planner(model: PreTrainedModel, captured: Captured) -> Callable[[Spec], Plan]:
    backbone = {path: tuple(meant(weight)[0]) for path, weight in model.named_parameters()}
    small = {path: held_bytes(weight) for path, weight in quantized(model).items()}
    found = Survey.of(captured.program, Stacks.read(model))
    return lambda spec: make_plan(spec, found, backbone, small)


@exclusive
def plans(model: PreTrainedModel, specs: Sequence[SpecLike]) -> list[Plan]:
    """`plan` for several `specs`, each on its own; `model` is traced once. Raises as it does."""
    made = planner(model)
    return [_made(as_specs(spec), made) for spec in specs]


@exclusive
def within(model: PreTrainedModel, specs: Sequence[Spec], budget: str) -> list[Solved]:
    """Each of `specs` at the largest size of its first argument that `budget` allows: a share of the parameters of
    `model` ("6.7%"), or a number of them. Works on the meta device. Raises BudgetError, PlanError."""
    made = planner(model)
    return [solve(spec, budget, made) for spec in specs]


@exclusive
def survey(model: PreTrainedModel, *, example: Batch | None = None) -> tuple[Site, ...]:
    """Every site of `model`, in the order of the kinds of sites, with the sizes that specs may use. Works on the meta
    device. `example` is one batch by argument name, where inputs cannot be guessed. Raises CaptureError."""
    program = _captured(model, example, Trace()).program
    return Survey.of(program, Stacks.read(model)).sites


@exclusive
def compile(  # the name that users of torch expect
    model: PreTrainedModel,
    spec: SpecLike,
    *,
    example: Batch | None = None,
    trace: Trace | None = None,
    without: Iterable[str] = (),
    name: str = DEFAULT,
) -> CompiledModel:
    """A model of the class of `model` whose forward runs graphs with the deltas of `spec` inserted.

    Weights are shared with `model`, not copied, and frozen; `peftc.detach` gives the model back. Graphs
    are captured when an entry (forward, encode, prefill, decode) is first used. `without` names passes of
    `passes.LEAN` that are left out: the same numbers but for rounding, in more kernels. `name` is what the
    model calls these deltas, should others be added. `example` is one batch by argument name, needed only where the
    inputs cannot be guessed; `trace` is told what the passes did. Raises as `plan` does, AttachError for a model that
    is compiled already, ValueError for a pass that is none of them.
    """
    require_bare(model)
    _require_lean(without := frozenset(without))
    compiler = Compiler(trace or Trace(), without, example)
    captured = _captured(model, example, compiler.trace)
    return attached(model, _made_of(model, spec, captured), compiler, name, captured)


@dataclass(frozen=True)
class Compiler:
    """What a compiled model was compiled with, for the sets that are added to it. Copies and pickles tell no trace."""

    trace: Trace = field(default_factory=Trace)
    without: frozenset[str] = frozenset()
    example: Batch | None = None

    def made(self, backbone: PreTrainedModel, source: Any) -> Made:
        """A spec, or a directory of deltas of this backbone, as a set to be."""
        captured = _captured(backbone, self.example, self.trace)
        directory = Path(source) if isinstance(source, str | Path) else None
        if directory is None or not directory.is_dir():
            return _made_of(backbone, source, captured)
        found = _made_from(backbone, directory, delta.manifest_of(directory), captured)
        if len(found) > 1:
            raise DeltaError(
                f"{directory} holds several sets ({', '.join(found)}); save each by itself"
            )
        return next(iter(found.values()))

    def rewrite(self, edits: tuple[Edit, ...]) -> Rewrite:
        return Rewrite(edits, self.trace, self.without)

    def __reduce__(self) -> Any:
        return Compiler, (Trace(), self.without, self.example)


def _made_of(model: PreTrainedModel, spec: SpecLike, captured: Captured) -> Made:
    plan = _plan(model, as_specs(spec), captured)
    return Made(plan, activations=Activations(model, captured.program))


def _require_lean(names: frozenset[str]) -> None:
    known = [one.name for one in passes.LEAN]
    for name in sorted(names - set(known)):
        raise ValueError(f"no pass '{name}' can be left out; these can: {', '.join(known)}")


def sample(model: PreTrainedModel, example: Batch | None = None) -> dict[str, torch.Tensor]:
    """One batch for a certificate: the `example` given, now or to `compile`, else a seeded one; by argument
    name, on the model's device, floating ones in its type."""
    known = example or getattr(model, "example", None)
    if known is None:
        return seeded_inputs(model)
    return {
        name: one.to(model.device, model.dtype if one.is_floating_point() else one.dtype)
        for name, one in known.items()
    }


def attached(
    model: PreTrainedModel,
    made: Made,
    compiler: Compiler,
    name: str = DEFAULT,
    captured: Captured | None = None,
) -> CompiledModel:
    """A compiled model with one delta set, told to the trace."""
    compiled = attach(model, made, compiler, name)
    compiler.trace.model = compiled
    if captured is not None and not made.plan.room:  # rows in front change what is traced
        compiled.adopt(captured.program, captured.inputs, captured.flags, captured.seen)
    return compiled


@exclusive
def load(
    path: str | Path,
    backbone: PreTrainedModel | None = None,
    *,
    example: Batch | None = None,
) -> CompiledModel:
    """Deltas from the directory `path` on their backbone: the one given, or the one that their manifest names.

    `backbone` is not copied: it is frozen as `compile` does, and parameters that the spec unfroze take the
    saved values. Sets that were saved together are in use together. `example` is one batch by argument name, needed
    only where the inputs cannot be guessed. Raises DeltaError when the directory is damaged, half written, or the
    backbone is another one; then the backbone is as it was.
    """
    path = Path(path)
    manifest = delta.manifest_of(path)
    if backbone is None:
        backbone = _named_backbone(manifest)
    require_bare(backbone)
    compiler = Compiler(example=example)
    captured = _captured(backbone, example, compiler.trace)
    (name, first), *others = _made_from(backbone, path, manifest, captured).items()
    model = attached(backbone, first, compiler, name, captured)
    for other, made in others:
        model.include(other, made)
    if others:
        model.use(model.delta_sets)
    return model


def _made_from(
    backbone: PreTrainedModel, path: Path, manifest: Mapping[str, Any], captured: Captured
) -> dict[str, Made]:
    """The sets that a directory holds, by their names. Raises DeltaError before anything of the backbone changes."""
    plans, forms = {}, {}
    for said in delta.sets_of(manifest):
        plan = _plan(backbone, [delta.spec_of(said, path)], captured)
        plans[said["set"]] = _restored_plan(said, path, plan)
        forms[said["set"]] = said["form"]
        require_name(said["set"], backbone)
    together([*plans.values()]).room.require(backbone)
    check_backbone(manifest, backbone, plans.values())
    shapes = dict(backbone.named_parameters())
    expected: dict[str, tuple[int, ...]] = {}
    for name, plan in plans.items():
        saved = under(plan, below(name)).tensors
        expected |= {f"deltas.{key}": one.shape for key, one in saved.items()}
        expected |= {one.path: tuple(shapes[one.path].shape) for one in plan.unfrozen}
    tensors = delta.read_tensors(path, manifest, expected)
    return {
        name: Made(
            plan,
            forms[name],
            values={
                key: tensors[f"deltas.{one.under('', below(name)).path}"]
                for key, one in plan.tensors.items()
            },
            weights={one.path: tensors[one.path] for one in plan.unfrozen},
        )
        for name, plan in plans.items()
    }


def _restored_plan(manifest: Mapping[str, Any], path: Path, plan: Plan) -> Plan:
    """The plan in the form that was saved: constants evaluated, folded edits gone, to be filled."""
    edits = plan.edits
    try:
        if "left" in manifest:
            edits = left.named(edits, [(int(index), str(site)) for index, site in manifest["left"]])
        else:  # written before there was `left`: two entries of one method may share a name
            names = set(manifest["edits"])
            edits = tuple(edit for edit in edits if edit.name in names)
    except (KeyError, TypeError, ValueError) as error:
        raise DeltaError(
            f"{path / MANIFEST}: what is left of the spec does not fit this backbone: {error}"
        ) from error
    if manifest["form"] == "stored":
        edits = tuple(constant_form(edit) for edit in edits)
    return left.keep(plan, edits)


def _named_backbone(manifest: Mapping[str, Any]) -> PreTrainedModel:
    named = manifest["backbone"]
    if not named["name"]:
        raise DeltaError(f"the deltas name no backbone ({named['class']}); pass backbone=model")
    return backbones.resolve(named["name"], cls=named["class"], settings=named.get("labels"))


@exclusive
def program_of(model: PreTrainedModel, entry: str, inputs: Mapping[str, torch.Tensor]) -> Program:
    """The graph of an entry of a compiled or a plain model, as deltas were inserted: no pass has made it lean."""
    flags = forward_flags(model) if entry == "forward" else {}
    if isinstance(model, CompiledModel):
        return model.program(entry, inputs, flags)
    program = capture(model, Call.of(model, entry, inputs), flags)
    passes.Normalize().run(program)
    passes.Quantized().run(program)
    return program


def outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Output tensors of `model` by name, for `inputs` by argument name, in evaluation mode, without a cache."""
    flags = forward_flags(model)
    keep_as_stored(model)
    with evaluating(model), torch.no_grad():
        fields = model(**inputs, **flags)
    return {k: v for k, v in fields.items() if isinstance(v, torch.Tensor)}
