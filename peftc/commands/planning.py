"""`peftc plan`: what a spec would do to a model; no weight is built or read."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftc.commands import options
from peftc.commands.console import console, raw, say, step


def plan(
    specs: options.Specs,
    model: options.Model,
    random_weights: options.RandomWeights = False,
    task: options.Task = None,
    num_labels: options.NumLabels = None,
    sets: options.Set = None,
    as_json: options.Json = False,
    sites: Annotated[
        bool, typer.Option("--sites", help="List every site and its tensors.")
    ] = False,
) -> None:
    """Show what a spec does to a model, without building weights.

    Prints the design table, the number of parameters, and every site that is left alone with the reason.

    \b
    peftc plan mam --model facebook/bart-large --random-weights
    peftc plan lora --set r=16 --model ./my-bert --json
    """
    spec = options.spec(specs, sets)
    built = options.backbone(model, random_weights, meta=True, task=task, num_labels=num_labels)
    from peftc import driver, table

    with step("tracing and planning"):
        found = driver.plan(built, spec)
    if as_json:
        return raw(json.dumps(table.data(found), indent=2))
    say(table.render(found, console().width))
    if sites:
        say(table.site_list(found))
