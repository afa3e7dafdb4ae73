"""`peftc specs` and `peftc schema`: the language and what is written in it; no torch."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from peftc.commands.console import raw


def specs(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Print this one.")] = None,
) -> None:
    """List the shipped specs, or print one: the start of your own.

    \b
    peftc specs
    peftc specs mam > my.yaml
    """
    from peftc import spec

    if name is not None:
        return raw(spec.find(name).read_text())
    loaded = [spec.load_spec(one) for one in spec.shipped()]
    width = max(len(one.name) for one in loaded)
    for one in loaded:
        arguments = ", ".join(f"{key}={value}" for key, value in one.arguments.items())
        raw(
            f"{one.name:<{width}}  {one.title}"
            + (f"\n{'':<{width}}  {arguments}" if arguments else "")
        )


def schema() -> None:
    """Print the JSON Schema of the spec language, for editors that complete and check.

    \b
    peftc schema > peftc.schema.json
    """
    from peftc import spec_schema

    raw(json.dumps(spec_schema.json_schema(), indent=2))
