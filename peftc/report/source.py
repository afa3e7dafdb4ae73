"""The lines of the specs of a report, and which entries of the spec each is of."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from peftc.errors import Place
from peftc.language.source import compose
from peftc.language.spec import Entry, Spec


@dataclass(frozen=True)
class Line:
    """A line of a file, from 1. `entries` are the places in the plan's spec of the deltas that it is of, and `parameter`
    the one that it defines."""

    number: int
    text: str
    entries: tuple[int, ...] = ()
    parameter: str = ""


@dataclass(frozen=True)
class Sheet:
    """A file as its lines."""

    file: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class _Extent:
    """The lines of one delta of a file, from `first` to `last`, and the parameter that each of some defines."""

    first: int
    last: int
    parameters: tuple[tuple[int, str], ...]


def sheets(specs: Sequence[Spec], entries: Sequence[Entry]) -> tuple[Sheet, ...]:
    """The files of the specs, and behind them those that they use. `entries` are those of all specs as one."""
    texts = {one.path: one.text for one in specs}
    for entry in entries:
        for place in (*entry.uses, entry.place):
            if place.file not in texts:
                texts[place.file] = Path(place.file).read_text()
    return tuple(_sheet(file, text, entries) for file, text in texts.items())


def _sheet(file: str, text: str, entries: Sequence[Entry]) -> Sheet:
    extents = tuple(_extents(text, file))
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        here = next((one for one in extents if one.first <= number <= one.last), None)
        if here is None:
            lines.append(Line(number, line))
            continue
        mine = tuple(
            index
            for index, entry in enumerate(entries)
            if any(_is_in(place, file, here) for place in (*entry.uses, entry.place))
        )
        lines.append(Line(number, line, mine, dict(here.parameters).get(number, "")))
    return Sheet(Path(file).name, tuple(lines))


def _is_in(place: Place, file: str, extent: _Extent) -> bool:
    return place.file == file and extent.first <= place.line <= extent.last


def _extents(text: str, file: str) -> Iterator[_Extent]:
    for node in _items(_value(compose(text, file), "deltas")):
        parameters = _value(node, "params")
        named = [
            (number, key.value)
            for key, value in (parameters.value if isinstance(parameters, yaml.MappingNode) else ())
            for number in range(key.start_mark.line + 1, _last(value, text) + 1)
        ]
        yield _Extent(node.start_mark.line + 1, _last(node, text), tuple(named))


def _value(node: yaml.Node | None, name: str) -> yaml.Node | None:
    """The value of a key of a mapping."""
    if not isinstance(node, yaml.MappingNode):
        return None
    return next((value for key, value in node.value if key.value == name), None)


def _items(node: yaml.Node | None) -> Sequence[yaml.Node]:
    return node.value if isinstance(node, yaml.SequenceNode) else ()


def _last(node: yaml.Node, text: str) -> int:
    """The last line of a node. YAML ends a block where the next thing starts, behind comments and empty lines."""
    if not isinstance(node, yaml.CollectionNode) or node.flow_style:
        return int(node.end_mark.line) + 1
    lines, first = text.splitlines(), node.start_mark.line + 1
    end: int = len(lines) if node.end_mark.index >= len(text) else node.end_mark.line
    while end > first and not lines[end - 1].partition("#")[0].strip():
        end -= 1
    return end
