"""Patterns of PEFT's configurations: the same answers as Python's `re`, in bounded time."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.errors import PeftcError
from peftc.interchange.patterns import first, matches

ATOMS = st.sampled_from(
    ["a", "b", "q", r"\.", ".", "[ab]", "[^a]", r"\d", r"\w", "1", "(?:ab|q)", "(a|)"]
)
COUNTS = st.sampled_from(["", "", "", "*", "+", "?", "{2}", "{1,2}", "{,2}", "{2,}", "*?"])
PARTS = st.tuples(ATOMS, COUNTS).map("".join)
SEQUENCES = st.lists(PARTS, max_size=5).map("".join)
PATTERNS = st.recursive(
    SEQUENCES,
    lambda inner: st.one_of(
        st.tuples(inner, inner).map("|".join),
        st.tuples(inner, COUNTS.filter(bool)).map(lambda one: f"({one[0]}){one[1]}"),
    ),
    max_leaves=4,
)


# The same ones each time, and short paths: Python's own `re`, the oracle, takes hours for some nested repeats.
@settings(max_examples=400, deadline=None, derandomize=True)
@given(PATTERNS, st.text("abq1.", max_size=6))
def test_as_python_does(pattern: str, path: str) -> None:
    want = re.match(rf"(.*\.)?({pattern})$", path)
    assert matches(pattern, path) == bool(want)


@pytest.mark.parametrize(
    "pattern",
    [r"(a+)+b", r"(.*)*x", r"((((a*)*)*)*)*b", r"(a|a)*b", r".*.*.*.*.*.*.*.*b", "(a?){50}a{50}b"],
)
def test_no_pattern_takes_long(pattern: str) -> None:
    start = time.process_time()
    assert not matches(pattern, "a" * 120)
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [
        ("(", "unterminated"),
        ("*a", "nothing to repeat"),
        (r"(a)\1", r"'\\1'"),
        ("(?=a)a", "a group with"),
        ("a" * 501, "longer than"),
        ("(" * 13 + "a" + ")" * 13, "nested deeper"),
        ("a{5000}", "more than 1000"),
        ("a++", "'a\\+\\+' cannot be used: a possessive repeat; name the modules instead"),
    ],
)
def test_what_is_refused(pattern: str, reason: str) -> None:
    with pytest.raises(PeftcError, match=reason):
        matches(pattern, "a")


def test_the_first_that_matches_counts() -> None:
    rows = [("layers.0.q", 1), (r"layers\.\d+\.q", 2), ("q", 3)]
    paths = ("model.layers.0.q", "model.layers.1.q", "model.q", "model.k")
    assert [first(rows, path, 0) for path in paths] == [1, 2, 3, 0]
