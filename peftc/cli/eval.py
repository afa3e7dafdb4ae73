"""`peftc eval`: the metrics of a recipe on data, for deltas or a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftc.cli import directories, options
from peftc.cli import recipe as recipes
from peftc.cli.console import raw, say, step
from peftc.cli.train import scores
from peftc.training import data as tables
from peftc.training import report, run


def evaluate(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Deltas, or a checkpoint.")],
    data: recipes.Data = None,
    recipe: recipes.Name = None,
    model: options.Backbone = None,
    task: recipes.Task = None,
    text_column: recipes.TextColumn = None,
    pair_column: recipes.PairColumn = None,
    label_column: recipes.LabelColumn = None,
    target_column: recipes.TargetColumn = None,
    batch: recipes.Batch = None,
    max_length: recipes.MaxLength = None,
    num_beams: recipes.NumBeams = None,
    as_json: options.Json = False,
) -> None:
    """Score deltas or a checkpoint on data, by the recipe that they were trained by.

    \b
    peftc eval deltas --data test.jsonl
    peftc eval merged --data test.jsonl --recipe sst2
    """
    beside = report.recipe_beside(directory) if recipe is None and task is None else None
    chosen = recipes.columns(
        beside or recipes.chosen(recipe, task),
        text_column,
        pair_column,
        label_column,
        target_column,
    ).using(
        **recipes.settings(
            per_device_eval_batch_size=batch, max_length=max_length, num_beams=num_beams
        )
    )
    source = recipes.source(data, chosen)
    with step(f"reading {source}"):
        rows = tables.read(source, chosen, "eval")
    loaded = directories.model_of(directory, model)
    tokenizer = directories.tokenizer(directory, loaded)
    if tokenizer is None:
        raise options.OptionError(
            f"there is no tokenizer with {directory}; save one beside its weights"
        )
    with step("evaluating"):
        metrics, predictions = run.evaluate(loaded, tokenizer, rows, chosen)
    if as_json:
        return raw(json.dumps(metrics))
    say("\n".join(scores(metrics, len(predictions))))
