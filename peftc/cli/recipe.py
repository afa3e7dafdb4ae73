"""How `peftc train` trains: the options of a recipe, and the recipe of those that were given."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from peftc.training.recipes import Recipe

Epochs = Annotated[float | None, typer.Option("--epochs")]
Rate = Annotated[float | None, typer.Option("--lr", help="Learning rate.")]
Batch = Annotated[int | None, typer.Option("--batch", min=1, help="Rows in a step.")]
Warmup = Annotated[float | None, typer.Option("--warmup", help="Share of the steps.")]
LabelSmoothing = Annotated[float | None, typer.Option("--label-smoothing")]
MaxLength = Annotated[int | None, typer.Option("--max-length", min=2, help="Tokens of a text.")]
MaxTargetLength = Annotated[
    int | None, typer.Option("--max-target-length", min=2, help="Tokens of a target.")
]
NumBeams = Annotated[int | None, typer.Option("--num-beams", min=1)]
Seed = Annotated[int | None, typer.Option("--seed")]


def recipe(**given: Any) -> Recipe:
    """The recipe with these fields, where they are not None."""
    return Recipe(**{name: value for name, value in given.items() if value is not None})
