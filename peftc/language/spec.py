"""The Spec: a method as data, resolved from YAML. No torch here."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import groupby

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
    """Narrows `at`; None does not. The stack `first` is the encoder if there is one, else the only one
    of text; `text` is the encoder and the decoder."""

    stack: str | None = None
    kind: str | None = None
    layers: tuple[int, ...] | None = None
    experts: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Entry:
    """One delta at one kind of site, resolved: `assign` has the expression of each port that it replaces.

    `group` numbers the deltas of the spec as they were written: the entries of `at: [a, b]` have the same, and
    what their parameters share, they share. `scope` is a glob over module paths. `delta` and `compose` are kept
    as written, for the design table. `train` names existing parameters to unfreeze, by the last component of
    their name; then there is nothing to assign. `penalty`, a number at each site, is added to the loss while
    training. With `positions` "shift", keys in front take the first positions and the tokens those behind. `uses` are
    the places of the `use:` that it came by, outermost first.
    """

    method: str
    at: str
    place: Place = field(compare=False)
    arguments: Arguments = field(hash=False)
    scope: str | None = None
    where: Where = field(default_factory=Where)
    params: tuple[Param, ...] = ()
    let: tuple[tuple[str, ex.Expr], ...] = ()
    assign: tuple[tuple[str, ex.Expr], ...] = ()
    delta: ex.Expr | None = None
    compose: ex.Expr | None = None
    train: tuple[str, ...] = ()
    expect: int | None = None
    penalty: ex.Expr | None = None
    positions: str = "keep"
    words: Words | None = None
    group: int = 0
    uses: tuple[Place, ...] = field(default=(), compare=False)

    @cached_property
    def inlined(self) -> tuple[dict[str, ex.Expr], dict[str, ex.Expr]]:
        """(`let` expressions, assigned expressions) with every `let` name replaced by its definition."""
        lets: dict[str, ex.Expr] = {}
        for name, expression in self.let:
            lets[name] = ex.substitute(expression, lets)
        return lets, {port: ex.substitute(expression, lets) for port, expression in self.assign}


@dataclass(frozen=True)
class Spec:
    """A method: entries in the order in which they act. `auto` is the argument that `budget` decides; until it
    has, the argument is 1."""

    name: str
    title: str
    arguments: Arguments = field(hash=False)
    entries: tuple[Entry, ...]
    text: str = field(default="", repr=False, compare=False)
    path: str = field(default="", compare=False)
    budget: str | None = None
    auto: str | None = None


def numbered(parts: Iterable[Sequence[Entry]]) -> tuple[Entry, ...]:
    """The entries of several sources in order; the deltas that they were written as are counted anew."""
    found: list[Entry] = []
    group = -1
    for part in parts:
        for _, written in groupby(part, lambda entry: entry.group):
            group += 1
            found += [replace(entry, group=group) for entry in written]
    return tuple(found)


def combine(specs: Sequence[Spec]) -> Spec:
    """Several specs that act as one, in order.

    Its arguments are those of all; where two mean different values by one name, it is told apart as
    `SPEC_NAME`. Raises PeftcError without a spec, or where an argument still waits for its budget: a budget is
    for one spec.
    """
    if len(specs) == 1:
        return specs[0]
    if not specs:
        raise PeftcError("no spec is given; give one, such as 'lora'")
    for spec in specs:
        if spec.auto is not None:
            raise PeftcError(f"'{spec.auto}' of {spec.name} is auto: decide it before combining")
    return Spec(
        name="+".join(spec.name for spec in specs),
        title=", ".join(spec.title for spec in specs),
        arguments=_joined(specs),
        entries=numbered(spec.entries for spec in specs),
    )


def _joined(specs: Sequence[Spec]) -> dict[str, float | int]:
    found: dict[str, float | int] = {}
    for index, spec in enumerate(specs):
        for name, value in spec.arguments.items():
            meant = {one.arguments[name] for one in specs if name in one.arguments}
            own = re.sub(r"\W", "_", f"{spec.name}_{name}")
            choices = (name, own, f"{own}_{index}")[len(meant) > 1 :]
            found[next(one for one in choices if found.get(one, value) == value)] = value
    return found


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
