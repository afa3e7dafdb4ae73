"""`peftc export` and `peftc run`: an ONNX bundle, and text through it by ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from peftc.commands import merging, options
from peftc.commands.console import quiet, raw, say, step

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR|HF_DIR", help="Deltas, or an ordinary checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="A new directory.")
    ],
    opset: Annotated[int, typer.Option("--opset", help="ONNX opset.")] = 23,
    model: options.Backbone = None,
) -> None:
    """Write an ONNX bundle that `peftc run` and ONNX Runtime serve.

    \b
    peftc export lora-my-bert -o bundle
    peftc export merged -o bundle --opset 20
    """
    options.new_directory(output)
    compiled = model_of(directory, model)
    tokenizer = options.tokenizer(directory, compiled)
    from peftc import bundle

    with step("exporting") as progress:
        parity = bundle.export(
            compiled, output, opset=opset, tokenizer=tokenizer, progress=progress
        )
    for one in parity:
        say(
            f"{one.graph}: max |ONNX - torch| = {one.error:.3g} "
            f"in {one.cases} cases (at most {one.tolerance:.1e})"
        )
    size = sum(one.stat().st_size for one in output.rglob("*") if one.is_file())
    say(f"wrote {output} ({size:,} bytes)")


def model_of(directory: Path, model: str | None = None) -> PreTrainedModel:
    """The model that a directory holds: deltas on their backbone, or an ordinary checkpoint."""
    if (directory / "peftc.json").is_file():
        return merging.load(directory, model)
    return options.backbone(str(directory))


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `peftc export` wrote.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(metavar="[TEXT]...", help="Texts; none: --input, or stdin by lines."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="JSON lines or CSV to read texts from."),
    ] = None,
    text_column: Annotated[
        str, typer.Option("--text-column", help="Where a row holds its text.")
    ] = "text",
    as_json: options.Json = False,
    num_beams: Annotated[
        int, typer.Option("--num-beams", min=1, help="Beams of a written answer.")
    ] = 4,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Its length.")
    ] = 64,
) -> None:
    """Classify or write with an ONNX bundle; one line for each text.

    \b
    peftc run bundle "a great film" "a waste of time"
    peftc run bundle --input test.jsonl --json
    """
    chosen = _texts(texts, source, text_column)
    with step(f"loading {bundle}"):
        from peftc import runtime

        quiet()
        runner = runtime.load(bundle)
    with step(f"running {len(chosen)} texts"):
        if isinstance(runner, runtime.Classifier):
            answers = [{"label": a, "probability": p} for a, p in runner.classify(chosen)]
        else:
            settings = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
            answers = [{"output": one} for one in runner.write(chosen, **settings)]
    for text, answer in zip(chosen, answers, strict=True):
        raw(json.dumps({"text": text, **answer}) if as_json else _line(answer))


def _line(answer: dict[str, Any]) -> str:
    if "output" in answer:
        return str(answer["output"])
    return f"{answer['label']}\t{answer['probability']:.4f}"


def _texts(texts: Sequence[str] | None, source: Path | None, column: str) -> list[str]:
    if texts and source:
        raise options.OptionError("give texts or --input, not both")
    if texts:
        return list(texts)
    if source is None:
        lines = [line.rstrip("\n") for line in sys.stdin]
        return [line for line in lines if line.strip()]
    from peftc.train import read_rows

    return [str(row[column]) for row in read_rows(source, (column,))]
