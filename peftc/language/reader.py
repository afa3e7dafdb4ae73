"""Reads the YAML of a spec into a Spec, gathering every problem with its line and column."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from peftc.errors import PeftcError, SpecError, suggest
from peftc.language import expr as ex
from peftc.language.changes import composed, started
from peftc.language.field import NEW, Draft
from peftc.language.fields import FIELDS, TOP
from peftc.language.formulas import Formulas
from peftc.language.shelf import find
from peftc.language.source import Item, Source, compose
from peftc.language.spec import Arguments, Entry, Spec, numbered
from peftc.language.where import meet, narrowed

AUTO = "auto"
FOR_EDITORS = "yaml-language-server:"  # a comment that is no title
MAX_USES = 8


def load_spec(source: str | Path, **overrides: float | int) -> Spec:
    """The spec that `source` names, shipped or a path; `overrides` replace values of its `with:`.

    Raises SpecError with every problem of the file, PeftcError when there is no such spec or argument.
    """
    path = find(source)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PeftcError(f"{path} cannot be read as text: {error}") from error
    return parse_spec(text, str(path), **overrides)


def parse_spec(text: str, path: str = "<spec>", **overrides: float | int) -> Spec:
    """A spec from its `text`; `path` is what errors name and what relative `use:` starts from;
    `overrides` replace values of its `with:`.

    Raises SpecError with every problem, PeftcError for an override of no argument or that is no number.
    """
    return read(text, path, overrides)


def read(text: str, path: str, overrides: Arguments, using: tuple[str, ...] = ()) -> Spec:
    """The Spec of a file's text; `using` are the specs that use it, outermost first. Raises as `parse_spec`."""
    spec = Reader(Source(path), using, overrides).spec(compose(text, path))
    lines = (line[1:].strip() for line in text.splitlines() if line.startswith("#"))
    comments = (line for line in lines if not line.startswith(FOR_EDITORS))
    return replace(spec, title=spec.title or next(comments, ""), text=text, path=path)


