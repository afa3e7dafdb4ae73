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
from peftc.language.reader import FOR_EDITORS, load_spec
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
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="SPEC", help="Start from this one, not from a skeleton."),
    ] = None,
) -> None:
    """Write a commented skeleton of a spec to NAME.yaml, or a copy of another spec.

    \b
    peftc new my_method
    peftc new my_lora --from lora
    peftc plan my_method.yaml --model ./bert
    """
    if not name.isidentifier():
        raise PeftcError(f"'{name}' is not a name: letters, digits and _")
    text = skeleton(name) if source is None else renamed(shelf.find(source).read_text(), name)
    path = output or Path(f"{name}.yaml")
    try:
        with path.open("x") as file:
            file.write(f"{text}# {FOR_EDITORS} $schema={shelf.directory() / shelf.SCHEMA}\n")
    except OSError as error:
        reason = "exists already" if isinstance(error, FileExistsError) else str(error.strerror)
        raise PeftcError(f"{path}: {reason}") from error
    raw(f"wrote {path}: edit it, then peftc plan {path} --model MODEL")


def renamed(text: str, name: str) -> str:
    """The text of a spec under another name, without the line that tells editors its schema."""
    lines = [one for one in text.splitlines() if not one.startswith(f"# {FOR_EDITORS}")]
    named = [f"name: {name}" if one.startswith("name:") else one for one in lines]
    if named == lines and f"name: {name}" not in lines:
        named.insert(
            next(i for i, one in enumerate(lines) if not one.startswith("#")), f"name: {name}"
        )
    return "\n".join([*named, ""])


def schema() -> None:
    """Print the JSON Schema of the spec language, for editors that complete and check.

    \b
    peftc schema > peftc.schema.json
    """

    raw(json.dumps(spec_schema.json_schema(), indent=2))
