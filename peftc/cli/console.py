"""What every command says and how: results on stdout, progress on stderr, plain text in a pipe."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console, RenderableType

PIPE_WIDTH = 80


def console(stderr: bool = False) -> Console:
    """A console for the stream as it is now: colours on a terminal only, 80 columns in a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PIPE_WIDTH
    return Console(file=stream, width=width, highlight=False, markup=False, emoji=False)


def say(result: RenderableType = "") -> None:
    """A result, on stdout; text is wrapped at words, and nothing trails a line in a pipe."""
    out = console()
    if out.is_terminal:
        return out.print(result)
    with out.capture() as capture:
        out.print(result)
    raw("".join(f"{line.rstrip()}\n" for line in capture.get().splitlines()))


def raw(text: str) -> None:
    """Text as it is (JSON, YAML, graphs): never wrapped."""
    sys.stdout.write(text if text.endswith("\n") else text + "\n")


@contextmanager
def step(what: str) -> Iterator[Callable[[str], None]]:
    """A long step: a spinner on a terminal, lines in a pipe; both on stderr. Yields what names a part of it."""
    out = console(stderr=True)
    if out.is_terminal:
        with out.status(what) as status:
            yield status.update
        return

    def line(text: str) -> None:
        out.print(f"{text} ...", soft_wrap=True)

    line(what)
    yield line


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """A spinner for whoever looks at a terminal; nothing in a pipe."""
    out = console(stderr=True)
    if out.is_terminal:
        with out.status(what):
            yield
    else:
        yield
