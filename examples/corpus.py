"""Real text: Debian's package descriptions, to be classified by section."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from peftc.errors import PeftcError

SECTIONS = (
    "admin",
    "devel",
    "games",
    "graphics",
    "net",
    "science",
    "sound",
    "text",
    "utils",
    "x11",
)
Source = Literal["auto", "index", "sample"]
SAMPLE = Path(__file__).parent / "data" / "debian_packages.jsonl.gz"
TRAIN_SIZE, TEST_SIZE, MAX_TEXT = 4000, 1000, 200


@dataclass(frozen=True)
class Package:
    """`text` is the synopsis; `group` the source package, whose binaries share words."""

    name: str
    section: str
    text: str
    group: str


@dataclass(frozen=True)
class Corpus:
    """Disjoint by source package. `origin` says where the text came from."""

    train: tuple[Package, ...]
    test: tuple[Package, ...]
    labels: tuple[str, ...]
    origin: str


def load_packages(
    source: Source = "auto", train_size: int = TRAIN_SIZE, test_size: int = TEST_SIZE
) -> Corpus:
    """Packages in ten sections, equally many of each, in an order that hashing alone decides.

    `source` is "index" (this machine's package index), "sample" (shipped with peftc) or "auto" (the
    index where it is large enough). Raises PeftcError where the one asked for is not.
    """
    if source not in get_args(Source):
        raise PeftcError(f"no corpus '{source}' (one of: {', '.join(get_args(Source))})")
    found = tuple(_index()) if source != "sample" else ()
    corpus = _split(found, "this machine's Debian package index", train_size, test_size)
    if source == "sample" or (source == "auto" and not _complete(corpus, train_size, test_size)):
        shipped = tuple(read_sample())
        corpus = _split(
            shipped, "the sample of Debian 12 shipped with peftc", train_size, test_size
        )
    if not found and source == "index":
        raise PeftcError("this machine has no Debian package index; use the shipped sample")
    if not _complete(corpus, train_size, test_size):
        raise PeftcError(
            f"{corpus.origin} gives {len(corpus.train)} rows to train on and {len(corpus.test)} to "
            f"test on, not {train_size} and {test_size}"
        )
    return corpus


def _split(packages: tuple[Package, ...], origin: str, train_size: int, test_size: int) -> Corpus:
    chosen = _balanced(packages)
    test = _take(chosen, test_size, test=True)
    train = _take(chosen, train_size, test=False)
    return Corpus(train, test, SECTIONS, f"{origin} ({len(packages)} packages)")


def _complete(corpus: Corpus, train_size: int, test_size: int) -> bool:
    return len(corpus.train) == train_size and len(corpus.test) == test_size


def read_sample() -> Iterator[Package]:
    with gzip.open(SAMPLE, "rt", encoding="utf-8") as lines:
        for line in lines:
            yield Package(**json.loads(line))


def _index() -> Iterator[Package]:
    if shutil.which("apt-cache") is None:
        return
    done = subprocess.run(
        ["apt-cache", "dumpavail"], capture_output=True, text=True, errors="replace"
    )
    yield from parse_index(done.stdout.split("\n\n"))


def parse_index(stanzas: Iterable[str]) -> Iterator[Package]:
    """Packages of the ten sections, each description once."""
    seen: set[str] = set()
    for stanza in stanzas:
        fields = _fields(stanza)
        section = fields.get("Section", "").rpartition("/")[2]
        text = fields.get("Description", "").partition("\n")[0][:MAX_TEXT]
        if section not in SECTIONS or not text or text in seen:
            continue
        seen.add(text)
        group = fields.get("Source", fields.get("Package", "")).partition(" ")[0]
        yield Package(fields.get("Package", ""), section, text, group)


def _fields(stanza: str) -> dict[str, str]:
    fields: dict[str, str] = {}
    name = ""
    for line in stanza.splitlines():
        if line.startswith(" ") and name:
            fields[name] += "\n" + line
        else:
            name, _, value = line.partition(":")
            fields[name] = value.strip()
    return fields


def _rank(word: str) -> str:
    return hashlib.sha256(word.encode()).hexdigest()


def _is_test(package: Package) -> bool:
    """A fifth of the source packages, by hash: no source package is on both sides."""
    return int(_rank(package.group)[:8], 16) % 5 == 0


def _balanced(packages: Iterable[Package]) -> dict[str, list[Package]]:
    by_section: dict[str, list[Package]] = {section: [] for section in SECTIONS}
    for package in sorted(packages, key=lambda one: _rank(one.name)):
        by_section[package.section].append(package)
    return by_section


def _take(by_section: dict[str, list[Package]], size: int, test: bool) -> tuple[Package, ...]:
    each = -(-size // len(SECTIONS))
    found = [
        package
        for section in SECTIONS
        for package in [p for p in by_section[section] if _is_test(p) == test][:each]
    ]
    return tuple(sorted(found, key=lambda one: _rank("order " + one.name))[:size])
