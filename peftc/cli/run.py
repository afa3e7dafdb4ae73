"""`peftc run`: texts, images or sounds through an ONNX bundle, by ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from peftc import runtime
from peftc.cli import options
from peftc.cli.console import raw, step
from peftc.cli.rows import read_rows
from peftc.store.directory import read_manifest

Answer = Mapping[str, Any]


def run(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `peftc export` wrote.")],
    texts: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[TEXT]...",
            help="Texts, or files of images or sounds; none: --input, or stdin by lines.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option("--input", metavar="FILE", help="JSON lines or CSV to read rows from."),
    ] = None,
    text_column: Annotated[
        str | None,
        typer.Option("--text-column", help="Where a row holds its text, image or sound."),
    ] = None,
    as_json: options.Json = False,
    num_beams: Annotated[
        int, typer.Option("--num-beams", min=1, help="Beams of a written answer.")
    ] = 4,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Its length.")
    ] = 64,
    device: options.Device = "cpu",
    ports: Annotated[
        bool,
        typer.Option("--ports", help="Print inputs and outputs of its graphs; nothing is run."),
    ] = False,
) -> None:
    """Answer with an ONNX bundle, by its task; one line for each text.

    A question stands in a line with its context: QUESTION<tab>CONTEXT.

    \b
    peftc run bundle "a great film" "a waste of time"
    peftc run bundle --input test.jsonl --json
    peftc run bundle --ports
    """
    if ports:
        return _ports(read_manifest(bundle, runtime.KEYS)["graphs"], as_json)
    if texts and source:
        raise options.OptionError("give texts or --input, not both")
    kind = runtime.kind_of(read_manifest(bundle, runtime.KEYS))
    asked = ASKED.get(kind, _TEXT)
    columns = (text_column, *asked.columns[1:]) if text_column else asked.columns
    chosen = _items(texts, source, columns)
    with step(f"loading {bundle}"):
        options.quiet()
        runner = runtime.load(bundle, options.providers(device))
    writes = {"num_beams": num_beams, "max_new_tokens": max_new_tokens}
    more = writes if runner.can_generate() else {}
    with step(f"running {len(chosen)} {asked.columns[0]}s"):
        given = [list(one) for one in zip(*chosen, strict=True)]
        answers = getattr(runner, kind.replace("-", "_"))(*given, **more)
    for item, answer in zip(chosen, answers, strict=True):
        row = {**dict(zip(columns, item, strict=True)), **asked.row(answer)}
        raw(json.dumps(row, default=float) if as_json else asked.line(answer))


def _ports(graphs: Mapping[str, Mapping[str, Any]], as_json: bool) -> None:
    """Names, types and axes, as the manifest has them."""
    if as_json:
        return raw(json.dumps(graphs, indent=1))
    for graph in graphs.values():
        raw(graph["file"])
        for side in ("inputs", "outputs"):
            for name, one in graph.get(side, {}).items():
                axes = ", ".join(map(str, one["shape"]))
                raw(f"  {side.removesuffix('s'):<7} {name}  {one['dtype']} [{axes}]")


@dataclass(frozen=True)
class Asked:
    """How one kind of runner is asked and its answer told: the columns of a row, the answer as JSON and as a line."""

    columns: tuple[str, ...]
    row: Callable[[Any], Answer]
    line: Callable[[Any], str]


def _first(answer: Any) -> Any:
    """The likeliest of several answers."""
    while isinstance(answer, list):
        answer = answer[0]
    return answer


def _scored(name: str) -> Callable[[Any], str]:
    return lambda answer: f"{_first(answer)[name]}\t{_first(answer)['score']:.4f}"


def _vector(answer: Any) -> list[Any]:
    found: list[Any] = answer.tolist()
    return found


_TEXT = Asked(("text",), lambda one: one, _scored("label"))
ASKED: Mapping[str, Asked] = {
    "question-answering": Asked(("question", "context"), lambda one: one, _scored("answer")),
    "image-classification": Asked(("image",), lambda one: {"labels": one}, _scored("label")),
    "token-classification": Asked(
        ("text",),
        lambda one: {"tokens": one},
        lambda answer: " ".join(f"{one['word']}/{one['entity']}" for one in answer),
    ),
    "fill-mask": Asked(("text",), lambda one: {"masks": one}, _scored("token_str")),
    "feature-extraction": Asked(
        ("text",),
        lambda one: {"vector": _vector(one)},
        lambda answer: json.dumps(_vector(answer)),
    ),
    "text-generation": Asked(("text",), _first, lambda one: str(_first(one)["generated_text"])),
    "text2text-generation": Asked(("text",), lambda one: one, lambda one: one["generated_text"]),
    "automatic-speech-recognition": Asked(
        ("sound",), lambda one: {"heard": one["text"]}, lambda one: str(one["text"])
    ),
}


def _items(
    texts: Sequence[str] | None, source: Path | None, columns: tuple[str, ...]
) -> list[tuple[str, ...]]:
    """What is asked, a value for each column."""
    if source is not None:
        rows = read_rows(source, columns)
        return [tuple(str(row[column]) for column in columns) for row in rows]
    lines = list(texts) if texts else [line.rstrip("\n") for line in sys.stdin]
    found = [tuple(line.split("\t", len(columns) - 1)) for line in lines if texts or line.strip()]
    for one in found:
        if len(one) < len(columns):
            raise options.OptionError(
                f"a line holds {' and '.join(columns)} with a tab between them; '{one[0][:40]}' does not"
            )
    return found
