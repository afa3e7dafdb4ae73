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
from peftc.errors import PeftcError, fault
from peftc.export import bundle
from peftc.export.parity import Parity
from peftc.graph.arguments import seeded_inputs
from peftc.rewrite.verify import difference
from peftc.runtime import OWN
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
    full: Annotated[
        bool, typer.Option("--full", help="All of the grid, not a part where any two values meet.")
    ] = False,
) -> None:
    """Check deltas, a merged checkpoint or a bundle again, on a grid of batches.

    Writes certificate.json and certificate.md there. Exit code 1 when a row fails.

    \b
    peftc verify lora-my-bert
    peftc verify merged --model lora-my-bert
    peftc verify bundle --model lora-my-bert --full
    """
    if any(directory.glob("*.onnx")):
        about, rows = _bundle(directory, model, full)
    elif (directory / REPORT).is_file():
        about, rows = _merged(directory, model, full)
    else:
        about, rows = _deltas(directory, model, full)
    found = []
    for one in rows:
        if one.moved is None or not one.holds:
            say(str(one))
        found.append(one)
    if each := [one for one in found if one.moved is not None]:
        kept = sum(one.holds for one in each)
        say(
            f"{kept} of {len(each)} rewrites hold by themselves; {certificate.PAGE} has a line for each"
        )
    certificate.write(directory, about, found)
    failed = [one.what for one in found if not one.holds]
    if failed:
        raise PeftcError(
            f"{directory}: {len(failed)} of {len(found)} checks failed: {', '.join(failed)}"
        )


def _deltas(directory: Path, model: str | None, full: bool) -> tuple[Mapping[str, Any], Rows]:
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
            yield from certificate.rows_of(compiled, full)

    return certificate.about(compiled), rows()


def _odd(tensors: Mapping[str, torch.Tensor]) -> int:
    return sum(int((~torch.isfinite(v)).sum()) for v in tensors.values())


def _merged(directory: Path, model: str | None, full: bool) -> tuple[Mapping[str, Any], Rows]:
    """What `peftc merge` wrote, against the deltas that it was made of."""
    try:
        report = json.loads((directory / REPORT).read_text())
        about = {k: report[k] for k in ("versions", "specs", "backbone", "error", "folded", "kept")}
        source = Path(model or report["deltas"])
    except (ValueError, KeyError, TypeError) as error:
        raise DeltaError(f"{directory / REPORT} is damaged: {fault(error)}; merge again") from error

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
            what = "merged against the deltas"
            yield certificate.against(what, merged, compiled.train(False), full)

    return about, rows()


def _bundle(directory: Path, model: str | None, full: bool) -> tuple[Mapping[str, Any], Rows]:
    """What the manifest certifies; with a model (deltas or a checkpoint) the bundle against it, now."""
    manifest = read_manifest(directory, ("kind", "graphs", "parity", "data_bytes"))
    check_files(directory, manifest, content=True)
    keys = ("kind", "backbone", "dtype", "precision", "opset", "spec", "versions")
    about = {key: manifest[key] for key in keys if manifest.get(key) is not None}

    def rows() -> Rows:
        size = sum(one.stat().st_size for one in directory.glob("*.data"))
        yield number("bytes of weights that are missing", abs(size - manifest["data_bytes"]), 0)
        yield from _exported(directory, manifest)
        options.quiet()
        runner = runtime.load(directory) if manifest.get("layout", OWN) == OWN else None
        if model is None:
            return
        torch_model = directories.model_of(Path(model))
        precision = bundle.certified(manifest, directory)
        with step("comparing on a grid") as progress:
            for parity, fault in bundle.verified(
                torch_model, directory, full=full, progress=progress
            ):
                what = f"{parity.graph} against torch, now" + (f": {fault}" if fault else "")
                yield _row(what, parity, precision.why, not fault)
        if runner is not None and runner.can_generate():
            with step("writing with both"):
                yield _tokens(runner, torch_model, 0 if precision.name == "fp32" else None)

    return about, rows()


def _exported(directory: Path, manifest: Mapping[str, Any]) -> Rows:
    """What the manifest certifies."""
    why = bundle.certified(manifest, directory).why
    try:
        found = [Parity(**one) for one in manifest["parity"]]
        for one in found:
            yield _row(
                f"{one.graph} against torch, at export", one, why, one.error <= one.tolerance
            )
    except TypeError as error:
        raise DeltaError(
            f"{directory / MANIFEST} is damaged: 'parity' is not what it must be; export it again"
        ) from error
    if not found:
        raise DeltaError(f"{directory / MANIFEST} certifies nothing; export it again")


def _row(what: str, one: Parity, why: str, holds: bool) -> Row:
    """A graph's parity as a row of a certificate."""
    numbers = one.scale, one.error, one.mean, one.divergence, one.agreement
    return Row(what, one.cases, "", *numbers, one.tolerance, why, holds)


def _tokens(runner: Any, model: Any, bound: float | None) -> Row:
    """Tokens that both write; a distribution that is another by a little may turn a choice, and all that follows it."""
    inputs = seeded_inputs(model)
    inputs.pop("decoder_input_ids", None)
    settings = {"num_beams": 4, "max_new_tokens": 16, "do_sample": False}
    ours, theirs = (one.generate(**inputs, **settings) for one in (runner, model))
    same = ours.shape == theirs.shape
    differ = float((ours != theirs).sum()) if same else 1.0
    return number("tokens of beam search that differ, now", differ, bound)
