"""The corpus: index stanzas to rows, a split without leakage, the shipped sample."""

from __future__ import annotations

from collections import Counter

import corpus
import pytest
from corpus import SECTIONS, load_packages, parse_index, read_sample

from peftc.errors import PeftcError

INDEX = """\
Package: foo-tools
Source: foo (1.2-3)
Description: play sounds from the shell
 A long text that is not read,
 over two lines.
Section: sound

Package: foo-doc
Source: foo
Section: contrib/sound
Description: play sounds from the shell

Package: bar
Section: games
Description: jump and run
Homepage: https://example.org

Package: libbar1
Section: libs
Description: a section that is not one of the ten

Package: empty
Section: net
"""


def test_stanzas() -> None:
    found = list(parse_index(INDEX.split("\n\n")))
    assert [(p.name, p.section, p.text, p.group) for p in found] == [
        ("foo-tools", "sound", "play sounds from the shell", "foo"),  # foo-doc says the same
        ("bar", "games", "jump and run", "bar"),
    ]


def test_the_sample_is_balanced_and_small() -> None:
    packages = list(read_sample())
    assert Counter(p.section for p in packages) == dict.fromkeys(SECTIONS, 500)
    assert len({p.text for p in packages}) == len(packages)
    assert corpus.SAMPLE.stat().st_size < 600_000
    assert (corpus.SAMPLE.parent / "README.md").is_file()


def test_the_split_leaks_nothing() -> None:
    loaded = load_packages("sample")
    assert (len(loaded.train), len(loaded.test)) == (4000, 1000)
    assert len(loaded.labels) == 10
    for key in ("name", "text", "group"):
        sides = [{getattr(p, key) for p in side} for side in (loaded.train, loaded.test)]
        assert not sides[0] & sides[1], key
    assert set(Counter(p.section for p in loaded.test).values()) == {100}


def test_the_same_each_time_and_smaller_is_a_part() -> None:
    assert load_packages("sample") == load_packages("sample")
    small, whole = load_packages("sample", 200, 50), load_packages("sample")
    assert (len(small.train), len(small.test)) == (200, 50)
    assert set(small.train) <= set(whole.train)


def test_no_index(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus.shutil, "which", lambda name: None)
    assert "sample" in load_packages("auto").origin
    with pytest.raises(PeftcError, match="no Debian package index"):
        load_packages("index")


def test_a_small_index(monkeypatch: pytest.MonkeyPatch) -> None:
    """`auto` falls back; `index` says what it has instead of another corpus under its name."""
    monkeypatch.setattr(corpus, "_index", lambda: parse_index(INDEX.split("\n\n")))
    assert "sample" in load_packages("auto").origin
    with pytest.raises(PeftcError, match="2 packages"):
        load_packages("index")


def test_wrong_source() -> None:
    with pytest.raises(PeftcError, match="'indx'"):
        load_packages("indx")  # type: ignore[arg-type]
