"""`peftc import` and `peftc export-peft`: adapters of Hugging Face PEFT."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from peftc.cli import directories, options
from peftc.cli import tables as table
from peftc.cli.console import console, say, step
from peftc.interchange import read as interchange
from peftc.interchange.write import export_peft as write

Directory = Annotated[Path, typer.Argument(metavar="ADAPTER_DIR", help="What PEFT saved.")]
Output = Annotated[Path, typer.Option("--output", "-o", metavar="DIR", help="A new directory.")]


def import_(
    directory: Directory,
    model: options.Model,
    output: Output,
    task: options.Task = None,
    num_labels: options.NumLabels = None,
) -> None:
    """Turn a PEFT adapter into a spec and deltas.

    LoRA, rsLoRA, DoRA, IA3, VeRA, LoHa, LoKr, prompts and prefixes, with modules saved whole.

    \b
    peftc import ./peft-lora --model ./my-bert --task classification -o deltas
    """
    directories.new_directory(output)
    backbone = options.backbone(model, task=task, num_labels=num_labels)

    with step("importing"):
        compiled = interchange.import_peft(directory, backbone)
    say(table.render(compiled.plan, console().width))
    directories.save(compiled, output, directories.tokenizer(directory, compiled), stored=False)


def export_peft(
    deltas: Annotated[Path, typer.Argument(metavar="DIR", help="A directory of deltas.")],
    output: Output,
    model: options.Backbone = None,
) -> None:
    """Write LoRA-like deltas as a PEFT adapter, for vLLM and others.

    \b
    peftc export-peft deltas -o adapter
    """
    directories.new_directory(output)
    compiled = directories.load(deltas, model)

    modules = write(compiled, output)
    say(f"wrote {output}: a LoRA adapter at {len(modules)} modules")
