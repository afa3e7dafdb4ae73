"""How `peftc train` and `peftc eval` get a recipe: the options that stand over it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from peftc.cli import options
from peftc.training.recipe import Recipe, load_recipe
from peftc.training.tasks import TASKS

Name = Annotated[
    str | None,
    typer.Option("--recipe", "-r", metavar="NAME|FILE", help="A shipped recipe or a YAML file."),
]
Task = Annotated[
    options.TaskName | None, typer.Option("--task", metavar="TASK", help=f"{', '.join(TASKS)}.")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data", metavar="DATA", help="JSON lines, CSV, Parquet, Arrow, a folder, a hub name."
    ),
]
TextColumn = Annotated[str | None, typer.Option("--text-column")]
PairColumn = Annotated[str | None, typer.Option("--pair-column", help="A second text.")]
LabelColumn = Annotated[str | None, typer.Option("--label-column", help="Classes, tags, numbers.")]
TargetColumn = Annotated[str | None, typer.Option("--target-column", help="Texts to write.")]
Epochs = Annotated[float | None, typer.Option("--epochs")]
Steps = Annotated[int | None, typer.Option("--steps", min=1, help="Instead of epochs.")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Rows in a step.")]
Warmup = Annotated[float | None, typer.Option("--warmup", help="Share of the steps.")]
LabelSmoothing = Annotated[float | None, typer.Option("--label-smoothing")]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=2, help="Tokens of a text.")]
MaxTargetLength = Annotated[
    int | None, typer.Option("--max-target-length", min=2, help="Tokens of a target.")
]
NumBeams = Annotated[int | None, typer.Option("--num-beams", min=1)]
Patience = Annotated[
    int | None,
    typer.Option("--patience", min=1, help="Evaluations without a better score that end it."),
]
Stream = Annotated[bool, typer.Option("--stream", help="Read while training; needs --steps.")]
Seed = Annotated[int | None, typer.Option("--seed")]


def chosen(name: str | None, task: str | None) -> Recipe:
    """The recipe of that name, or the one for small data of a task."""
    if name is not None:
        return load_recipe(name).using(task=task)
    wanted = task or "classification"
    if wanted in ("classification", "summarization"):
        return load_recipe(wanted)
    return Recipe(wanted, wanted, train=load_recipe("classification").train)


def columns(
    recipe: Recipe, text: str | None, pair: str | None, label: str | None, target: str | None
) -> Recipe:
    """The recipe with the columns that the command line names; one that its task does not read is ignored."""
    given = {"text": text, "pair": pair, "label": label, "target": target}
    known = TASKS[recipe.task].columns
    return recipe.using(columns={k: v for k, v in given.items() if v is not None and k in known})


def settings(**given: Any) -> dict[str, Any]:
    """Options as `Recipe.using` takes them."""
    beams = given.pop("num_beams")
    return {**given, "generation": {"num_beams": beams} if beams else None}


def source(given: str | None, recipe: Recipe) -> str:
    """The data of the command line, or the recipe's own."""
    if found := given or recipe.data:
        return found
    raise options.OptionError(f"recipe '{recipe.name}' names no data; give --data")


def evaluation(given: str | None, data: str, recipe: Recipe) -> str | None:
    """What to score on: --eval, or the same data where it has a split of its own for that."""
    if given is not None or Path(data).is_file():
        return given
    return data if "eval" in recipe.splits else None
