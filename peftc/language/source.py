"""YAML with positions: every node knows its line and column; nothing unsafe or unbounded is accepted."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from peftc.errors import Place, Problem, SpecError, suggest

MAX_BYTES, MAX_NESTING = 256 * 1024, 20
Item = tuple[yaml.ScalarNode, yaml.Node]
Json = dict[str, Any]


@dataclass
class Source:
    """One file being read. Problems are gathered, so that all of them are shown at once."""

    file: str
    problems: list[Problem] = field(default_factory=list)

    def place(self, node: yaml.Node, offset: int = 0) -> Place:
        """Where a node stands, `offset` characters into its text."""
        mark: yaml.Mark = node.start_mark
        # YAML marks the quote, of which an expression's column knows nothing.
        quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
        return Place(self.file, mark.line + 1, mark.column + 1 + offset + bool(quoted and offset))

    def fail(self, node: yaml.Node, fact: str, fix: str = "", offset: int = 0) -> None:
        """Note a problem; reading goes on."""
        self.problems.append(Problem(self.place(node, offset), fact, fix))

    def mapping(self, node: yaml.Node, what: str, keys: Sequence[str] = ()) -> dict[str, Item]:
        """The items of a mapping; with `keys`, any other key is a problem."""
        if not isinstance(node, yaml.MappingNode):
            self.fail(node, f"{what} must be a mapping, not {kind(node)}")
            return {}
        found: dict[str, Item] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                self.fail(key, "a key must be a word")
            elif keys and key.value not in keys:
                self.fail(
                    key, f"unknown key '{key.value}'", suggest(key.value, keys) or _listed(keys)
                )
            elif key.value in found:
                self.fail(key, f"'{key.value}' stands here twice")
            else:
                found[key.value] = (key, value)
        return found

    def items(self, node: yaml.Node, what: str) -> Iterator[yaml.Node]:
        """The items of a list; a problem, and none, where it is no list."""
        if isinstance(node, yaml.SequenceNode):
            yield from node.value
        else:
            self.fail(node, f"{what} must be a list, not {kind(node)}")

    def text(self, node: yaml.Node, what: str) -> str | None:
        """A scalar as it is written, whatever YAML would take it for: `1e-5` and `true` are words here."""
        if isinstance(node, yaml.ScalarNode) and node.tag != "tag:yaml.org,2002:null":
            return str(node.value)
        self.fail(node, f"{what} must be a word or formula, not {kind(node)}")
        return None

    def integer(self, node: yaml.Node, what: str) -> int | None:
        """A whole number of at most nine digits."""
        text = node.value if isinstance(node, yaml.ScalarNode) else ""
        if text.isdecimal() and len(text) < 10:
            return int(text)
        self.fail(node, f"{what} must be a whole number")
        return None

    def choice(self, node: yaml.Node, what: str, allowed: Sequence[str]) -> str | None:
        """One of the allowed words."""
        word = self.text(node, what)
        if word is None or word in allowed:
            return word
        self.fail(node, f"{what} cannot be '{word}'", suggest(word, allowed) or _listed(allowed))
        return None


def _listed(words: Sequence[str]) -> str:
    return "one of: " + ", ".join(words)


def kind(node: yaml.Node) -> str:
    """What a node is, for a message."""
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    return f"'{node.value}'" if node.value else "nothing"


def compose(text: str, file: str) -> yaml.Node:
    """The root node of a YAML document. Raises SpecError: not YAML, too large, anchors, several documents."""
    if len(text.encode(errors="replace")) > MAX_BYTES:
        raise SpecError([Problem(Place(file, 1, 1), f"the spec is larger than {MAX_BYTES} bytes")])
    depth = 0
    try:
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            mark: Any = event.start_mark
            place = Place(file, mark.line + 1, mark.column + 1)
            if getattr(event, "anchor", None):
                fix = "write it out, or `use:` a spec"
                raise SpecError([Problem(place, "anchors and aliases are not allowed", fix)])
            if depth > MAX_NESTING:
                raise SpecError([Problem(place, f"nested deeper than {MAX_NESTING}")])
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = Place(file, mark.line + 1, mark.column + 1) if mark else Place(file, 1, 1)
        fact = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise SpecError([Problem(place, f"not YAML: {fact}")]) from error
    if node is None:
        raise SpecError([Problem(Place(file, 1, 1), "the file is empty")])
    return node


def nodes(data: Any, depth: int = MAX_NESTING) -> yaml.Node:
    """Data as the node that YAML of it would compose to; all of it stands at line 1. Raises ValueError where it
    is nested deeper than a spec may be, TypeError where it is no data."""
    start = yaml.Mark("", 0, 0, 0, None, 0)
    if depth == 0:
        raise ValueError(f"nested deeper than {MAX_NESTING}")
    if isinstance(data, Mapping):
        pairs = [(nodes(k, depth - 1), nodes(v, depth - 1)) for k, v in data.items()]
        return yaml.MappingNode("tag:yaml.org,2002:map", pairs, start, start)
    if isinstance(data, list | tuple):
        items = [nodes(one, depth - 1) for one in data]
        return yaml.SequenceNode("tag:yaml.org,2002:seq", items, start, start)
    if isinstance(data, str):
        return yaml.ScalarNode("tag:yaml.org,2002:str", data, start, start)
    if data is not None and not isinstance(data, bool | int | float):
        raise TypeError(f"{type(data).__name__} is no data")
    tag = "tag:yaml.org,2002:null" if data is None else ""
    return yaml.ScalarNode(tag, json.dumps(data), start, start)
