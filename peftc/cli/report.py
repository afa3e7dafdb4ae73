"""`peftc report`: one page of what the compiler did to a model, pictures of its layers, two specs side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from peftc.cli import options
from peftc.cli.console import say, step
from peftc.report import compare, report
from peftc.report.costs import Costs, costs
from peftc.report.subject import Subject, of_bundle, of_deltas, of_specs
from peftc.store.directory import MANIFEST, room


def report_(
    subjects: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[SPEC...|DIR|BUNDLE]", help="Specs that act as one, deltas, or an ONNX bundle."
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", "-m", metavar="MODEL", help="Of specs: a folder, a name on the hub."
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE.html", help="The page.")
    ] = None,
    svg: Annotated[
        Path | None, typer.Option("--svg", metavar="FILE.svg", help="One layer as a picture.")
    ] = None,
    layer: Annotated[
        int, typer.Option("--layer", min=1, help="Which sort of layer --svg draws, from 1.")
    ] = 1,
    compared: Annotated[
        bool, typer.Option("--compare", help="Two specs side by side: sites, parameters, costs.")
    ] = False,
    random_weights: options.RandomWeights = False,
    task: options.Task = None,
    num_labels: options.NumLabels = None,
    sets: options.Set = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows that costs are of.")] = 8,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens of each row.")] = 128,
    no_costs: Annotated[
        bool, typer.Option("--no-costs", help="Count no kernels, FLOPs and saved bytes.")
    ] = False,
) -> None:
    """Show what the compiler did to a model: its spec, its graph, its ONNX nodes, linked on one page.

    Needs no weights. With --compare the two subjects are specs, and a table is printed.

    \b
    peftc report mam -m facebook/bart-large --random-weights -o report.html
    peftc report bundle -o report.html
    peftc report lora -m ./my-bert --svg layer.svg
    peftc report --compare lora mam -m ./my-bert
    """
    named = subjects or []
    if not named:
        raise options.OptionError("name a spec, a directory of deltas or a bundle")
    if output is None and svg is None and not compared:
        raise options.OptionError("say what to write: -o report.html, or --svg layer.svg")
    if compared:
        return _compare(
            named, model, random_weights, task, num_labels, sets, (batch, length), output
        )
    directory = Path(named[0])
    if (directory / MANIFEST).is_file():
        if len(named) > 1 or sets:
            raise options.OptionError(f"{directory} is reported by itself, as it is: no --set")
        with step(f"tracing {directory}"):
            options.quiet()
            subject = (
                of_bundle(directory)
                if any(directory.glob("*.onnx"))
                else of_deltas(directory, model)
            )
    elif directory.is_dir():
        raise options.OptionError(
            f"{directory} is neither deltas nor a bundle; name one of these, or a spec and --model"
        )
    else:
        subject = _of_specs([named], model, random_weights, task, num_labels, sets)[0]
    if svg is not None:
        _write(svg, report.picture(subject, layer))
    if output is not None:
        spent = None if no_costs else _costs(subject, batch, length)
        _write(output, report.page(subject, spent).html())


def _of_specs(
    groups: list[list[str]],
    model: str | None,
    random_weights: bool,
    task: str | None,
    num_labels: int | None,
    sets: list[str] | None,
) -> list[Subject]:
    """A subject of each group of specs that act as one, on one model."""
    if model is None:
        raise options.OptionError("--model is needed: which model are these specs for?")
    loaded = [options.specs(names, sets) for names in groups]
    built = options.backbone(model, random_weights, meta=True, task=task, num_labels=num_labels)
    with step("tracing and planning"):
        return [of_specs(built, specs) for specs in loaded]


def _costs(subject: Subject, batch: int, length: int) -> Costs:
    with step(f"counting what {subject.title} costs"):
        return costs(subject, batch, length)


def _compare(
    named: list[str],
    model: str | None,
    random_weights: bool,
    task: str | None,
    num_labels: int | None,
    sets: list[str] | None,
    size: tuple[int, int],
    output: Path | None,
) -> None:
    if len(named) != 2:
        raise options.OptionError(f"--compare takes two specs, not {len(named)}")
    pair = _of_specs([[one] for one in named], model, random_weights, task, num_labels, sets)
    found = compare.lines(pair, [_costs(one, *size) for one in pair])
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
    table.add_column("")
    for one in (*(subject.title for subject in pair), "ratio"):
        table.add_column(one, justify="right", no_wrap=True)
    for line in found:
        table.add_row(line.what, *map(compare.said, line.values), line.ratio)
    say(table)
    if output is not None:
        _write(output, compare.page(pair, found))


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    with room(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        half = path.with_name(f".{path.name}")
        half.write_text(text, encoding="utf-8")
        half.replace(path)
    say(f"wrote {path} ({path.stat().st_size:,} bytes)")
