"""Normalize: what export leaves that no one reads; the printed graph is the golden."""

from __future__ import annotations

from collections.abc import Callable

from toys import program

from passes import Normalize
from peftc.rewrite.text import program_text


def test_normalize(golden: Callable[[str, str], None]) -> None:
    one = program()
    before = program_text(one)
    count = Normalize().run(one)
    text = program_text(one)
    assert count == before.count("\n") - text.count("\n") > 0
    golden("normalize.txt", text)
    assert Normalize().run(one) == 0
