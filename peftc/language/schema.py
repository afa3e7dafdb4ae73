"""The JSON Schema of the spec language, so that editors complete and check specs."""

from __future__ import annotations

from typing import Any

from peftc.language.fields import INITS, PER, POSITIONS, STACKS
from peftc.language.ops import OPS
from peftc.language.ports import SITES, by_op

_FORMULA = {"type": ["string", "number"], "description": "ops: " + ", ".join(OPS)}
_FORMULAS = {"type": "object", "additionalProperties": _FORMULA, "minProperties": 1}
_VALUES = {"type": "object", "additionalProperties": {"type": ["number", "string"]}}


def json_schema() -> dict[str, Any]:
    """A schema for YAML specs; names, shapes and counts are checked by peftc itself."""
    entry = {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "at": {"oneOf": [_place(), {"type": "array", "items": _place(), "minItems": 1}]},
            "where": _where(),
            "params": {"type": "object", "additionalProperties": _param()},
            "let": _FORMULAS,
            "delta": _FORMULA,
            "compose": {**_FORMULA, "default": "h + delta"},
            "rewrite": _FORMULAS,
            "words": {
                "oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}],
                "description": "what the backbone reads where an init is a value, such as k",
            },
            "positions": {"enum": list(POSITIONS), "default": "keep"},
            "penalty": {**_FORMULA, "description": "a number at each site, added to the loss"},
            "train": {"type": "array", "items": {"type": "string"}, "minItems": 1},
            "use": {"type": "string", "description": "a shipped spec, or a path"},
            "with": _VALUES,
            "expect": {"type": "integer", "minimum": 0},
        },
        "oneOf": [
            {"required": ["at", "delta"]},
            {"required": ["at", "rewrite"]},
            {"required": ["train"]},
            {"required": ["use"]},
        ],
    }
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "peftc spec",
        "type": "object",
        "additionalProperties": False,
        "required": ["deltas"],
        "properties": {
            "name": {"type": "string"},
            "with": {**_VALUES, "description": "arguments and their defaults"},
            "budget": {"type": ["string", "integer"], "examples": ["6.7%"]},
            "deltas": {"type": "array", "items": entry, "minItems": 1},
        },
    }


def _place() -> dict[str, Any]:
    return {"oneOf": [_sites(), _by_op()]}


def _sites() -> dict[str, Any]:
    rows = [row for row in SITES.values() if not row.by_op]
    return {
        "enum": [row.name for row in rows],
        "description": "; ".join(f"{row.name}: {row.doc}" for row in rows),
    }


def _by_op() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["op", "scope"],
        "properties": {"op": _op(), "scope": {"type": "string"}},
    }


def _op() -> dict[str, Any]:
    doc = "; ".join(f"{name}: {SITES[name].doc}" for name in by_op())
    return {"enum": list(by_op()), "description": doc}


def _where() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "properties": {
            "stack": {"enum": list(STACKS)},
            "kind": {"enum": ["self", "cross"]},
            "layers": {"type": ["string", "integer"], "examples": ["0-5,11"]},
        },
    }


def _param() -> dict[str, Any]:
    return {
        "type": "object",
        "additionalProperties": False,
        "required": ["shape", "init"],
        "properties": {
            "shape": {"type": "array", "items": {"type": ["string", "integer"]}},
            "init": {"type": "string", "description": ", ".join(INITS) + ", or a formula of W"},
            "per": {"enum": list(PER), "default": "site"},
            "trainable": {"type": "boolean", "default": True},
        },
    }
