"""`peftc run`: texts through an ONNX bundle, by ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from peftc import runtime
from peftc.cli import options
from peftc.cli.console import raw, step
from peftc.cli.rows import read_rows


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
        options.quiet()
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

    return [str(row[column]) for row in read_rows(source, (column,))]
