"""Reads the YAML of a spec into a Spec, gathering every problem with its line and column."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import yaml

from peftc.errors import PeftcError, SpecError, suggest
from peftc.language import expr as ex
from peftc.language.fields import POSITIONS, Fields, Scope
from peftc.language.ops import agree, text
from peftc.language.ports import SITES
from peftc.language.shelf import find
from peftc.language.source import Item, Source, compose
from peftc.language.spec import Arguments, Entry, Spec, Where

TOP = ("name", "with", "budget", "deltas")
ENTRY = (
    "at",
    "where",
    "params",
    "let",
    "delta",
    "compose",
    "rewrite",
    "positions",
    "words",
    "penalty",
    "train",
    "use",
    "with",
    "expect",
)
AUTO = "auto"
MAX_USES = 8


def load_spec(source: str | Path, **overrides: float | int) -> Spec:
    """A spec by shipped name or by path; `overrides` replace values of its `with:`.

    Raises SpecError with every problem of the file, PeftcError when there is no such spec.
    """
    path = find(source)
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise PeftcError(f"{path} cannot be read as text: {error}") from error
    return parse_spec(text, str(path), **overrides)


def parse_spec(text: str, path: str = "<spec>", **overrides: float | int) -> Spec:
    """A spec from its text; `path` is what errors name and what relative `use:` starts from."""
    return read(text, path, overrides)


def read(source_text: str, path: str, overrides: Arguments, using: tuple[str, ...] = ()) -> Spec:
    """The Spec of a file's text. Raises SpecError with all problems."""
    root = compose(source_text, path)
    source = Source(path)
    reader = Reader(source, using)
    top = source.mapping(root, "a spec", TOP)
    name = source.text(top["name"][1], "'name'") if "name" in top else Path(path).stem
    arguments = reader.arguments(top, overrides)
    budget = source.text(top["budget"][1], "'budget'") if "budget" in top else None
    if budget is not None and reader.auto is None and not overrides:
        source.fail(top["budget"][0], "'budget' decides one argument", "set it to auto in 'with'")
    entries: list[Entry] = []
    if "deltas" not in top:
        source.fail(root, "'deltas' is missing", "a spec lists its deltas")
    else:
        found = list(source.items(top["deltas"][1], "'deltas'"))
        if not found and not source.problems:
            source.fail(top["deltas"][1], "'deltas' is empty")
        for node in found:
            entries += reader.entry(node, name or "", arguments)
    reader.check_unused(top, arguments)
    if source.problems:
        raise SpecError(dict.fromkeys(source.problems))
    title = next(
        (line[1:].strip() for line in source_text.splitlines() if line.startswith("#")), ""
    )
    return Spec(
        name or "", title, arguments, tuple(entries), source_text, path, budget, reader.auto
    )


