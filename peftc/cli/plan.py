"""`peftc plan`: what a spec would do to a model; no weight is built or read."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from transformers import PreTrainedModel

from peftc import driver
from peftc.cli import listing, options, steps
from peftc.cli import tables as table
from peftc.cli.console import console, raw, say, step
from peftc.cli.picture import picture
from peftc.language.reader import load_spec
from peftc.saved import saved

PICTURE = 80  # columns


def plan(
    model: options.Model,
    specs: options.OptionalSpecs = None,
    random_weights: options.RandomWeights = False,
    task: options.Task = None,
    num_labels: options.NumLabels = None,
    sets: options.Set = None,
    as_json: options.Json = False,
    sites: Annotated[
        bool, typer.Option("--sites", help="List the model's sites, or those that a spec changes.")
    ] = False,
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget", metavar="6.7%", help="Solve each spec's size for a share, or a number."
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", metavar="ROWS", help="Count what a training step of so many rows saves."
        ),
    ] = None,
    length: Annotated[
        int | None,
        typer.Option("--length", metavar="TOKENS", help="Tokens of each row of --batch."),
    ] = None,
) -> None:
    """Show what a spec does to a model, without building weights.

    Prints the design table, the number of parameters, a small picture of the layers, and every site that is left alone
    with the reason; with --batch the bytes that a training step saves for backward, by site and in all.

    \b
    peftc plan mam --model facebook/bart-large --random-weights
    peftc plan lora --set r=16 --model ./my-bert --json
    peftc plan --sites --model ./my-bert
    peftc plan lora mam --budget 1% --model ./my-bert
    peftc plan lora --batch 8 --length 512 --model ./my-bert
    """
    if not specs and not sites:
        raise options.OptionError("name a spec, or ask for --sites")
    if length is not None and batch is None:
        raise options.OptionError("--length is of the rows of a batch: say --batch too")
    if batch is not None and (not specs or budget is not None):
        raise options.OptionError(
            "--batch counts what one step with a spec saves: name a spec, no --budget"
        )
    if budget is not None and (not specs or sets):
        raise options.OptionError(
            "--budget sizes specs one by one, as they are: name a spec, no --set"
        )
    loaded = options.specs(specs, sets) if specs and not budget else None
    built = options.backbone(model, random_weights, meta=True, task=task, num_labels=num_labels)

    if budget is not None:
        return _budgets(built, specs or [], budget, as_json)
    if loaded is None:
        with step("tracing"):
            places = driver.survey(built)
        return (
            raw(json.dumps(listing.places_data(places), indent=2))
            if as_json
            else say(listing.places(places))
        )
    with step("tracing and planning"):
        found = driver.plan(built, loaded)
    step_of = None
    if batch is not None:
        with step("counting what a training step saves"):
            step_of = saved(built, loaded, batch, length)
    if as_json:
        more = {} if step_of is None else {"saved": steps.data(step_of)}
        return raw(json.dumps(table.data(found) | more, indent=2))
    say(table.render(found, console().width))
    say(picture(found, min(console().width, PICTURE), not console().is_terminal))
    if sites:
        say(table.site_list(found))
    if step_of is not None:
        say(steps.render(step_of))


def _budgets(model: PreTrainedModel, names: list[str], budget: str, as_json: bool) -> None:
    """What each method gets for the budget: one line each."""
    with step(f"fitting {len(names)} specs to {budget}"):
        found = driver.within(model, [load_spec(name) for name in names], budget)
    rows = listing.budget_rows(found)
    if as_json:
        return raw(json.dumps(rows, indent=2))
    say(listing.columns(rows))
