"""`peftc compile`: a spec onto a model with its weights: certificate, design table, deltas on disk."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import passes
from peftc import driver
from peftc.cli import directories, options
from peftc.cli import tables as table
from peftc.cli.console import console, raw, say, step
from peftc.graph.arguments import seeded_inputs
from peftc.model import backbones
from peftc.model.compiled import CompiledModel, run_program
from peftc.rewrite import verify
from peftc.rewrite.pipeline import PassResult
from peftc.rewrite.text import subject_text
from peftc.store.directory import require_ours


def compile(  # the name of the command
    specs: options.Specs,
    model: options.Model,
    random_weights: options.RandomWeights = False,
    task: options.Task = None,
    num_labels: options.NumLabels = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Directory for the deltas [./SPEC-MODEL].")
    ] = None,
    no_save: Annotated[bool, typer.Option("--no-save", help="Write nothing.")] = False,
    sets: options.Set = None,
    words: options.Words = None,
    print_after: Annotated[
        list[str] | None,
        typer.Option("--print-after", metavar="PASS", help="Print the graph after it."),
    ] = None,
    print_after_all: Annotated[
        bool, typer.Option("--print-after-all", help="Print the graph after every pass.")
    ] = False,
    time_passes: Annotated[bool, typer.Option("--time-passes", help="Time every pass.")] = False,
    without: Annotated[
        list[str] | None,
        typer.Option(
            "--without", metavar="PASS", help="Leave out a pass that makes graphs lean; repeatable."
        ),
    ] = None,
    verify_each: Annotated[
        bool,
        typer.Option("--verify-each", help="Run the graph after every pass, against the backbone."),
    ] = False,
) -> None:
    """Compile a spec onto a model, check it by numbers, save the deltas.

    \b
    peftc compile lora --model ./my-bert --task classification --num-labels 10
    peftc compile mam --model facebook/bart-large --random-weights --time-passes
    """
    loaded = options.specs(specs, sets, words)
    name = options.name_of(loaded)
    target = None if no_save else output or Path(f"{name}-{_basename(model)}")

    _check_without(without or [])
    if target is not None:
        require_ours(target)
    backbone = options.backbone(model, random_weights, task=task, num_labels=num_labels)
    inputs = seeded_inputs(backbone)
    with step("running the backbone"):
        bare = driver.outputs(backbone, inputs)

    def after(name: str, subject: object) -> None:
        if print_after_all or name in (print_after or ()):
            raw(f"# after {name}\n{subject_text(subject)}")
        if verify_each and trace.model is not None:
            _compare(name, subject, trace.model, inputs, bare)

    trace = driver.Trace(after)
    with step("compiling"):
        torch.manual_seed(backbones.SEED)  # the deltas' own start
        compiled = driver.compile(
            backbone, loaded, example=inputs, trace=trace, without=without or ()
        )
        rewritten = driver.outputs(compiled, inputs)
    _check_passes(print_after or [], trace.results)
    say(table.render(compiled.plan, console().width))
    say(_certificate(bare, rewritten))
    if time_passes:
        say(_timings(trace.results))
    if target is not None:
        directories.save(compiled, target, backbones.tokenizer(model))


def _basename(model: str) -> str:
    name = Path(model).resolve().name if Path(model).is_dir() else model.rpartition("/")[2]
    return re.sub(r"[^\w.-]", "-", name)


def _check_passes(wanted: list[str], ran: list[PassResult]) -> None:
    known = list(dict.fromkeys(one.name for one in ran))
    for name in wanted:
        if name not in known:
            raise options.OptionError(f"compile runs no pass '{name}'; it runs {', '.join(known)}")


def _check_without(names: list[str]) -> None:
    lean = [one.name for one in passes.LEAN]
    for name in names:
        if name not in lean:
            raise options.OptionError(
                f"--without: '{name}' cannot be left out; these passes can: {', '.join(lean)}"
            )


def _certificate(bare: Mapping[str, Any], rewritten: Mapping[str, Any]) -> str:

    change = verify.difference(bare, rewritten)
    scale = verify.magnitude(bare)
    verdict = "identity at init, bit for bit" if change == 0 else f"outputs are up to {scale:.3g}"
    return f"certificate: max |compiled - base| = {change:.3g} ({verdict})"


def _compare(
    name: str,
    subject: Any,
    compiled: CompiledModel,
    inputs: Mapping[str, Any],
    bare: Mapping[str, Any],
) -> None:
    with torch.no_grad():
        change = verify.difference(run_program(compiled, subject, inputs), bare)
    say(f"after {name}: invariants hold, max |graph - base| = {change:.3g}")


def _timings(results: list[PassResult]) -> str:
    lines = [f"  {one.name:<16}{one.rewrites:>8} rewrites{one.seconds:>10.4f} s" for one in results]
    return "passes:\n" + "\n".join(lines)