class Reader(Formulas):
    """Turns the nodes of one document into a Spec. A `resolved` one, which a Spec was written as, may have
    arguments that its deltas no longer read."""

    def __init__(
        self,
        source: Source,
        using: tuple[str, ...] = (),
        overrides: Arguments | None = None,
        resolved: bool = False,
    ) -> None:
        super().__init__(source)
        self.using, self.resolved = using, resolved
        self.overrides: Arguments = overrides or {}
        self.name = Path(source.file).stem
        self.arguments: dict[str, float | int] = {}
        self.declared: dict[str, yaml.Node] = {}
        self.auto: str | None = None

    def spec(self, root: yaml.Node) -> Spec:
        """The Spec of a document. Raises SpecError with every problem, PeftcError for a bad override."""
        top = self.source.mapping(root, "a spec", [row.name for row in TOP])
        said: dict[str, Any] = {}
        for row in TOP:
            if row.name in top:
                said[row.name] = row.read(self, top[row.name][1])
            elif row.required:
                self.source.fail(root, f"'{row.name}' is missing", row.doc)
        self.check_unused()
        if self.source.problems:
            raise SpecError(dict.fromkeys(self.source.problems))
        return Spec(
            name=self.name,
            title=said.get("title") or "",
            arguments=self.arguments,
            entries=said["deltas"],
            budget=said.get("budget") if self.auto else None,
            auto=self.auto,
        )

    def called(self, node: yaml.Node) -> None:
        """Take the name of the spec, which its deltas have too."""
        self.name = self.source.text(node, "'name'") or ""

    def declare(self, node: yaml.Node) -> None:
        """The arguments of the file and their defaults; one may be left to the budget."""
        for name, (key, value) in self.source.mapping(node, "'with'").items():
            if not ex.is_name(name):
                self.source.fail(key, f"'{name}' is not a name")
            self.declared[name] = key
            if isinstance(value, yaml.ScalarNode) and value.value == AUTO:
                self.arguments[name] = 1
                self.decide(name, value)
                continue
            number = self.number(value, self.arguments)
            self.arguments[name] = 0 if number is None else number

    def decide(self, name: str, node: yaml.Node) -> None:
        """An argument that is left to the budget, unless it is given."""
        if self.auto is not None:
            fact = f"'{self.auto}' is auto already; a budget decides one argument"
            self.source.fail(node, fact)
        elif name not in self.overrides:
            self.auto = name

    def budget(self, node: yaml.Node) -> str | None:
        """What decides the argument that is auto, as written."""
        written = self.source.text(node, "'budget'")
        if written is not None and self.auto is None and not self.overrides:
            fact = "'budget' decides one argument"
            self.source.fail(node, fact, "set it to auto in 'with'")
        return written

    def override(self) -> None:
        """Take the values that are given for arguments. Raises PeftcError: no such argument, no number."""
        for name, value in self.overrides.items():
            if name not in self.arguments:
                known = f"arguments: {', '.join(self.arguments) or 'none'}"
                fix = suggest(name, self.arguments) or known
                raise PeftcError(f"{self.source.file}: no argument '{name}' ({fix})")
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not number or not math.isfinite(value) or abs(value) > ex.MAX_NUMBER:
                raise PeftcError(f"{self.source.file}: argument '{name}' must be a number")
            # A subclass such as numpy's float64 would be written in its own way.
            self.arguments[name] = int(value) if isinstance(value, int) else float(value)

    def check_unused(self) -> None:
        """Note every argument of the file that nothing reads."""
        if self.source.problems or self.resolved:
            return
        for name, key in self.declared.items():
            if name not in self.used:
                self.source.fail(key, f"argument '{name}' is never used")

    def deltas(self, node: yaml.Node) -> tuple[Entry, ...]:
        """The entries of all deltas, in order, with the arguments as they are overridden."""
        self.override()
        found = list(self.source.items(node, "'deltas'"))
        if not found and not self.source.problems:
            self.source.fail(node, "'deltas' is empty")
        return numbered([self.delta(one) for one in found])

    def delta(self, node: yaml.Node) -> list[Entry]:
        """The entries of one delta: one for each kind of site, or those of the spec that it uses."""
        items = self.source.mapping(node, "a delta", [row.name for row in FIELDS])
        empty = isinstance(node, yaml.MappingNode) and not node.value
        form = self.form(node, items) if items or empty else ""
        if not form:
            return []
        goes = [row.name for row in FIELDS if form in row.forms]
        for name, (key, _) in items.items():
            if name not in goes:
                self.source.fail(key, f"'{name}' does not go with '{form}'")
        if form == "use":
            return self.use(items)
        drafts = [self.draft(node, one, form) for one in self.each_site(items)]
        return [entry for draft in drafts if (entry := self.entry(draft)) is not None]

    def form(self, node: yaml.Node, items: Mapping[str, Item]) -> str:
        """Which of FORMS a delta is; nothing, and a problem, where it is none."""
        for form in ("use", "train"):
            if form in items:
                return form
        if "at" not in items:
            fix = "say which site the delta modifies, such as ffn"
            self.source.fail(node, "'at' is missing", fix)
        elif ("delta" in items) == ("rewrite" in items):
            self.source.fail(node, "give either 'delta' or 'rewrite'")
        else:
            return "delta" if "delta" in items else "rewrite"
        return ""

    def each_site(self, items: Mapping[str, Item]) -> list[Mapping[str, Item]]:
        """`at: [attention.q, attention.v]` is the same delta at each."""
        if "at" not in items or not isinstance(items["at"][1], yaml.SequenceNode):
            return [items]
        key, node = items["at"]
        found: list[Mapping[str, Item]] = [
            {**items, "at": (key, one)} for one in self.source.items(node, "'at'")
        ]
        if not found:
            self.source.fail(node, "'at' names no site")
        return found

    def draft(self, node: yaml.Node, items: Mapping[str, Item], form: str) -> Draft:
        """What is read of a delta before its first key."""
        place, arguments = self.source.place(node), self.arguments
        said: dict[str, Any] = {
            "method": self.name,
            "at": "",
            "place": place,
            "arguments": arguments,
        }
        return Draft(self, node, items, form, arguments, said)

    def entry(self, draft: Draft) -> Entry | None:
        """The Entry of a delta at one kind of site, by the rows of FIELDS; nothing where its site is unknown."""
        for row in FIELDS:
            if row.name in draft.items and draft.form in row.forms:
                draft.values |= row.read(draft, draft.items[row.name][1])
            if row.name == "at" and draft.form in NEW and not draft.at:
                return None
        if draft.form == "delta":
            draft.values |= composed(draft)
        if draft.form in NEW:
            self.check_words(draft)
            self.check_read(draft)
        self.check_own(draft)
        return Entry(**draft.values)

    def check_words(self, draft: Draft) -> None:
        """Note parameters that start as a value of no text."""
        if "words" not in draft.items:
            for name, port in started(draft).items():
                fact = f"'{name}' starts as '{port}', a value"
                self.source.fail(draft.items["params"][0], fact, "say of which text: words: ...")

    def check_read(self, draft: Draft) -> None:
        """Note parameters and names of formulas that no formula reads."""
        named = [key for one in ("params", "let") for key in _keys(draft.items, one)]
        for key in named:
            if key.value not in draft.names.read and not self.source.problems:
                self.source.fail(key, f"'{key.value}' is never used")

    def check_own(self, draft: Draft) -> None:
        """Count the arguments that a delta reads; note those of its own that it does not."""
        if "with" not in draft.items:
            self.used |= draft.names.read & set(self.arguments)
        elif not self.resolved and not self.source.problems:
            for name, key in draft.own.items():
                if name not in draft.names.read:
                    self.source.fail(key, f"argument '{name}' is never used")

    def use(self, items: Mapping[str, Item]) -> list[Entry]:
        """The entries of another spec, with arguments of its own and, if given, a narrower `where`."""
        _, node = items["use"]
        name = self.source.text(node, "'use'")
        if name is None:
            return []
        if len(self.using) >= MAX_USES or name in self.using:
            fact = f"'{name}' uses itself" if name in self.using else "too many uses"
            self.source.fail(node, fact)
            return []
        given: dict[str, float | int] = {}
        if "with" in items:
            for argument, (_, value) in self.source.mapping(items["with"][1], "'with'").items():
                number = self.number(value, self.arguments)
                given[argument] = 0 if number is None else number
        try:
            path = find(name, Path(self.source.file).parent)
            spec = read(path.read_text(), str(path), given, (*self.using, name))
        except SpecError as error:
            self.source.problems += error.problems
            return []
        except (PeftcError, OSError, UnicodeDecodeError) as error:
            self.source.fail(node, str(error))
            return []
        if spec.auto is not None:
            fact = f"'{spec.auto}' of {name} is auto, which only a budget of the whole decides"
            self.source.fail(node, fact, f"give it: with: {{{spec.auto}: 8}}")
        here = self.source.place(node)
        entries = [replace(one, uses=(here, *one.uses)) for one in spec.entries]
        if "where" not in items:
            return entries
        narrower = narrowed(self.source, items["where"][1])
        return [meet(self.source, entry, *narrower, items["where"][1]) for entry in entries]


def _keys(items: Mapping[str, Item], name: str) -> list[yaml.ScalarNode]:
    """The keys of the mapping under `name`."""
    node = items[name][1] if name in items else None
    if not isinstance(node, yaml.MappingNode):
        return []
    return [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
