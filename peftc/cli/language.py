"""`peftc specs`, `peftc new` and `peftc schema`: the language and what is written in it; no torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from peftc.cli.console import raw
from peftc.errors import PeftcError
from peftc.language import schema as spec_schema
from peftc.language import shelf
from peftc.language.reader import load_spec
from peftc.language.skeleton import skeleton


def specs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
) -> None:
    """List the shipped specs, or print one: the start of your own.

    \b
    peftc specs
    peftc specs mam > my.yaml
    """

    if name is not None:
        return raw(shelf.find(name).read_text())
    loaded = [load_spec(one) for one in shelf.shipped()]
    width = max(len(one.name) for one in loaded)
    for one in loaded:
        arguments = ", ".join(f"{key}={value}" for key, value in one.arguments.items())
        raw(
            f"{one.name:<{width}}  {one.title}"
            + (f"\n{'':<{width}}  {arguments}" if arguments else "")
        )


def new(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Of the method.")],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", metavar="FILE", help="Instead of NAME.yaml.")
    ] = None,
) -> None:
    """Write a commented skeleton of a spec to NAME.yaml.

    \b
    peftc new my_method
    peftc plan my_method.yaml --model ./bert
    """
    if not name.isidentifier():
        raise PeftcError(f"'{name}' is not a name: letters, digits and _")
    path = output or Path(f"{name}.yaml")
    try:
        with path.open("x") as file:
            file.write(skeleton(name))
    except OSError as error:
        reason = "exists already" if isinstance(error, FileExistsError) else str(error.strerror)
        raise PeftcError(f"{path}: {reason}") from error
    raw(f"wrote {path}: edit it, then peftc plan {path} --model MODEL")


def schema() -> None:
    """Print the JSON Schema of the spec language, for editors that complete and check.

    \b
    peftc schema > peftc.schema.json
    """

    raw(json.dumps(spec_schema.json_schema(), indent=2))
