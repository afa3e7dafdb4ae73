"""`peftc verify`: run the certificate of a directory again, and write it there."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from peftc import certificate, driver, runtime
from peftc.certificate import Row, number
from peftc.cli import directories, options
from peftc.cli.console import say, step
from peftc.cli.merge import REPORT
from peftc.errors import PeftcError
from peftc.export.parity import Parity
from peftc.export.precision import PRECISIONS, QUANTIZED
from peftc.graph.arguments import seeded_inputs
from peftc.rewrite.verify import difference
from peftc.store.directory import MANIFEST, DeltaError, check_files, read_manifest

# The rows of a certificate, each as it is found.
Rows = Iterator[Row]


def verify(
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR|MERGED|BUNDLE", help="Deltas, what merge wrote, or an ONNX bundle."
        ),
    ],
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            metavar="MODEL",
            help="Of deltas: their backbone. Else: deltas or a checkpoint to compare with.",
        ),
    ] = None,
) -> None:
    """Check deltas, a merged checkpoint or a bundle again, on a grid of batches.

    Writes certificate.json and certificate.md there. Exit code 1 when a row fails.

    \b
    peftc verify lora-my-bert
    peftc verify merged --model lora-my-bert
    peftc verify bundle --model lora-my-bert
    """
    if any(directory.glob("*.onnx")):
        about, rows = _bundle(directory, model)
    elif (directory / REPORT).is_file():
        about, rows = _merged(directory, model)
    else:
        about, rows = _deltas(directory, model)
    found = []
    for one in rows:
        say(str(one))
        found.append(one)
    certificate.write(directory, about, found)
    failed = [one.what for one in found if not one.holds]
    if failed:
        raise PeftcError(f"{directory}: {len(failed)} checks failed: {', '.join(failed)}")


def _deltas(directory: Path, model: str | None) -> tuple[Mapping[str, Any], Rows]:
    compiled = directories.load(directory, model)  # raises when the fingerprint or a shape is wrong
    compiled.train(False)

    def rows() -> Rows:
        yield number("fingerprint of the backbone, names and shapes", 0, 0)
        yield number("numbers in the deltas that are not finite", _odd(compiled.deltas.values()), 0)
        inputs = driver.sample(compiled)
        with step("running the compiled model"):
            once, again = (driver.outputs(compiled, inputs) for _ in range(2))
        yield number("two runs of the compiled model", difference(once, again), 0)
        with step("comparing on a grid"):
            yield from certificate.rows_of(compiled)

    return certificate.about(compiled), rows()


def _odd(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(int((~torch.isfinite(v)).sum()) for v in tensors.values())


def _merged(directory: Path, model: str | None) -> tuple[Mapping[str, Any], Rows]:
    """What `peftc merge` wrote, against the deltas that it was made of."""
    try:
        report = json.loads((directory / REPORT).read_text())
        about = {k: report[k] for k in ("versions", "specs", "backbone", "error", "folded", "kept")}
        source = Path(model or report["deltas"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaError(f"{directory / REPORT} is damaged: {error}") from error

    def rows() -> Rows:
        with step(f"loading {directory}"):
            merged = options.backbone(str(directory))
        yield number("weights that are not finite", _odd(dict(merged.named_parameters())), 0)
        if report["kept"] or not source.is_dir():
            missing = "deltas beside it" if report["kept"] else f"no {source} to compare with"
            say(
                f"info    {missing}: verify {directory / 'deltas' if report['kept'] else '--model DELTAS'}"
            )
            return
        compiled = directories.model_of(source)
        with step("comparing on a grid"):
            yield certificate.against("merged against the deltas", merged, compiled.train(False))

    return about, rows()


def _bundle(directory: Path, model: str | None) -> tuple[Mapping[str, Any], Rows]:
    """What the manifest certifies; with a model (deltas or a checkpoint) the bundle against it, now."""
    manifest = read_manifest(directory, ("kind", "graphs", "parity", "data_bytes"))
    check_files(directory, manifest, content=True)
    keys = ("kind", "backbone", "dtype", "precision", "opset", "spec", "versions")
    about = {key: manifest[key] for key in keys if manifest.get(key) is not None}

    def rows() -> Rows:
        size = sum(one.stat().st_size for one in directory.glob("*.data"))
        yield number("bytes of weights that are missing", abs(size - manifest["data_bytes"]), 0)
        with step(f"loading {directory}"):
            options.quiet()
            runner = runtime.load(directory)
        exported = _exported(directory, manifest)
        yield from exported
        if model is None:
            return
        torch_model = directories.model_of(Path(model))
        with step("running both"):
            if runner.can_generate():
                yield _tokens(runner, torch_model)
            else:
                yield _outputs(runner, torch_model, exported[0].bound or 0.0)

    return about, rows()


def _exported(directory: Path, manifest: Mapping[str, Any]) -> list[Row]:
    precision = {**PRECISIONS, **QUANTIZED}.get(manifest.get("precision", "fp32"))
    why = (
        "" if precision is None else f"{precision.share:.1e} of the largest value: {precision.why}"
    )
    try:
        found = [Parity(**one) for one in manifest["parity"]]
        rows = [
            Row(
                f"{one.graph} against torch, at export",
                one.cases,
                "",
                one.scale,
                one.error,
                one.mean,
                one.divergence,
                one.agreement,
                one.tolerance,
                why,
                one.error <= one.tolerance,
            )
            for one in found
        ]
    except TypeError as error:
        raise DeltaError(f"{directory / MANIFEST} is damaged: 'parity' is none") from error
    if not rows:
        raise DeltaError(f"{directory / MANIFEST} certifies nothing; export it again")
    return rows


def _outputs(runner: Any, model: Any, limit: float) -> Row:
    inputs = seeded_inputs(model)
    if "attention_mask" in inputs:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    want, got = driver.outputs(model, inputs), runner(**inputs)
    return number("ONNX outputs against torch, now", difference(want, got), limit)


def _tokens(runner: Any, model: Any) -> Row:
    inputs = seeded_inputs(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"num_beams": 4, "max_new_tokens": 16, "do_sample": False}
    ours, theirs = (one.generate(**inputs, **settings) for one in (runner, model))
    same = ours.shape == theirs.shape
    differ = float((ours != theirs).sum()) if same else 1.0
    return number("tokens of beam search that differ, now", differ, 0)
