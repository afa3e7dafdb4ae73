"""Patterns of PEFT's configurations: regular expressions for module paths, matched in bounded time.

Python's own matcher tries every way to split a text, which a pattern from a file can make endless. Here a pattern
maps the positions where it may start to those where it may end, each once: time is bounded by pattern x path x path.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import TypeVar

from peftc.errors import PeftcError

T = TypeVar("T")
MAX_LENGTH, MAX_NESTING, MAX_COUNT = 500, 12, 1000
# From one position in a text to all that a part of a pattern may end at.
Match = Callable[[str, int], frozenset[int]]


class PatternError(PeftcError):
    """A pattern that is no regular expression, or one of a kind that is not read here."""


def first(patterns: Iterable[tuple[str, T]], path: str, default: T) -> T:
    """The value of the first pattern that `path` ends with, at a dot; PEFT's `get_pattern_key`.

    Raises PatternError.
    """
    for pattern, value in patterns:
        if matches(pattern, path):
            return value
    return default


def matches(pattern: str, path: str) -> bool:
    """As `re.match(rf"(.*\\.)?({pattern})$", path)`. Raises PatternError."""
    compiled = _compiled(pattern)
    starts = [0, *(i + 1 for i, one in enumerate(path) if one == ".")]
    return any(len(path) in compiled(path, start) for start in starts)


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> Match:
    try:
        if len(pattern) > MAX_LENGTH:
            raise PatternError(f"longer than {MAX_LENGTH} characters")
        re.compile(pattern)
        return _Parser(pattern).whole()
    except (re.error, RecursionError, OverflowError, PatternError) as error:
        raise PatternError(
            f"the pattern '{pattern[:80]}' cannot be used: {error}; name the modules instead"
        ) from error


class _Parser:
    """The part of Python's regular expressions that names of modules need; `re` has compiled the pattern."""

    def __init__(self, pattern: str) -> None:
        self.pattern, self.at, self.depth = pattern, 0, 0

    def whole(self) -> Match:
        found = self.either()
        if self.at < len(self.pattern):
            raise PatternError(f"'{self.pattern[self.at]}' at {self.at}")
        return found

    def peek(self) -> str:
        return self.pattern[self.at : self.at + 1]

    def take(self, count: int = 1) -> str:
        text = self.pattern[self.at : self.at + count]
        self.at += count
        return text

    def either(self) -> Match:
        """`a|b|c`"""
        parts = [self.sequence()]
        while self.peek() == "|":
            self.take()
            parts.append(self.sequence())
        return _each(lambda text, at: {end for one in parts for end in one(text, at)})

    def sequence(self) -> Match:
        parts: list[Match] = []
        while self.peek() not in ("", "|", ")"):
            parts.append(self.repeated())

        def run(text: str, at: int) -> set[int]:
            ends = {at}
            for one in parts:
                ends = {end for start in ends for end in one(text, start)}
            return ends

        return _each(run)

    def repeated(self) -> Match:
        """An atom and how often: `*`, `+`, `?`, `{2}`, `{2,}`, `{2,5}`, lazy or not: both may end alike."""
        one = self.atom()
        counted = re.compile(r"\{(\d*)(,?)(\d*)\}").match(self.pattern, self.at)
        if self.peek() and self.peek() in "*+?":
            least, most = {"*": (0, None), "+": (1, None), "?": (0, 1)}[self.take()]
        elif counted and (counted[1] or counted[3]):
            self.take(len(counted[0]))
            least = int(counted[1] or 0)
            most = int(counted[3]) if counted[3] else None if counted[2] else least
        else:
            return one
        if max(least, most or 0) > MAX_COUNT:
            raise PatternError(f"it repeats more than {MAX_COUNT} times")
        if self.peek() == "+":
            raise PatternError("a possessive repeat")
        if self.peek() == "?":
            self.take()
        return _each(lambda text, at: _repeat(one, text, at, least, most))

    def atom(self) -> Match:
        char = self.take()
        if char == "(":
            return self.group()
        if char == "^":
            return _each(lambda text, at: {at} if at == 0 else set())
        if char == "$":
            return _each(lambda text, at: {at} if at == len(text) else set())
        if char == "[":
            char += self.rest_of_class()
        elif char == "\\":
            char += self.take()
            if char[1].isalnum() and char[1] not in "dDwWsS":
                raise PatternError(f"'{char}'")
        single = re.compile(char)  # of one character: nothing to search for
        return _each(lambda text, at: {at + 1} if single.fullmatch(text, at, at + 1) else set())

    def rest_of_class(self) -> str:
        start = self.at
        if self.peek() == "^":
            self.take()
        self.take()  # a bracket here is one of the class
        while self.peek() != "]":
            self.take(2 if self.peek() == "\\" else 1)
        self.take()
        return self.pattern[start : self.at]

    def group(self) -> Match:
        if self.peek() == "?" and self.take(2) != "?:":
            raise PatternError("a group with '(?' and more")
        self.depth += 1
        if self.depth > MAX_NESTING:
            raise PatternError(f"groups nested deeper than {MAX_NESTING}")
        found = self.either()
        self.depth -= 1
        self.take()
        return found


def _each(run: Callable[[str, int], Iterable[int]]) -> Match:
    """Each position is tried once in each text."""
    return lru_cache(maxsize=4096)(lambda text, at: frozenset(run(text, at)))


def _repeat(one: Match, text: str, at: int, least: int, most: int | None) -> set[int]:
    ends = {at}
    for _ in range(least):
        ends = {end for start in ends for end in one(text, start)}
    found, new, count = set(ends), ends, least
    while new and (most is None or count < most):
        new = {end for start in new for end in one(text, start)} - found
        found |= new
        count += 1
    return found
