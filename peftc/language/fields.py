"""The table of the language: a row for each key that a delta may have. The reader, what a resolved spec writes,
the JSON Schema and the skeleton of `peftc new` follow from it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml

from peftc.errors import suggest
from peftc.language import expr as ex
from peftc.language.formulas import INITS, Formulas, Scope
from peftc.language.ops import OPS, agree, text
from peftc.language.ports import SITES, STORED, by_op
from peftc.language.source import Item, Json, Source
from peftc.language.spec import FORMULA, Arguments, Entry, Init, Param, Spec, Where

# What a delta is, by the key that says so, and the keys that it cannot do without.
FORMS = {
    "delta": ("at", "delta"),
    "rewrite": ("at", "rewrite"),
    "train": ("train",),
    "use": ("use",),
}
NEW = ("delta", "rewrite")  # forms that bring parameters of their own
STACKS = ("encoder", "decoder", "first")
KINDS = ("self", "cross")
POSITIONS = ("keep", "shift")
PER = ("site", "kind", "shape", "model")
DEFAULT = "h + delta"  # `compose` where it is left out


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
    return None if expression is None else ex.show(expression)


# --- where -----------------------------------------------------------------------------------------------------


def _layers(source: Source, node: yaml.Node) -> tuple[int, ...] | None:
    written = source.text(node, "'layers'") or ""
    found: list[int] = []
    for part in written.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            source.fail(node, f"'layers' cannot be '{written}'", 'write it as "0-5,11"')
            return None
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        source.fail(node, f"'layers' selects nothing: '{written}'")
    return tuple(found)


def _write_layers(entry: Entry) -> str | None:
    layers = entry.where.layers
    return None if layers is None else ",".join(map(str, layers))


def _write_scope(entry: Entry) -> str | None:
    """Of a site by op it stands in `at`."""
    return None if entry.at in by_op() else entry.scope


WHERE = (
    Field(
        "stack",
        "the encoder, the decoder, or the first of a model's stacks",
        lambda: {"enum": list(STACKS)},
        lambda source, node: source.choice(node, "'stack'", STACKS),
        lambda entry: entry.where.stack,
    ),
    Field(
        "kind",
        "self-attention, or attention across to the encoder",
        lambda: {"enum": list(KINDS)},
        lambda source, node: source.choice(node, "'kind'", KINDS),
        lambda entry: entry.where.kind,
    ),
    Field(
        "layers",
        "numbers of layers, from 0",
        lambda: {"type": ["string", "integer"], "examples": ["0-5,11"]},
        _layers,
        _write_layers,
    ),
    Field(
        "scope",
        "a glob over module paths",
        lambda: {"type": "string", "examples": ["*.encoder.*"]},
        lambda source, node: source.text(node, "'scope'"),
        _write_scope,
    ),
)


def narrowed(source: Source, node: yaml.Node) -> tuple[Where, str | None]:
    """A `where`: what it says of stack, kind and layers, and its scope."""
    inner = source.mapping(node, "'where'", [row.name for row in WHERE])
    said = {row.name: row.read(source, inner[row.name][1]) for row in WHERE if row.name in inner}
    scope = said.pop("scope", None)
    return Where(**said), scope


def _where(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    where, scope = narrowed(draft.source, node)
    if scope is not None and draft.values.get("scope") is not None:
        draft.source.fail(node, "'scope' stands in 'at' already")
        scope = None
    if "at" not in draft.items and where != Where():
        fix = "say 'at', or narrow by scope"
        draft.source.fail(node, "'where' narrows sites, and this trains parameters of any", fix)
    return {"where": where, **({} if scope is None else {"scope": scope})}


# --- params ----------------------------------------------------------------------------------------------------


def _shape(draft: Draft, node: yaml.Node) -> tuple[ex.Expr, ...]:
    sizes = {*draft.arguments, *SITES[draft.at].dims}
    found = [
        draft.formulas.size(dim, draft.names, sizes) for dim in draft.source.items(node, "'shape'")
    ]
    return tuple(one for one in found if one is not None)


def _init(draft: Draft, node: yaml.Node) -> Init:
    sizes, ports = {*draft.arguments, *SITES[draft.at].dims}, set(SITES[draft.at].ports)
    return draft.formulas.init(node, draft.names, sizes, ports)


def _write_init(param: Param) -> str:
    init = param.init
    if init.name == FORMULA:
        return ex.show(init.args[0])
    return f"{init.name}({', '.join(map(ex.show, init.args))})" if init.args else init.name


PARAM = (
    Field(
        "shape",
        "its axes: sizes of the site, arguments, numbers",
        lambda: {"type": "array", "items": {"type": ["string", "integer"]}},
        _shape,
        lambda param: [ex.show(dim) for dim in param.shape],
        required=True,
    ),
    Field(
        "init",
        f"how it starts: {', '.join(INITS)}, or a formula of the site's ports",
        lambda: {"type": "string"},
        _init,
        _write_init,
        required=True,
    ),
    Field(
        "per",
        "what shares one tensor: the site alone, sites of a kind, of a shape, all",
        lambda: {"enum": list(PER), "default": "site"},
        lambda draft, node: draft.source.choice(node, "'per'", PER) or "site",
        lambda param: None if param.per == "site" else param.per,
    ),
    Field(
        "trainable",
        "false freezes it as it starts",
        lambda: {"type": "boolean", "default": True},
        lambda draft, node: draft.source.choice(node, "'trainable'", ("true", "false")) != "false",
        lambda param: None if param.trainable else False,
    ),
)


def _param(draft: Draft, name: str, node: yaml.Node) -> Param:
    items = draft.source.mapping(node, f"'{name}'", [row.name for row in PARAM])
    for row in PARAM:
        if row.required and items and row.name not in items:
            draft.source.fail(node, f"parameter '{name}' has no '{row.name}'")
    said = {row.name: row.read(draft, items[row.name][1]) for row in PARAM if row.name in items}
    return Param(**{"name": name, "shape": (), "init": Init("zeros"), **said})


def _params(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    found = []
    for name, (key, inner) in draft.source.mapping(node, "'params'").items():
        if draft.formulas.fresh(key, name, draft.names):
            param = _param(draft, name, inner)
            draft.names.shapes[name] = tuple(_symbol(dim) for dim in param.shape)
            found.append(param)
    return {"params": tuple(found)}


def _symbol(dim: ex.Expr) -> ex.Dim:
    return int(dim.value) if isinstance(dim, ex.Number) else ex.show(dim)


# --- deltas ----------------------------------------------------------------------------------------------------


def _at(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    at, scope = _site(draft.source, node)
    if at:
        draft.names = Scope.of(at, draft.arguments)
        for name in draft.arguments:
            if name in SITES[at].ports or name in SITES[at].dims:
                what = "port" if name in SITES[at].ports else "size"
                draft.source.fail(
                    node, f"'{name}' is an argument and a {what} of {at}", "rename the argument"
                )
    return {"at": at, "scope": scope}


def _site(source: Source, node: yaml.Node) -> tuple[str, str | None]:
    if isinstance(node, yaml.MappingNode):
        inner = source.mapping(node, "'at'", ("op", "scope"))
        op = source.choice(inner["op"][1], "'op'", by_op()) if "op" in inner else None
        scope = source.text(inner["scope"][1], "'scope'") if "scope" in inner else None
        if op is not None and scope is not None:
            return op, scope
        ops = " or ".join(by_op())
        source.fail(node, f"give both: {{op: {ops}, scope: a glob over module paths}}")
        return "", None
    return source.choice(node, "'at'", named_sites()) or "", None


def named_sites() -> tuple[str, ...]:
    """Sites that a spec names by where they are in a model."""
    return tuple(row.name for row in SITES.values() if not row.by_op)


def _write_at(entry: Entry) -> Any:
    if entry.at in by_op():
        return {"op": entry.at, "scope": entry.scope}
    return entry.at or None


def _at_schema() -> Json:
    docs = {row.name: row.doc for row in SITES.values()}
    sites = {
        "enum": list(named_sites()),
        "description": "; ".join(f"{name}: {docs[name]}" for name in named_sites()),
    }
    op = {
        "enum": list(by_op()),
        "description": "; ".join(f"{name}: {docs[name]}" for name in by_op()),
    }
    ops = {
        "type": "object",
        "additionalProperties": False,
        "required": ["op", "scope"],
        "properties": {"op": op, "scope": {"type": "string"}},
    }
    place = {"oneOf": [sites, ops]}
    return {"oneOf": [place, {"type": "array", "items": place, "minItems": 1}]}


def _with(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    given: dict[str, float | int] = {}
    for name, (key, value) in draft.source.mapping(node, "'with'").items():
        number = draft.formulas.number(value, draft.arguments)
        given[name] = 0 if number is None else number
        draft.own[name] = key
    draft.arguments = given
    return {"arguments": given}


def _let(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    found = []
    for name, (key, inner) in draft.source.mapping(node, "'let'").items():
        if draft.formulas.fresh(key, name, draft.names):
            expression, draft.names.shapes[name] = draft.formulas.checked(inner, draft.names)
            if expression is not None:
                found.append((name, expression))
    return {"let": tuple(found)}


def _delta(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    """Without a `compose`, `h` has the shape of what is added to it."""
    expression, shape = draft.formulas.checked(node, draft.names)
    draft.result = (node, shape)
    return {"delta": expression, "compose": ex.parse(DEFAULT)}


def _compose(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    assert draft.result is not None  # its row stands behind that of `delta`
    names = draft.names.also("delta", draft.result[1])
    expression, shape = draft.formulas.checked(node, names)
    if expression is not None and "delta" not in ex.names(expression):
        draft.source.fail(node, "'compose' does not read 'delta'")
    draft.result = (node, shape)
    return {"compose": expression}


def composed(draft: Draft) -> dict[str, Any]:
    """`delta` in its `compose` as one assignment of `h`."""
    delta, compose = draft.values["delta"], draft.values["compose"]
    if delta is None or compose is None or draft.result is None:
        return {}
    node, shape = draft.result
    _fits(draft, node, "h", shape)
    return {"assign": (("h", ex.substitute(compose, {"delta": delta})),)}


def _rewrite(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    found, allowed = [], SITES[draft.at].assigns
    for port, (key, inner) in draft.source.mapping(node, "'rewrite'").items():
        expression, shape = draft.formulas.checked(inner, draft.names)
        if port not in allowed:
            fix = suggest(port, allowed) or f"one of: {', '.join(allowed)}"
            draft.source.fail(key, f"'{draft.at}' has no port '{port}' to assign", fix)
        elif expression is not None:
            _fits(draft, inner, port, shape)
            found.append((port, expression))
    return {"assign": tuple(found)}


def _write_rewrite(entry: Entry) -> dict[str, str] | None:
    if entry.delta is not None or entry.train:
        return None
    return {port: ex.show(one) for port, one in entry.assign}


def _fits(draft: Draft, node: yaml.Node, port: str, got: ex.Shape) -> None:
    """An assigned value has the features of its port."""
    want = SITES[draft.at].shapes[port]
    if got and "..." not in got[-1:] and not agree(got[-1], want[-1]):
        draft.source.fail(node, f"'{port}' is {text(want)} but is assigned {text(got)}")


def _penalty(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    """A number at each site, of parameters alone."""
    expression, shape = draft.formulas.checked(node, draft.names)
    if expression is not None:
        read = set(ex.names(expression)) & set(SITES[draft.at].ports)
        if read:
            fact = f"'penalty' reads the value '{min(read)}'"
            draft.source.fail(node, fact, "parameters alone")
        elif shape != ():
            draft.source.fail(node, f"'penalty' is {text(shape)}, not a number", "sum(...) it")
    return {"penalty": expression}


def _positions(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    return {"positions": draft.source.choice(node, "'positions'", POSITIONS) or "keep"}


def _words(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    """What the backbone reads while the ports are recorded that parameters start as."""
    if not started(draft):
        key, _ = draft.items["words"]
        draft.source.fail(key, "no parameter starts from the words", "init: k, for a prefix")
    if isinstance(node, yaml.SequenceNode):
        ids = [draft.source.integer(one, "a token") for one in draft.source.items(node, "'words'")]
        return {"words": tuple(one for one in ids if one is not None)}
    return {"words": draft.source.text(node, "'words'")}


def started(draft: Draft) -> dict[str, str]:
    """Parameters that start as a value of the site, and which."""
    flowing = set(SITES[draft.at].ports) - {*SITES[draft.at].having(*STORED)}
    return {
        param.name: min(read)
        for param in draft.values.get("params", ())
        if param.init.name == FORMULA and (read := flowing & {*ex.names(param.init.args[0])})
    }


def _train(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    """Existing parameters to unfreeze, by the last component of their name."""
    found = list(draft.source.items(node, "'train'"))
    names = [(one, draft.source.text(one, "a parameter's name")) for one in found]
    for one, name in names:
        if name and not name.isidentifier():
            fact = f"'{name}' is not the last component of a parameter's name"
            draft.source.fail(one, fact)
    if not found:
        draft.source.fail(node, "'train' names no parameter")
    return {"train": tuple(name for _, name in names if name)}


def _formulas_schema() -> Json:
    return {"type": "object", "additionalProperties": formula(), "minProperties": 1}


# In the order in which they are read: a name must have its meaning before a formula reads it.
FIELDS = (
    Field(
        "method",
        "the name of its tensors and messages, where it is not the spec's",
        lambda: {"type": "string"},
        lambda draft, node: {"method": draft.source.text(node, "'method'")},
        lambda entry: entry.method,
        (*NEW, "train"),
    ),
    Field(
        "with",
        "arguments of this delta, in place of the spec's",
        values,
        _with,
        lambda entry: dict(entry.arguments),
        tuple(FORMS),
    ),
    Field(
        "at",
        "which sites it modifies",
        _at_schema,
        _at,
        _write_at,
        (*NEW, "train"),
        "at: ffn",
        more=lambda: (
            ", ".join([*named_sites(), f"{{op: {' or '.join(by_op())}, scope: glob}}"])
            + ", or a list of these; `peftc plan --sites` lists a model's own"
        ),
    ),
    Field(
        "where",
        "narrows the sites",
        lambda: keys(WHERE),
        _where,
        lambda entry: data(WHERE, entry) or None,
        tuple(FORMS),
        '# where: {stack: decoder, layers: "0-5,11"}',
    ),
    Field(
        "expect",
        "how many sites must match",
        lambda: {"type": "integer", "minimum": 0},
        lambda draft, node: {"expect": draft.source.integer(node, "'expect'")},
        lambda entry: entry.expect,
        (*NEW, "train"),
        "# expect: 24",
    ),
    Field(
        "params",
        "new tensors, of sizes that are the site's, arguments or numbers",
        lambda: {"type": "object", "additionalProperties": keys(PARAM)},
        _params,
        lambda entry: {one.name: data(PARAM, one) for one in entry.params} or None,
        NEW,
        "params:\n"
        "  down: {shape: [in, r],  init: kaiming_uniform}\n"
        "  up:   {shape: [r, out], init: zeros}",
        more=lambda: "; ".join(f"{row.name}: {row.doc}" for row in PARAM[1:]),
    ),
    Field(
        "let",
        "names for formulas",
        _formulas_schema,
        _let,
        lambda entry: {name: ex.show(one) for name, one in entry.let} or None,
        NEW,
        "# let: {hidden: x @ down}",
    ),
    Field(
        "delta",
        "the change, as a formula: reads x, so it is parallel; reads h: sequential",
        formula,
        _delta,
        lambda entry: shown(entry.delta),
        ("delta",),
        "delta: relu(x @ down) @ up",
    ),
    Field(
        "compose",
        f"how it joins the site's result, {DEFAULT} where it is left out",
        lambda: {**formula(), "default": DEFAULT},
        _compose,
        lambda entry: shown(entry.compose),
        ("delta",),
        "compose: h + s * delta",
    ),
    Field(
        "rewrite",
        "instead of delta and compose: what ports become",
        _formulas_schema,
        _rewrite,
        _write_rewrite,
        ("rewrite",),
        "# rewrite: {h: h + relu(x @ down) @ up * s}",
    ),
    Field(
        "penalty",
        "a number at each site, added to the loss",
        formula,
        _penalty,
        lambda entry: shown(entry.penalty),
        NEW,
        "# penalty: s * sum(sum(down * down))",
    ),
    Field(
        "positions",
        "shift: rows in front take the first positions, the tokens those behind",
        lambda: {"enum": list(POSITIONS), "default": "keep"},
        _positions,
        lambda entry: None if entry.positions == "keep" else entry.positions,
        NEW,
    ),
    Field(
        "words",
        "what the backbone reads where an init is a value, such as k: a text, or ids",
        lambda: {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
        _words,
        lambda entry: list(entry.words) if isinstance(entry.words, tuple) else entry.words,
        NEW,
    ),
    Field(
        "train",
        "existing parameters that train, by the last part of their name",
        lambda: {"type": "array", "items": {"type": "string"}, "minItems": 1},
        _train,
        lambda entry: list(entry.train) or None,
        ("train",),
        "# train: [bias]",
    ),
    Field(
        "use",
        "another spec, by its shipped name or a path; `with` gives its arguments",
        lambda: {"type": "string"},
        lambda draft, node: {},  # the reader's: it reads a file
        lambda entry: None,  # written as what it stands for
        ("use",),
        "# use: lora",
    ),
)


def _forms_schema() -> list[Json]:
    """A delta is one of FORMS: the keys that say so, and none that do not go with it."""
    found: list[Json] = []
    for form, required in FORMS.items():
        foreign = [row.name for row in FIELDS if form not in row.forms]
        found.append({"required": [*required], "properties": dict.fromkeys(foreign, False)})
    return found


def _write_arguments(spec: Spec) -> dict[str, Any] | None:
    return {**spec.arguments, **({spec.auto: "auto"} if spec.auto else {})} or None


# The keys of a spec; `read` takes its Reader.
TOP = (
    Field(
        "name",
        "of the method; the file's where it is left out",
        lambda: {"type": "string"},
        lambda reader, node: reader.called(node),
        lambda spec: spec.name,
        sample="name: NAME",
    ),
    Field(
        "title",
        "one line on what it is; the first comment where it is left out",
        lambda: {"type": "string"},
        lambda reader, node: reader.source.text(node, "'title'"),
        lambda spec: spec.title,
    ),
    Field(
        "with",
        "arguments and their defaults; --set r=16 overrides one",
        values,
        lambda reader, node: reader.declare(node),
        _write_arguments,
        sample="with: {r: 8, s: 1.0}",
    ),
    Field(
        "budget",
        "a share of the backbone, or a number, that decides the argument which is auto",
        lambda: {"type": ["string", "integer"], "examples": ["6.7%"]},
        lambda reader, node: reader.budget(node),
        lambda spec: spec.budget,
        sample="# budget: 6.7%",
    ),
    Field(
        "deltas",
        "a spec lists its deltas",
        lambda: {
            "type": "array",
            "items": {**keys(FIELDS), "oneOf": _forms_schema()},
            "minItems": 1,
        },
        lambda reader, node: reader.deltas(node),
        lambda spec: None,  # by peftc.language.resolved, from FIELDS
        sample="deltas:",
        required=True,
    ),
)
