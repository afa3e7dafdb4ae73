"""`peftc train`: a spec, or deltas to go on with, on rows of text; only the deltas train."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer

from peftc import driver
from peftc.cli import directories, options
from peftc.cli import recipe as recipes
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

Specs = Annotated[
    list[str], typer.Argument(metavar="SPEC...|DIR", help="Specs, or deltas to go on with.")
]
Data = Annotated[Path, typer.Option("--data", metavar="FILE", help="Rows: .jsonl or .csv.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="For the deltas.")]
Model = Annotated[
    str | None, typer.Option("--model", "-m", metavar="MODEL", help="A folder or a hub name.")
]
Task = Annotated[
    Literal["classification", "summarization"], typer.Option("--task", help="What to learn.")
]
Evaluation = Annotated[
    Path | None, typer.Option("--eval", metavar="FILE", help="Rows to score the result on.")
]
TextColumn = Annotated[str, typer.Option("--text-column")]
LabelColumn = Annotated[str, typer.Option("--label-column", help="Classification.")]
TargetColumn = Annotated[str, typer.Option("--target-column", help="Summarization.")]
NoHead = Annotated[bool, typer.Option("--no-head", help="Leave a classifier's head as it is.")]
KeepMlp = Annotated[
    bool, typer.Option("--keep-mlp", help="Save what trains, not its constants evaluated.")
]


@dataclass(frozen=True)
class Rows:
    """What to learn from and to score on, by task and the names of its two columns."""

    task: str
    columns: tuple[str, str]
    train: Sequence[Row]
    test: Sequence[Row]

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes in the data, where there are classes: numbers in their order, names in theirs."""
        return _labels(self.train, self.columns[1]) if self.task == "classification" else ()


def train(
    specs: Specs,
    data: Data,
    output: Output,
    model: Model = None,
    random_weights: options.RandomWeights = False,
    task: Task = "classification",
    evaluation: Evaluation = None,
    text_column: TextColumn = "text",
    label_column: LabelColumn = "label",
    target_column: TargetColumn = "summary",
    sets: options.Set = None,
    words: options.Words = None,
    no_head: NoHead = False,
    keep_mlp: KeepMlp = False,
    epochs: recipes.Epochs = None,
    lr: recipes.Rate = None,
    batch: recipes.Batch = None,
    warmup: recipes.Warmup = None,
    label_smoothing: recipes.LabelSmoothing = None,
    max_length: recipes.MaxLength = None,
    max_target_length: recipes.MaxTargetLength = None,
    num_beams: recipes.NumBeams = None,
    seed: recipes.Seed = None,
) -> None:
    """Train a method on rows of text and save its deltas.

    A classifier's head trains along, unless --no-head.

    \b
    peftc train mam -m ./bert --data train.jsonl --eval test.jsonl -o deltas
    peftc train lora -m ./bart --task summarization --data train.csv -o deltas
    """
    recipe = recipes.recipe(
        epochs=epochs,
        lr=lr,
        batch=batch,
        warmup=warmup,
        label_smoothing=label_smoothing,
        max_length=max_length,
        max_target_length=max_target_length,
        num_beams=num_beams,
        seed=seed,
    )
    require_ours(output)
    second = label_column if task == "classification" else target_column
    rows = _rows(task, (text_column, second), data, evaluation)
    torch.manual_seed(recipe.seed)  # the deltas' own start
    if Path(specs[0]).is_dir():
        compiled = _continued(specs, model, sets or words)
    else:
        compiled = _started(specs, (sets, words), model, random_weights, rows, no_head)
    _run(compiled, directories.tokenizer(Path(specs[0]), compiled), rows, recipe, output, keep_mlp)


def _rows(task: str, columns: tuple[str, str], data: Path, evaluation: Path | None) -> Rows:
    with step(f"reading {data}"):
        test = read_rows(evaluation, columns) if evaluation else []
        return Rows(task, columns, read_rows(data, columns), test)


def _run(
    compiled: CompiledModel,
    tokenizer: Any,
    rows: Rows,
    recipe: Recipe,
    output: Path,
    keep_mlp: bool,
) -> None:
    """Train, score, save, and say so."""
    if tokenizer is None:
        raise options.OptionError(f"there is no tokenizer with {compiled.config.name_or_path}")
    say(table.render(compiled.plan, console().width))
    console(stderr=True).print(f"training on {len(rows.train)} rows ...")
    with redirect_stdout(sys.stderr):  # Trainer prints its logs
        result = _trained(compiled, tokenizer, rows, recipe)
    say(_result(result, rows.task, len(rows.test)))
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
    specs: Sequence[str],
    said: tuple[list[str] | None, str | None],
    model: str | None,
    random_weights: bool,
    rows: Rows,
    no_head: bool,
) -> CompiledModel:
    labels = rows.labels
    loaded = options.specs(_with_head(specs, labels, no_head), *said)
    if model is None:
        raise options.OptionError("--model is needed to train a spec")
    settings = {
        "id2label": dict(enumerate(labels)),
        "label2id": {label: i for i, label in enumerate(labels)},
    }
    backbone = options.backbone(
        model, random_weights, task=rows.task, settings=settings if labels else None
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


def _trained(compiled: CompiledModel, tokenizer: Any, rows: Rows, recipe: Recipe) -> TrainResult:
    train, test = (_columns(some, rows.columns) for some in (rows.train, rows.test))
    if rows.task == "summarization":
        return train_seq2seq(compiled, tokenizer, train, test if rows.test else None, recipe)
    known = {str(label): int(i) for label, i in (compiled.config.label2id or {}).items()}
    classes = [_indexed(some, known) for some in (train, test)]
    return train_classifier(
        compiled, tokenizer, classes[0], classes[1] if rows.test else None, recipe
    )


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
