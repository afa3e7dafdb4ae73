"""`peftc merge`: deltas into the weights of their backbone, as far as algebra goes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import PreTrainedModel

from peftc.cli import directories, options
from peftc.cli.console import say, step
from peftc.graph.quantized import quantized
from peftc.language.resolved import digest
from peftc.merging import MergeError
from peftc.merging import merge as fold
from peftc.model.compiled import CompiledModel
from peftc.model.saving import fingerprint_under
from peftc.rewrite.folding import Report
from peftc.store.directory import write_directory
from peftc.store.versions import versions

REST = "deltas"  # the folder in OUT for what could not fold
REPORT = "merge_report.json"


def merge(
    deltas: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of deltas.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="A new directory.")],
    model: options.Backbone = None,
    dequantize: Annotated[
        bool, typer.Option("--dequantize", help="Make ordinary weights of quantised ones.")
    ] = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Write what is left as deltas in OUT/deltas.")
    ] = False,
) -> None:
    """Fold deltas into their backbone and write an ordinary Hugging Face checkpoint.

    What cannot fold is told with the reason; then nothing is written, unless
    --partial is given. Exit code 1 in that case.

    \b
    peftc merge lora-my-bert -o merged
    peftc merge mam-my-bert -o merged --partial
    """
    directories.new_directory(output)
    compiled = directories.load(deltas, model)

    with step("folding"):
        merged, report = fold(compiled, dequantize=dequantize)
    say(report_text(report))
    if report.kept and not partial:
        raise MergeError(
            f"{len(report.kept)} of {len(report.outcomes)} deltas do not fold, so there is no ordinary checkpoint; "
            "--partial writes them beside a backbone with what folded, peftc export takes them as they are"
        )
    tokenizer = directories.tokenizer(deltas, compiled)

    def fill(directory: Path) -> None:
        plain: PreTrainedModel = merged
        if isinstance(merged, CompiledModel):
            _save_rest(merged, directory / REST, output)
            plain = merged.backbone
        # transformers does not turn back what it read a quantised checkpoint by.
        plain.save_pretrained(directory, save_original_format=not quantized(compiled.backbone))
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        about = {**_about(compiled, report), "deltas": str(deltas.resolve())}
        (directory / REPORT).write_text(json.dumps(about, indent=1) + "\n")

    write_directory(output, fill)
    say(_written(output, report))


def _about(compiled: CompiledModel, report: Report) -> dict[str, Any]:
    """What a merged checkpoint was made of, and with."""
    return {
        "versions": versions(),
        "specs": {name: digest(plan.spec) for name, plan in compiled.parts().items()},
        "backbone": {
            "name": compiled.config.name_or_path,
            "class": type(compiled).__name__,
            "fingerprint": fingerprint_under(compiled, compiled.in_use),
        },
        "folded": len(report.folded),
        "kept": len(report.kept),
        "error": report.error,
    }


def _save_rest(merged: CompiledModel, directory: Path, output: Path) -> None:
    """The deltas left, which name the folded checkpoint as their backbone."""
    merged.config.name_or_path = str(output.resolve())
    merged.save_pretrained(directory)


def report_text(report: Report) -> str:
    """What folded, what stayed with the op that kept it, and by how much the output moved."""
    lines = [f"folded {len(report.folded)} of {len(report.outcomes)} deltas into the weights"]
    reasons = Counter((one.edit.rpartition(":")[2], one.note) for one in report.kept)
    lines += [f"kept {count} {method}: {note}" for (method, note), count in reasons.items()]
    lines += [
        f"max |folded - unfolded|  {report.error:.3g}  (outputs are up to {report.scale:.3g})",
        f"max |unfolded - base|    {report.changed:.3g}",
    ]
    before, after = report.held
    if before != after:
        lines.append(f"bytes of the backbone    {before:,} -> {after:,}")
    if report.changed == 0:
        lines.append("the deltas change nothing: were they trained?")
    return "\n".join(lines)


def _written(output: Path, report: Report) -> str:
    if not report.kept:
        return f"wrote {output}: an ordinary checkpoint, load it with from_pretrained('{output}')"
    return (
        f"wrote {output}: the backbone with what folded, and {output / REST}: the {len(report.kept)} "
        f"deltas left, load them with peftc.load('{output / REST}')"
    )
