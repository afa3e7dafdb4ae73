"""The subject of a report: a spec on a model without weights, as it was before and after, and what came of it later."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import PreTrainedModel

from peftc import driver
from peftc.errors import PeftcError, fault
from peftc.export import record
from peftc.export.origins import Row
from peftc.graph.arguments import dummy_inputs
from peftc.graph.program import Program
from peftc.language import resolved
from peftc.language.reader import Reader
from peftc.language.source import Source, compose
from peftc.language.spec import Spec
from peftc.model import backbones
from peftc.model.compiled import CompiledModel
from peftc.model.hollow import hollow
from peftc.plan.algebra import constant_form
from peftc.plan.left import Key
from peftc.plan.plan import Plan
from peftc.rewrite.folding import Outcome
from peftc.store import deltas
from peftc.store.directory import CERTIFICATES, MANIFEST, read_manifest


class ReportError(PeftcError):
    """Something that there is no report of."""


@dataclass(frozen=True)
class Check:
    """A row of a certificate: what was compared, by how much it differs, and by how much it may; of `one` rewrite by
    itself, or of all."""

    what: str
    error: float
    bound: float | None
    holds: bool
    one: bool = False


@dataclass(frozen=True)
class Bundle:
    """What a bundle adds: the nodes of its graphs, by their roles, and the bytes of its weights."""

    nodes: Mapping[str, Sequence[Row]]
    bytes: int


@dataclass(frozen=True)
class Subject:
    """`specs` have texts, and act as one in `plan`. `before` and `after` are `forward` in evaluation, the spec's deltas
    inserted and nothing made lean; `model` is `bare` compiled, on the meta device. Of what was folded there are `outcomes`."""

    title: str
    specs: tuple[Spec, ...]
    bare: PreTrainedModel
    model: CompiledModel
    before: Program
    after: Program
    outcomes: Mapping[Key, Outcome] = field(default_factory=dict)
    bundle: Bundle | None = None
    checks: tuple[Check, ...] = ()

    @property
    def plan(self) -> Plan:
        """What the specs do to the model."""
        return self.model.plan

    @property
    def backbone(self) -> str:
        """What the model is called, without the folder that it lies in."""
        name = (self.model.config.name_or_path or "").removeprefix(backbones.RANDOM)
        own = Path(name).name if Path(name).is_absolute() else name
        return f"{own} ({type(self.model).__name__})" if own else type(self.model).__name__


def of_specs(model: PreTrainedModel, specs: Sequence[Spec]) -> Subject:
    """What specs do to a model, which stays as it is and may be on the meta device. Raises PlanError, CaptureError."""
    bare = hollow(model, torch.device("meta"))
    inputs = dummy_inputs(bare)
    before = driver.program_of(bare, "forward", inputs)
    compiled = driver.compile(hollow(bare, bare.device), specs)
    after = driver.program_of(compiled, "forward", inputs)
    name = "+".join(one.name for one in specs)
    return Subject(name, tuple(specs), bare, compiled, before, after)


def of_deltas(directory: Path, model: str | None = None) -> Subject:
    """Deltas on disk, on the backbone that they name or on `model`; no weight is read. Raises DeltaError."""
    manifest = deltas.manifest_of(directory)
    named = manifest["backbone"]
    name = model or named["name"]
    if not name:
        raise ReportError(f"{directory} names no backbone ({named['class']}); say --model")
    bare = backbones.resolve(name, meta=True, cls=named["class"], settings=named.get("labels"))
    sets = deltas.sets_of(manifest)
    specs = [_written(deltas.spec_of(one, directory)) for one in sets]
    subject = of_specs(bare, specs)
    return replace(subject, outcomes=_left(subject, sets), checks=_checks(directory))


def of_bundle(directory: Path) -> Subject:
    """An ONNX bundle, by its record and its manifest. Raises ExportError, DeltaError."""
    manifest = read_manifest(directory, ("kind", "graphs", "parity", "data_bytes"))
    try:
        parity = [
            Check(f"{one['graph']} against torch, at export", one["error"], one["tolerance"], one["error"] <= one["tolerance"])
            for one in manifest["parity"]
        ]  # fmt: skip
        size = int(manifest["data_bytes"])
    except (KeyError, TypeError, ValueError) as error:
        raise ReportError(
            f"{directory / MANIFEST} is damaged: {fault(error)}; export it again"
        ) from error
    checks = _checks(directory) or tuple(parity)
    said = record.read(directory)
    bare = backbones.made(str(directory), said.cls, said.config)
    subject = of_specs(bare, [_written(said.spec)])
    return replace(
        subject,
        outcomes={one.key: one for one in said.outcomes},
        bundle=Bundle(said.nodes, size),
        checks=checks,
    )


def _left(subject: Subject, sets: Sequence[Mapping[str, Any]]) -> dict[Key, Outcome]:
    """What is gone of the edits of sets that were saved: merged before, or evaluated as they were saved."""
    found: dict[Key, Outcome] = {}
    first = 0
    for said, spec in zip(sets, subject.specs, strict=True):
        last = first + len(spec.entries)
        mine = [one for one in subject.plan.edits if first <= one.index < last]
        every = [[one.index - first, one.site.name] for one in mine]
        left = {(int(index) + first, str(site)) for index, site in said.get("left", every)}
        for edit in mine:
            constant = said["form"] == "stored" and constant_form(edit) is not edit
            if edit.key not in left:
                found[edit.key] = Outcome(edit.name, True, "its weight", edit.key, "merge")
            elif constant:
                found[edit.key] = Outcome(edit.name, False, "", edit.key, evaluated="saving")
        first = last
    return found


class _OneLine(dict[str, Any]):
    """A mapping that is written on one line."""


class _Dumper(yaml.SafeDumper):
    """Writes a spec as people do."""


_Dumper.add_representer(
    _OneLine,
    lambda dumper, one: dumper.represent_mapping("tag:yaml.org,2002:map", one, flow_style=True),
)


def _written(spec: Spec) -> Spec:
    """A spec that was stored resolved, as the text that it would be, with the places of its deltas there."""
    file = f"{spec.name}.yaml"
    said = resolved.write(spec)
    for one in said["deltas"]:
        one["params"] = {k: _OneLine(v) for k, v in one.get("params", {}).items()}
        if not one["params"]:
            del one["params"]
    text = yaml.dump(
        said, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=96, default_flow_style=None
    )
    read = Reader(Source(file), resolved=True).spec(compose(text, file))
    return replace(read, text=text, path=file)


def _checks(directory: Path) -> tuple[Check, ...]:
    """The rows of the certificate that `peftc verify` wrote there, if it did."""
    file = directory / CERTIFICATES[0]
    if not file.is_file():
        return ()
    try:
        rows: list[Mapping[str, Any]] = json.loads(file.read_text())["rows"]
        return tuple(
            Check(
                one["what"],
                float(one["error"]),
                one["bound"],
                bool(one["holds"]),
                one.get("moved") is not None,
            )
            for one in rows
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ReportError(f"{file} is damaged: {fault(error)}; run peftc verify again") from error
