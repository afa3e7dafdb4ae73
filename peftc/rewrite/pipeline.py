"""Pass and Pipeline: run a tuple of passes in order, verify, time and print after each."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeVar

from peftc.errors import PeftcError

T = TypeVar("T")
Q = TypeVar("Q", contravariant=True)


class Pass(Protocol[Q]):
    """A rewrite. `run` changes its subject and returns how many rewrites it made; zero is normal."""

    @property
    def name(self) -> str: ...

    def run(self, subject: Q) -> int: ...


class PassError(Exception):
    """A pass failed or left an invalid subject: our fault, not the user's."""


@dataclass(frozen=True)
class PassResult:
    name: str
    rewrites: int
    seconds: float


@dataclass(frozen=True)
class Pipeline:
    """What surrounds every pass: `verify` lists what is wrong, `after` sees the subject as it then is."""

    verify: Callable[[object], Sequence[str]] | None = None
    after: Callable[[str, object], None] | None = None

    def run(self, passes: Sequence[Pass[T]], subject: T) -> tuple[PassResult, ...]:
        """Run every pass in order."""
        return tuple(self._one(one, subject) for one in passes)

    def _one(self, one: Pass[T], subject: T) -> PassResult:
        start = time.perf_counter()
        try:
            rewrites = one.run(subject)
        except PeftcError:
            raise  # the user's to mend
        except Exception as error:
            raise PassError(f"pass '{one.name}': {error}") from error
        problems = self.verify(subject) if self.verify else ()
        if problems:
            raise PassError(f"after pass '{one.name}': " + "; ".join(problems))
        if self.after:
            self.after(one.name, subject)
        return PassResult(one.name, rewrites, time.perf_counter() - start)
