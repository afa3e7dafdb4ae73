"""A key of the language as a row: how it is read, written, offered and shown; and the delta that rows are read into."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from peftc.language import expr as ex
from peftc.language.formulas import Formulas, Scope
from peftc.language.ops import OPS
from peftc.language.source import Item, Json, Source
from peftc.language.spec import Arguments

# What a delta is, by the key that says so, and the keys that it cannot do without.
FORMS = {
    "delta": ("at", "delta"),
    "rewrite": ("at", "rewrite"),
    "train": ("train",),
    "use": ("use",),
}
NEW = ("delta", "rewrite")  # forms that bring parameters of their own


@dataclass
class Draft:
    """A delta while it is read at one kind of site. `values` are the fields of its Entry so far; `own` are the
    keys of its own `with`; `result` is what `h` becomes, and the node that says so."""

    formulas: Formulas
    node: yaml.Node
    items: Mapping[str, Item]
    form: str
    arguments: Arguments
    values: dict[str, Any]
    names: Scope = field(default_factory=Scope)
    own: dict[str, yaml.Node] = field(default_factory=dict)
    result: tuple[yaml.Node, ex.Shape] | None = None

    @property
    def source(self) -> Source:
        return self.formulas.source

    @property
    def at(self) -> str:
        return str(self.values["at"])


@dataclass(frozen=True)
class Field:
    """A key: one line on what it is for, what editors may offer there, how it is read, how it is written.

    `read` takes what is being read (a Draft; a Source for keys of `where`) and the node, and gives what the row
    is about: for a delta, fields of its Entry. `write` gives the key's data for an Entry or a part of it, or
    None where it is left out. `forms` are those of FORMS that it goes with; `sample` is what the skeleton
    shows, behind "# " where it is no more than shown, and `more` what other tables know of the key.
    """

    name: str
    doc: str
    schema: Callable[[], Json]
    read: Callable[..., Any]
    write: Callable[[Any], Any]
    forms: tuple[str, ...] = ()
    sample: str = ""
    required: bool = False
    more: Callable[[], str] = str


def formula() -> Json:
    """What an editor knows of a formula."""
    ops = "; ".join(f"{row.name}: {row.doc}" for row in OPS.values())
    return {"type": ["string", "number"], "description": f"ops: {ops}"}


def values() -> Json:
    """What an editor knows of a `with`."""
    return {"type": "object", "additionalProperties": {"type": ["number", "string"]}}


def keys(table: tuple[Field, ...]) -> Json:
    """The schema of a mapping of these keys and no others."""
    found = {
        "type": "object",
        "additionalProperties": False,
        "properties": {row.name: {"description": row.doc, **row.schema()} for row in table},
    }
    required = [row.name for row in table if row.required]
    return {**found, "required": required} if required else found


def data(table: tuple[Field, ...], one: Any) -> dict[str, Any]:
    """What the keys of a table say of `one`; those that say nothing are left out."""
    found = ((row.name, row.write(one)) for row in table)
    return {name: value for name, value in found if value is not None}


def shown(expression: ex.Expr | None) -> str | None:
    """A formula as text, where there is one."""
    return None if expression is None else ex.show(expression)


def formulas() -> Json:
    """What an editor knows of names with a formula each."""
    return {"type": "object", "additionalProperties": formula(), "minProperties": 1}


# In the order in which they are read: a name must have its meaning before a formula reads it.
