"""Where a delta acts: the keys `at` and `where`."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import yaml

from peftc.language.field import Draft, Field
from peftc.language.formulas import Scope
from peftc.language.ports import SITES, by_op
from peftc.language.source import Json, Source
from peftc.language.spec import Entry, Where

STACKS = ("encoder", "decoder", "first", "text", "vision", "audio")
# What a stack is besides the one that it names: where text is read and written.
OF_TEXT = ("encoder", "decoder", "first")
KINDS = ("self", "cross")


def read_at(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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


def _by_op(entry: Entry) -> bool:
    row = SITES.get(entry.at)
    return row is not None and row.by_op


def write_at(entry: Entry) -> Any:
    if _by_op(entry):
        return {"op": entry.at, "scope": entry.scope}
    return entry.at or None


def at_schema() -> Json:
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


def _layers(source: Source, node: yaml.Node) -> tuple[int, ...] | None:
    return _numbers("layers", source, node)


def _experts(source: Source, node: yaml.Node) -> tuple[int, ...] | None:
    return _numbers("experts", source, node)


def _numbers(key: str, source: Source, node: yaml.Node) -> tuple[int, ...] | None:
    written = source.text(node, f"'{key}'") or ""
    found: list[int] = []
    for part in written.split(","):
        match = re.fullmatch(r"\s*(\d{1,4})(?:-(\d{1,4}))?\s*", part)
        if match is None:
            source.fail(node, f"'{key}' cannot be '{written}'", 'write it as "0-5,11"')
            return None
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not found:
        source.fail(node, f"'{key}' selects nothing: '{written}'")
    return tuple(found)


def _write_layers(entry: Entry) -> str | None:
    layers = entry.where.layers
    return None if layers is None else ",".join(map(str, layers))


def _write_experts(entry: Entry) -> str | None:
    experts = entry.where.experts
    return None if experts is None else ",".join(map(str, experts))


def _write_scope(entry: Entry) -> str | None:
    """Of a site by op it stands in `at`."""
    return None if _by_op(entry) else entry.scope


WHERE = (
    Field(
        "stack",
        "the encoder, the decoder, or the first of these that has such a site; either of them (text), or what images or sounds go through first",
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
        "experts",
        "numbers of experts, from 0",
        lambda: {"type": ["string", "integer"], "examples": ["0-3"]},
        _experts,
        _write_experts,
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


def read_where(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    where, scope = narrowed(draft.source, node)
    if scope is not None and draft.values.get("scope") is not None:
        draft.source.fail(node, "'scope' stands in 'at' already")
        scope = None
    if where.experts is not None and "experts" not in getattr(SITES.get(draft.at), "dims", ()):
        draft.source.fail(node, f"{draft.at or 'this'} has no experts to choose from")
    if "at" not in draft.items and where != Where():
        fix = "say 'at', or narrow by scope"
        draft.source.fail(node, "'where' narrows sites, and this trains parameters of any", fix)
    return {"where": where, **({} if scope is None else {"scope": scope})}


def meet(source: Source, entry: Entry, more: Where, scope: str | None, node: yaml.Node) -> Entry:
    """The entry at the sites that both name; a problem where there can be none."""
    what = f"'where' selects nothing of {entry.method}"
    if not entry.at and more != Where():
        source.fail(node, f"{what}: it names no site to narrow", "narrow by scope")
    pairs = {
        "stack": (entry.where.stack, more.stack),
        "kind": (entry.where.kind, more.kind),
        "layers": (entry.where.layers, more.layers),
        "experts": (entry.where.experts, more.experts),
        "scope": (entry.scope, scope),
    }
    met: dict[str, Any] = {}
    for key, (own, other) in pairs.items():
        met[key] = own if other is None else other if own is None else _both(own, other)
        if met[key] is None and own is not None:
            fact = f"{what} at {entry.at}: {key} {_shown(own)} there, {_shown(other)} here"
            source.fail(node, fact)
    scope = met.pop("scope")
    return replace(entry, where=Where(**met), scope=scope)


def _both(own: Any, other: Any) -> Any:
    """What two ways to narrow leave; None where they leave nothing. The first stack is the encoder if there is
    one; where there is none, `encoder` selects nothing anyway."""
    if isinstance(own, tuple):
        return tuple(one for one in own if one in other) or None
    if {own, other} == {"first", "encoder"}:
        return "encoder"
    if "text" in (own, other):
        stack = other if own == "text" else own
        return stack if stack in (*OF_TEXT, "text") else None
    return own if own == other else None


def _shown(one: Any) -> str:
    return ",".join(map(str, one)) if isinstance(one, tuple) else str(one)
