"""`peftc prune`: the largest of what deltas change in the weights, to an exact number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftc.cli import directories, options
from peftc.cli.console import say, step
from peftc.prune import Pruning
from peftc.prune import prune as cut


def prune(
    deltas: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of deltas.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A new directory.")],
    keep: Annotated[
        str,
        typer.Option(
            "--keep", metavar="0.5%", help="Share of the backbone's parameters, or a number."
        ),
    ] = "0.5%",
    model: options.Backbone = None,
) -> None:
    """Keep the largest entries of what deltas change in the weights, exactly so many.

    `peftc train OUT` goes on within their mask. A trained head stays as it is.

    \b
    peftc prune diff-my-bert --keep 0.5% -o pruned
    peftc train pruned --data train.jsonl --lr 5e-5 -o tuned
    """
    directories.new_directory(output)
    compiled = directories.load(deltas, model)

    with step("pruning"):
        pruned, report = cut(compiled, keep)
    say(report_text(report))
    directories.save(pruned, output, directories.tokenizer(deltas, compiled))


def report_text(report: Pruning) -> str:
    """How many numbers stayed, of how many, and how far the output moved."""
    share = 100 * report.kept / report.backbone
    return (
        f"kept {report.kept:,} of {report.changed:,} numbers: {share:.4g} % of the backbone's "
        f"{report.backbone:,}\n"
        f"max |pruned - unpruned|  {report.moved:.3g}  (outputs are up to {report.scale:.3g})"
    )
