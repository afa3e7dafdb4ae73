"""The Spec: a method as data, resolved from YAML. No torch here."""

from __future__ import annotations

import fnmatch
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftc.errors import PeftcError, Place
from peftc.language import expr as ex

Arguments = Mapping[str, float | int]
Words = str | tuple[int, ...]  # a text, or its token ids
FORMULA = "formula"  # the Init whose argument is an expression of the site's ports


@dataclass(frozen=True)
class Init:
    """How a parameter starts; arguments are expressions over the site's dims, a formula's also over its
    ports: weights, or what they hold while the backbone reads the entry's words."""

    name: str
    args: tuple[ex.Expr, ...] = ()


@dataclass(frozen=True)
class Param:
    """A delta tensor of each site; `per` says what it is shared over: site, kind, shape or model."""

    name: str
    shape: tuple[ex.Expr, ...]
    init: Init
    per: str = "site"
    trainable: bool = True


@dataclass(frozen=True)
class Where:
    """Narrows `at`; None does not. The stack `first` is the encoder if there is one, else the only stack."""

    stack: str | None = None
    kind: str | None = None
    layers: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """One delta, resolved: `assign` has the expression of each port that it replaces. With `positions`
    "shift", keys in front take the first positions and the tokens those behind.

    `delta` and `compose` are kept as written, for the design table. `train` names existing parameters to
    unfreeze, by the last component of their name; then there is nothing to assign. `penalty`, a number at
    each site, is added to the loss while training.
    """

    method: str
    at: str
    scope: str | None
    where: Where
    params: tuple[Param, ...]
    let: tuple[tuple[str, ex.Expr], ...]
    assign: tuple[tuple[str, ex.Expr], ...]
    delta: ex.Expr | None
    compose: ex.Expr | None
    train: tuple[str, ...]
    expect: int | None
    arguments: Arguments = field(hash=False)
    place: Place = field(compare=False)
    penalty: ex.Expr | None = None
    positions: str = "keep"
    words: Words | None = None


@dataclass(frozen=True)
class Spec:
    """A method: entries in the order in which they act. `auto` is the argument that `budget` decides."""

    name: str
    title: str
    arguments: Arguments = field(hash=False)
    entries: tuple[Entry, ...]
    text: str = field(default="", repr=False, compare=False)
    path: str = field(default="", compare=False)
    budget: str | None = None
    auto: str | None = None

    def digest(self) -> str:
        """SHA-256 of what the spec says, whatever its comments and layout."""
        said = {key: value for key, value in to_data(self).items() if key != "title"}
        canonical = json.dumps(said, sort_keys=True, separators=(",", ":"))
        return hashlib.sha256(canonical.encode()).hexdigest()


def combine(specs: Sequence[Spec]) -> Spec:
    """Several specs that act as one, in order."""
    if len(specs) == 1:
        return specs[0]
    if not specs:
        raise PeftcError("no spec given")
    return Spec(
        name="+".join(spec.name for spec in specs),
        title=", ".join(spec.title for spec in specs),
        arguments={},
        entries=tuple(entry for spec in specs for entry in spec.entries),
        text="\n".join(spec.text for spec in specs),
    )


def with_words(spec: Spec, words: Words) -> Spec:
    """The spec with other words, where it starts from some. Raises PeftcError where it does not."""
    entries = tuple(
        entry if entry.words is None else replace(entry, words=words) for entry in spec.entries
    )
    if entries == spec.entries and all(entry.words is None for entry in entries):
        raise PeftcError(f"{spec.name} starts from no words")
    return replace(spec, entries=entries)


def scopes(wanted: Sequence[str], paths: Iterable[str]) -> list[str]:
    """`scope` for modules with the same last name: one glob where it means exactly these; else each path."""
    glob = f"*.{wanted[0].rpartition('.')[2]}"
    same = {path for path in paths if fnmatch.fnmatchcase(path, glob)}
    return [glob] if same == set(wanted) else [*wanted]


def to_data(spec: Spec) -> dict[str, Any]:
    """The resolved spec as JSON data; `from_data` reads it back exactly."""
    return {
        "name": spec.name,
        "title": spec.title,
        "arguments": dict(spec.arguments),
        "entries": [_entry_data(entry) for entry in spec.entries],
    }


def _entry_data(entry: Entry) -> dict[str, Any]:
    where = entry.where
    return {
        "method": entry.method,
        "at": entry.at,
        "scope": entry.scope,
        "where": {
            "stack": where.stack,
            "kind": where.kind,
            "layers": None if where.layers is None else list(where.layers),
        },
        "params": [
            {
                "name": param.name,
                "shape": [ex.show(dim) for dim in param.shape],
                "init": [param.init.name, *(ex.show(arg) for arg in param.init.args)],
                "per": param.per,
                "trainable": param.trainable,
            }
            for param in entry.params
        ],
        "let": [[name, ex.show(one)] for name, one in entry.let],
        "assign": [[port, ex.show(one)] for port, one in entry.assign],
        "delta": None if entry.delta is None else ex.show(entry.delta),
        "compose": None if entry.compose is None else ex.show(entry.compose),
        "train": list(entry.train),
        "expect": entry.expect,
        **({} if entry.penalty is None else {"penalty": ex.show(entry.penalty)}),
        **({} if entry.positions == "keep" else {"positions": entry.positions}),
        **({} if entry.words is None else {"words": entry.words}),
        "arguments": dict(entry.arguments),
    }


def from_data(data: Mapping[str, Any]) -> Spec:
    """A Spec from `to_data`'s output. Raises KeyError, TypeError or ValueError on damaged data."""
    try:
        entries = tuple(_entry(one) for one in data["entries"])
    except ex.ExprError as error:
        raise ValueError(error.fact) from error
    return Spec(str(data["name"]), str(data["title"]), dict(data["arguments"]), entries)


def _entry(data: Mapping[str, Any]) -> Entry:
    def optional(text: str | None) -> ex.Expr | None:
        return None if text is None else ex.parse(text)

    where = data["where"]
    layers = where["layers"]
    return Entry(
        method=data["method"],
        at=data["at"],
        scope=data["scope"],
        where=Where(where["stack"], where["kind"], None if layers is None else tuple(layers)),
        params=tuple(_param(one) for one in data["params"]),
        let=tuple((name, ex.parse(text)) for name, text in data["let"]),
        assign=tuple((port, ex.parse(text)) for port, text in data["assign"]),
        delta=optional(data["delta"]),
        compose=optional(data["compose"]),
        train=tuple(data["train"]),
        expect=data["expect"],
        arguments=dict(data["arguments"]),
        place=Place("<deltas>", 1, 1),
        penalty=optional(data.get("penalty")),
        positions=data.get("positions", "keep"),
        words=tuple(words) if isinstance(words := data.get("words"), list) else words,
    )


def _param(data: Mapping[str, Any]) -> Param:
    name, *args = data["init"]
    init = Init(name, tuple(ex.parse(arg) for arg in args))
    shape = tuple(ex.parse(dim) for dim in data["shape"])
    return Param(data["name"], shape, init, data["per"], data["trainable"])
