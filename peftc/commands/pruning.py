"""`peftc prune`: the largest of what deltas change in the weights, to an exact number."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from peftc.commands import merging, options
from peftc.commands.compiling import save
from peftc.commands.console import say, step

if TYPE_CHECKING:
    from peftc.pruning import Pruning


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
    options.new_directory(output)
    compiled = merging.load(deltas, model)
    from peftc import pruning

    with step("pruning"):
        pruned, report = pruning.prune(compiled, keep)
    say(report_text(report))
    save(pruned, output, options.tokenizer(deltas, compiled))


def report_text(report: Pruning) -> str:
    """How many numbers stayed, of how many, and how far the output moved."""
    share = 100 * report.kept / report.backbone
    return (
        f"kept {report.kept:,} of {report.changed:,} numbers: {share:.4g} % of the backbone's "
        f"{report.backbone:,}\n"
        f"max |pruned - unpruned|  {report.moved:.3g}  (outputs are up to {report.scale:.3g})"
    )
