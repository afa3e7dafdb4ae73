"""`peftc train`: a spec, or deltas to go on with, on rows of text; only the deltas train."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from peftc import driver
from peftc.cli import directories, options
from peftc.cli import tables as table
from peftc.cli.console import console, say, step
from peftc.language.ports import SITES
from peftc.language.reader import load_spec
from peftc.model.compiled import CompiledModel
from peftc.store.directory import require_ours
from peftc.training.recipes import (
    Recipe,
    Row,
    TrainResult,
    read_rows,
    train_classifier,
    train_seq2seq,
)


def train(
    specs: Annotated[
        list[str], typer.Argument(metavar="SPEC...|DIR", help="Specs, or deltas to go on with.")
    ],
    data: Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows: .jsonl or .csv.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the deltas.")],
    model: Annotated[
        str | None, typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub name.")
    ] = None,
    random_weights: options.RandomWeights = False,
    task: Annotated[
        Literal["classification", "summarization"], typer.Option("--task", help="What to learn.")
    ] = "classification",
    evaluation: Annotated[
        Path | None, typer.Option("--eval", metavar="FILE", help="Rows to score the result on.")
    ] = None,
    text_column: Annotated[str, typer.Option("--text-column")] = "text",
    label_column: Annotated[str, typer.Option("--label-column", help="Classification.")] = "label",
    target_column: Annotated[
        str, typer.Option("--target-column", help="Summarization.")
    ] = "summary",
    sets: options.Set = None,
    words: options.Words = None,
    no_head: Annotated[
        bool, typer.Option("--no-head", help="Leave a classifier's head as it is.")
    ] = False,
    keep_mlp: Annotated[
        bool, typer.Option("--keep-mlp", help="Save what trains, not its constants evaluated.")
    ] = False,
    epochs: Annotated[float | None, typer.Option("--epochs")] = None,
    lr: Annotated[float | None, typer.Option("--lr", help="Learning rate.")] = None,
    batch: Annotated[int | None, typer.Option("--batch", min=1, help="Rows in a step.")] = None,
    warmup: Annotated[float | None, typer.Option("--warmup", help="Share of the steps.")] = None,
    label_smoothing: Annotated[float | None, typer.Option("--label-smoothing")] = None,
    max_length: Annotated[
        int | None, typer.Option("--max-length", min=2, help="Tokens of a text.")
    ] = None,
    max_target_length: Annotated[
        int | None, typer.Option("--max-target-length", min=2, help="Tokens of a target.")
    ] = None,
    num_beams: Annotated[int | None, typer.Option("--num-beams", min=1)] = None,
    seed: Annotated[int | None, typer.Option("--seed")] = None,
) -> None:
    """Train a method on rows of text and save its deltas.

    A classifier's head trains along, unless --no-head.

    \b
    peftc train mam -m ./bert --data train.jsonl --eval test.jsonl -o deltas
    peftc train lora -m ./bart --task summarization --data train.csv -o deltas
    """
    require_ours(output)
    columns = (text_column, label_column if task == "classification" else target_column)
    with step(f"reading {data}"):
        rows = read_rows(data, columns)
        test = read_rows(evaluation, columns) if evaluation else []
    given: dict[str, Any] = {
        "epochs": epochs,
        "lr": lr,
        "batch": batch,
        "warmup": warmup,
        "label_smoothing": label_smoothing,
        "max_length": max_length,
        "max_target_length": max_target_length,
        "num_beams": num_beams,
        "seed": seed,
    }
    recipe = Recipe(**{name: value for name, value in given.items() if value is not None})
    torch.manual_seed(recipe.seed)  # the deltas' own start
    if Path(specs[0]).is_dir():
        compiled = _continued(specs, model, sets or words)
    else:
        labels = _labels(rows, columns[1]) if task == "classification" else ()
        compiled = _started(
            _with_head(specs, labels, no_head), (sets, words), model, random_weights, task, labels
        )
    tokenizer = directories.tokenizer(Path(specs[0]), compiled)
    if tokenizer is None:
        raise options.OptionError(f"there is no tokenizer with {compiled.config.name_or_path}")
    say(table.render(compiled.plan, console().width))
    console(stderr=True).print(f"training on {len(rows)} rows ...")
    with redirect_stdout(sys.stderr):  # Trainer prints its logs
        result = _trained(compiled, tokenizer, task, columns, rows, test, recipe)
    say(_result(result, task, len(test)))
    directories.save(compiled, output, tokenizer, stored=not keep_mlp)


def _continued(
    specs: Sequence[str], model: str | None, said: Sequence[str] | None
) -> CompiledModel:
    if len(specs) > 1 or said:
        raise options.OptionError("deltas go on as they are: no other spec, no --set, no --words")
    return directories.load(Path(specs[0]), model)


def _with_head(specs: Sequence[str], labels: Sequence[str], no_head: bool) -> list[str]:

    has_head = any(
        entry.at and not SITES[entry.at].counted
        for one in specs
        for entry in load_spec(one).entries
    )
    return [*specs] if no_head or has_head or not labels else [*specs, "head"]


def _started(
    specs: list[str],
    said: tuple[list[str] | None, str | None],
    model: str | None,
    random_weights: bool,
    task: str,
    labels: Sequence[str],
) -> CompiledModel:
    loaded = options.specs(specs, *said)
    if model is None:
        raise options.OptionError("--model is needed to train a spec")
    settings = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    backbone = options.backbone(
        model, random_weights, task=task, settings=settings if labels else None
    )

    with step("compiling"):
        return driver.compile(backbone, loaded)


def _labels(rows: Sequence[Row], column: str) -> tuple[str, ...]:
    """The classes in the data: numbers in their order, names in theirs."""
    found = {str(row[column]) for row in rows}
    if len(found) < 2:
        raise options.OptionError(f"column '{column}' holds one class alone: {found.pop()}")
    if all(one.isdecimal() for one in found):
        return tuple(sorted(found, key=int))
    return tuple(sorted(found))


def _trained(
    compiled: CompiledModel,
    tokenizer: Any,
    task: str,
    columns: tuple[str, str],
    rows: Sequence[Row],
    test: Sequence[Row],
    recipe: Recipe,
) -> TrainResult:

    if task == "summarization":
        pairs = [_columns(some, columns) for some in (rows, test)]
        return train_seq2seq(compiled, tokenizer, pairs[0], pairs[1] if test else None, recipe)
    known = {str(label): int(i) for label, i in (compiled.config.label2id or {}).items()}
    classes = [_indexed(_columns(some, columns), known) for some in (rows, test)]
    return train_classifier(compiled, tokenizer, classes[0], classes[1] if test else None, recipe)


def _columns(rows: Sequence[Row], columns: tuple[str, str]) -> tuple[list[str], list[str]]:
    left, right = ([str(row[column]) for row in rows] for column in columns)
    return left, right


def _indexed(
    pairs: tuple[list[str], list[str]], known: Mapping[str, int]
) -> tuple[list[str], list[int]]:
    texts, labels = pairs
    strange = sorted(set(labels) - known.keys())
    if strange:
        raise options.OptionError(
            f"class '{strange[0]}' is not one that the model knows: {', '.join(known)}"
        )
    return texts, [known[label] for label in labels]


def _result(result: TrainResult, task: str, count: int) -> str:
    text = f"trained {result.steps} steps in {result.seconds:.1f} s, mean loss {result.loss:.4f}"
    if result.metric is None:
        return text
    metric = "accuracy" if task == "classification" else "ROUGE-L"
    return f"{text}\n{metric} {result.metric:.4f} on {count} rows"
