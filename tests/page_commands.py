"""docs/commands.md: every command with its options, as their help has them."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import typer

from peftc.cli.main import COMMANDS, app, command

HEAD = """# Commands

What `peftc COMMAND --help` says of each, on one page; `tests/page_commands.py` writes it (`pytest --accept
tests/test_docs.py`). Results go to stdout, progress to stderr; a pipe gets plain text of 80 columns. Exit codes: 0 done,
1 the input is wrong (one message, no traceback; [all of them](messages.md)), 2 our fault, 130 interrupted.
"""


def page() -> str:
    return "\n".join([HEAD, *(line for name in COMMANDS for line in _command(name))])


def _command(name: str) -> Iterator[str]:
    program = typer.main.get_command(app(name)).commands[name]  # type: ignore[attr-defined]
    context = program.make_context(name, [], resilient_parsing=True)
    said, _, examples = inspect.cleandoc(command(name).__doc__ or "").partition("\b\n")
    arguments = [one for one in program.params if not one.opts[0].startswith("-")]
    yield f"## `{' '.join(['peftc', name, *(one.metavar for one in arguments)])}`\n"
    yield f"{said.strip()}\n"
    yield from ("```console", *(f"$ {one}" for one in examples.strip().splitlines()), "```\n")
    if program.params:
        yield from ("| | |", "|---|---|")
        for one in program.params:
            names, what = one.get_help_record(context)
            yield f"| `{_plain(names)}` | {_plain(what)} |"
        yield ""


def _plain(text: str) -> str:
    """Help as a cell of a table, without the types that typer adds."""
    types = {"float": "NUMBER", "int": "NUMBER", "int range": "NUMBER"}
    named = re.sub(r" <([^>]*)>", lambda m: f" {types[m[1]]}" if m[1] in types else "", text)
    return " ".join(named.split()).replace("|", "\\|")
