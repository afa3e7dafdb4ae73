"""A Spec written in its own language: what is stored with deltas, and read back by the one reader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import groupby
from typing import Any

from peftc.language.field import data
from peftc.language.fields import FIELDS, TOP
from peftc.language.reader import Reader
from peftc.language.source import Json, Source, nodes
from peftc.language.spec import Arguments, Entry, Spec


def write(spec: Spec) -> Json:
    """The spec as data of its own language, every `use` written out; `read` gives an equal Spec."""
    return {**data(TOP, spec), "deltas": [*_deltas(spec)]}


def read(written: Mapping[str, Any], file: str = "<spec>") -> Spec:
    """The Spec of `write`'s data, checked as any other. Raises SpecError with every problem, `file` its place."""
    return Reader(Source(file), resolved=True).spec(nodes(written))


def digest(spec: Spec) -> str:
    """SHA-256 of what the spec says, whatever its comments and layout."""
    said = {key: value for key, value in write(spec).items() if key != "title"}
    canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def _deltas(spec: Spec) -> Iterator[Json]:
    for _, group in groupby(spec.entries, lambda entry: entry.group):
        yield _delta([*group], spec)


def _delta(entries: Sequence[Entry], spec: Spec) -> Json:
    """One delta as it was written: its entries differ in their site alone."""
    first = entries[0]
    assert all(replace(one, at=first.at, scope=first.scope) == first for one in entries)
    said = data(FIELDS, first)
    if len(entries) > 1:
        said["at"] = [data(FIELDS, one)["at"] for one in entries]
    if first.method == spec.name:
        del said["method"]
    if _same(first.arguments, spec.arguments):
        del said["with"]
    return said


def _same(own: Arguments, other: Arguments) -> bool:
    """Equal as numbers and in kind: 4 is not 4.0, for `d // 4` is not `d // 4.0`."""
    return json.dumps(own, sort_keys=True) == json.dumps(other, sort_keys=True)