class Reader(Fields):
    """Turns nodes into entries."""

    def __init__(self, source: Source, using: tuple[str, ...]) -> None:
        super().__init__(source)
        self.using = using
        self.auto: str | None = None

    def arguments(self, top: Mapping[str, Item], overrides: Arguments) -> dict[str, float | int]:
        values: dict[str, float | int] = {}
        if "with" in top:
            for name, (_, node) in self.source.mapping(top["with"][1], "'with'").items():
                if isinstance(node, yaml.ScalarNode) and node.value == AUTO:
                    self.decide(name, node, overrides)
                    values[name] = 1
                    continue
                value = self.number(node, values)
                values[name] = 0 if value is None else value
        unknown = [name for name in overrides if name not in values]
        if unknown:
            fix = suggest(unknown[0], values) or f"arguments: {', '.join(values) or 'none'}"
            raise PeftcError(f"{self.source.file}: no argument '{unknown[0]}' ({fix})")
        odd = [
            n for n, v in overrides.items() if isinstance(v, bool) or not isinstance(v, int | float)
        ]
        if odd:
            raise PeftcError(f"{self.source.file}: argument '{odd[0]}' must be a number")
        return {**values, **overrides}

    def decide(self, name: str, node: yaml.Node, overrides: Arguments) -> None:
        """An argument that is left to the budget, unless it is given."""
        if self.auto is not None:
            self.source.fail(node, f"'{self.auto}' is auto already; a budget decides one argument")
        elif name not in overrides:
            self.auto = name

    def check_unused(self, top: Mapping[str, Item], arguments: Arguments) -> None:
        if self.source.problems or "with" not in top:
            return
        for name, (key, _) in self.source.mapping(top["with"][1], "'with'").items():
            if name not in self.used:
                self.source.fail(key, f"argument '{name}' is never used")

    def entry(self, node: yaml.Node, method: str, arguments: Arguments) -> list[Entry]:
        items = self.source.mapping(node, "a delta", ENTRY)
        if not items:
            return []
        if "use" in items:
            return self.use(items, arguments)
        read = self.train if "train" in items else self.delta
        return [
            entry for one in self.each_site(items) for entry in read(node, one, method, arguments)
        ]

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

    def use(self, items: Mapping[str, Item], arguments: Arguments) -> list[Entry]:
        """The entries of another spec, with arguments of its own and, if given, a narrower `where`."""
        self._only(items, ("use", "with", "where"), "'use'")
        _, node = items["use"]
        name = self.source.text(node, "'use'")
        if name is None:
            return []
        if len(self.using) >= MAX_USES or name in self.using:
            self.source.fail(
                node, f"'{name}' uses itself" if name in self.using else "too many uses"
            )
            return []
        given: dict[str, float | int] = {}
        if "with" in items:
            for argument, (_, value) in self.source.mapping(items["with"][1], "'with'").items():
                number = self.number(value, arguments)
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
        narrower = self.where(items)
        return [replace(entry, where=_narrow(entry.where, narrower)) for entry in spec.entries]

    def train(
        self, node: yaml.Node, items: Mapping[str, Item], method: str, arguments: Arguments
    ) -> list[Entry]:
        """Existing parameters to unfreeze, by the last component of their name."""
        self._only(items, ("train", "at", "where", "expect"), "'train'")
        found = list(self.source.items(items["train"][1], "'train'"))
        names = tuple(n for one in found if (n := self.source.text(one, "a parameter's name")))
        for one, name in zip(found, names, strict=False):
            if not name.isidentifier():
                self.source.fail(one, f"'{name}' is not the last component of a parameter's name")
        if not found:
            self.source.fail(items["train"][1], "'train' names no parameter")
        at, scope = self.at(items) if "at" in items else ("", None)
        where, expect = self.where(items), self.expect(items)
        place = self.source.place(node)
        return [
            Entry(method, at, scope, where, (), (), (), None, None, names, expect, arguments, place)
        ]

    def delta(
        self, node: yaml.Node, items: Mapping[str, Item], method: str, arguments: Arguments
    ) -> list[Entry]:
        if "at" not in items:
            self.source.fail(
                node, "'at' is missing", "say which site the delta modifies, such as ffn"
            )
            return []
        if ("delta" in items) == ("rewrite" in items):
            self.source.fail(node, "give either 'delta' or 'rewrite'")
            return []
        at, scope = self.at(items)
        if not at:
            return []
        names = Scope(_visible(at, arguments), set())
        params = self.params(items, names, at, arguments)
        let = self.let(items, names)
        delta = compose_ = None
        if "delta" in items:
            delta, compose_, assign = self.composed(items, names, at)
        else:
            self._only(items, tuple(k for k in ENTRY if k != "compose"), "'rewrite'")
            assign = self.rewrite(items, names, at)
        penalty = self.penalty(items, names, set(SITES[at].ports))
        for key, (place, _) in self._named(items, "params") + self._named(items, "let"):
            if key not in names.read and not self.source.problems:
                self.source.fail(place, f"'{key}' is never used")
        self.used |= names.read & set(arguments)
        where, expect, place_ = self.where(items), self.expect(items), self.source.place(node)
        positions = "keep"
        if "positions" in items:
            positions = (
                self.source.choice(items["positions"][1], "'positions'", POSITIONS) or positions
            )
        return [
            Entry(
                method,
                at,
                scope,
                where,
                params,
                let,
                assign,
                delta,
                compose_,
                (),
                expect,
                arguments,
                place_,
                penalty,
                positions,
                self.words(items, params, at),
            )
        ]

    def _named(self, items: Mapping[str, Item], key: str) -> list[tuple[str, Item]]:
        node = items[key][1] if key in items else None
        if not isinstance(node, yaml.MappingNode):
            return []
        return [(k.value, (k, v)) for k, v in node.value if isinstance(k, yaml.ScalarNode)]

    def _only(self, items: Mapping[str, Item], allowed: Iterable[str], what: str) -> None:
        for name, (key, _) in items.items():
            if name not in allowed:
                self.source.fail(key, f"'{name}' does not go with {what}")

    def composed(
        self, items: Mapping[str, Item], names: Scope, at: str
    ) -> tuple[ex.Expr | None, ex.Expr | None, tuple[tuple[str, ex.Expr], ...]]:
        """`delta:` with its `compose:` (default `h + delta`) as one assignment of `h`."""
        node = items["delta"][1]
        delta, shape = self.checked(node, names)
        names.shapes["delta"] = shape
        composition: ex.Expr | None = ex.parse("h + delta")
        if "compose" in items:
            node = items["compose"][1]
            composition, shape = self.checked(node, names)
            if composition is not None and "delta" not in ex.names(composition):
                self.source.fail(node, "'compose' does not read 'delta'")
        if delta is None or composition is None:
            return delta, composition, ()
        self.fits(node, "h", shape, at)
        return delta, composition, (("h", ex.substitute(composition, {"delta": delta})),)

    def rewrite(
        self, items: Mapping[str, Item], names: Scope, at: str
    ) -> tuple[tuple[str, ex.Expr], ...]:
        found = []
        for port, (key, node) in self.source.mapping(items["rewrite"][1], "'rewrite'").items():
            allowed = SITES[at].assigns
            if port not in allowed:
                fix = suggest(port, allowed) or f"one of: {', '.join(allowed)}"
                self.source.fail(key, f"'{at}' has no port '{port}' to assign", fix)
            expression, shape = self.checked(node, names)
            if expression is not None and port in allowed:
                self.fits(node, port, shape, at)
                found.append((port, expression))
        return tuple(found)

    def fits(self, node: yaml.Node, port: str, got: ex.Shape, at: str) -> None:
        """An assigned value has the features of its port, and no more axes."""
        want = SITES[at].shapes[port]
        if got and "..." not in got[-1:] and not agree(got[-1], want[-1]):
            self.source.fail(node, f"'{port}' is {text(want)} but is assigned {text(got)}")


def _visible(at: str, arguments: Arguments) -> dict[str, ex.Shape]:
    site = SITES[at]
    numbers: dict[str, ex.Shape] = dict.fromkeys((*arguments, *site.dims), ())
    return {**numbers, **site.shapes}


def _narrow(own: Where, more: Where) -> Where:
    return Where(more.stack or own.stack, more.kind or own.kind, more.layers or own.layers)
