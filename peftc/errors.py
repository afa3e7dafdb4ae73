"""Errors that are the user's to mend: place, fact, fix."""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable
from dataclasses import dataclass


class PeftcError(Exception):
    """The input is wrong. The message says where, what and how to mend it; no traceback is shown."""


class CaptureError(PeftcError):
    """A model that cannot be traced to one graph."""


class UncachedError(CaptureError):
    """A model that keeps more from step to step than a cache holds, or does not take one, and runs without."""


@dataclass(frozen=True, order=True)
class Place:
    """A position in a file; lines and columns count from 1."""

    file: str
    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.file}:{self.line}:{self.column}"


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with a spec."""

    place: Place
    fact: str
    fix: str = ""

    def __str__(self) -> str:
        return f"{self.place}: {self.fact}" + (f" ({self.fix})" if self.fix else "")


class SpecError(PeftcError):
    """Everything that is wrong with a spec, in file order."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(sorted(problems, key=lambda one: (one.place, one.fact)))
        super().__init__("\n".join(str(one) for one in self.problems))


# What libraries written in C++ and Rust say of a write that found no room.
_NO_ROOM = ("No space left", "os error 28", "os error 27", "iostream error", "unexpected pos")


def no_room(error: BaseException) -> bool:
    """Whether a write failed because a disk, a quota or the limit of a file's size was reached."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    return any(words in str(error) for words in _NO_ROOM)


def fault(error: BaseException) -> str:
    """What was wrong with data that could not be read, for a message."""
    return f"it lacks {error}" if isinstance(error, KeyError) else str(error)


def number_of(count: int, what: str) -> str:
    """`1 argument`, `2 arguments`."""
    return f"{count} {what}" + "s" * (count != 1)


def suggest(word: str, candidates: Iterable[str]) -> str:
    """`did you mean 'shape'?` for the nearest candidate, or nothing."""
    found = difflib.get_close_matches(word, list(candidates), 1)
    return f"did you mean '{found[0]}'?" if found else ""
