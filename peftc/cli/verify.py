"""`peftc verify`: run the certificate of a directory again: one line and one number for each check."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from transformers import PreTrainedModel

from peftc import driver, runtime
from peftc.cli import directories, options
from peftc.cli.console import say, step
from peftc.errors import PeftcError
from peftc.export.parity import Parity
from peftc.graph.arguments import seeded_inputs
from peftc.merging import merge
from peftc.model.compiled import CompiledModel
from peftc.rewrite.tolerance import tolerance
from peftc.rewrite.verify import difference
from peftc.store.directory import MANIFEST, DeltaError, check_files, read_manifest


@dataclass(frozen=True)
class Check:
    """A number that must not exceed `tolerance`; without a tolerance it only informs."""

    name: str
    number: float
    tolerance: float | None = None

    @property
    def holds(self) -> bool:
        return self.tolerance is None or self.number <= self.tolerance  # False for nan

    def __str__(self) -> str:
        verdict = "info" if self.tolerance is None else "ok" if self.holds else "FAILED"
        limit = "" if self.tolerance is None else f"  (at most {self.tolerance:.1e})"
        return f"{verdict:<7} {self.name:<44} {self.number:.3g}{limit}"


def verify(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR|BUNDLE", help="Deltas, or an ONNX bundle.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Of deltas: their backbone. Of a bundle: deltas or a checkpoint to compare with.",
        ),
    ] = None,
) -> None:
    """Check deltas or a bundle again, by numbers. Exit code 1 when a check fails.

    \b
    peftc verify lora-my-bert
    peftc verify bundle --model lora-my-bert
    """
    checks = _bundle_checks if any(directory.glob("*.onnx")) else _delta_checks
    failed = []
    for check in checks(directory, model):
        say(str(check))
        if not check.holds:
            failed.append(check.name)
    if failed:
        raise PeftcError(f"{directory}: {len(failed)} checks failed: {', '.join(failed)}")


def _delta_checks(directory: Path, model: str | None) -> Iterator[Check]:

    compiled = directories.load(directory, model)  # raises when the fingerprint or a shape is wrong

    yield Check("fingerprint of the backbone, names and shapes", 0, 0)
    values = compiled.deltas.values().values()
    yield Check(
        "numbers in the deltas that are not finite",
        sum(int((~torch.isfinite(v)).sum()) for v in values),
        0,
    )
    inputs = seeded_inputs(compiled)
    with step("running the compiled model"):
        once, again = (driver.outputs(compiled, inputs) for _ in range(2))
    yield Check("two runs of the compiled model", difference(once, again), 0)
    with step("folding"), torch.no_grad():
        merged, report = merge(compiled, tolerance=math.inf, dequantize=True)
        bare = driver.outputs(compiled.backbone, inputs)
    yield Check("compiled against the backbone", difference(once, bare))
    yield Check(
        f"folded ({len(report.folded)} of {len(report.outcomes)}) against unfolded",
        report.error,
        tolerance(report.scale, compiled.dtype),
    )
    yield Check("folded twice against folded once", _fold_again(merged), 0)


def _fold_again(merged: PreTrainedModel) -> float:
    """How far a second merge moves the folded weights."""

    if not isinstance(merged, CompiledModel):
        return 0.0  # a plain checkpoint: there is nothing left that could fold
    with step("folding again"):
        twice, report = merge(merged, tolerance=math.inf, dequantize=True)
    before, after = dict(merged.named_parameters()), dict(twice.named_parameters())
    moved = [float((after[k] - v).detach().abs().max()) for k, v in before.items() if k in after]
    return max(moved) + len(report.folded)


def _bundle_checks(directory: Path, model: str | None) -> Iterator[Check]:
    """What the manifest certifies; with a model (deltas or a checkpoint) the bundle against it, now."""

    manifest = read_manifest(directory, ("kind", "graphs", "parity", "data_bytes"))
    check_files(directory, manifest, content=True)
    size = sum(one.stat().st_size for one in directory.glob("*.data"))
    yield Check("bytes of weights that are missing", abs(size - manifest["data_bytes"]), 0)
    with step(f"loading {directory}"):
        options.quiet()
        runner = runtime.load(directory)
    certificate = _certificate(directory, manifest)
    for one in certificate:
        yield Check(f"{one.graph} against torch, at export", one.error, one.tolerance)
    if model is None:
        return
    torch_model = directories.model_of(Path(model))
    with step("running both"):
        if runner.can_generate():
            yield _tokens(runner, torch_model)
        else:
            yield _outputs(runner, torch_model, certificate[0].tolerance)


def _certificate(directory: Path, manifest: Mapping[str, Any]) -> tuple[Parity, ...]:
    try:
        found = tuple(
            Parity(
                str(one["graph"]), int(one["cases"]), float(one["error"]), float(one["tolerance"])
            )
            for one in manifest["parity"]
        )
    except (KeyError, TypeError, ValueError) as error:
        raise DeltaError(f"{directory / MANIFEST} is damaged: 'parity' is none") from error
    if not found:
        raise DeltaError(f"{directory / MANIFEST} certifies nothing; export it again")
    return found


def _outputs(runner: Any, model: PreTrainedModel, limit: float) -> Check:
    inputs = seeded_inputs(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    want, got = driver.outputs(model, inputs), runner(**inputs)
    return Check("ONNX outputs against torch, now", difference(want, got), limit)


def _tokens(runner: Any, model: Any) -> Check:

    inputs = seeded_inputs(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"num_beams": 4, "max_new_tokens": 16, "do_sample": False}
    ours, theirs = (one.generate(**inputs, **settings) for one in (runner, model))
    same = ours.shape == theirs.shape
    return Check(
        "tokens of beam search that differ, now", float((ours != theirs).sum()) if same else 1.0, 0
    )
