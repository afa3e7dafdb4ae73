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
    one = typer.main.get_command(app(name)).commands[name]  # type: ignore[attr-defined]
    said, _, examples = inspect.cleandoc(command(name).__doc__ or "").partition("\b\n")
    arguments = [param for param in one.params if not param.opts[0].startswith("-")]
    given = " ".join(str(param.metavar) for param in arguments)
    yield f"## `peftc {name}{f' {given}' if given else ''}`\n"
    yield f"{said.strip()}\n"
    yield "```console"
    yield from (f"$ {line}" for line in examples.strip().splitlines())
    yield "```\n"
    yield from ("| | |", "|---|---|")
    for param in one.params:
        yield f"| {_names(param)} | {_help(param)} |"
    yield ""


def _names(param: typer.CallbackParam) -> str:
    """`-m`, `--model MODEL`; of an argument how it is shown."""
    if not param.opts[0].startswith("-"):
        return f"`{param.metavar}`"
    value = "" if getattr(param, "is_flag", False) else f" {param.metavar or param.type.name.upper()}"
    return ", ".join(f"`{one}`" for one in sorted(param.opts, key=len)).removesuffix("`") + f"{value}`"


def _help(param: typer.CallbackParam) -> str:
    said = (getattr(param, "help", None) or "").replace("|", "\\|")
    needed = " Needed." if param.required and param.opts[0].startswith("-") else ""
    default = param.default
    shown = "" if default in (None, False, ()) or callable(default) else f" [{default}]"
    return re.sub(r"\s+", " ", f"{said}{needed}{shown}").strip()
