"""The resolved spec as format 1 of a manifest has it, turned into the spec language.

Each of its entries was a delta of its own, also where they were written as one at a list of sites.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftc.language.ports import by_op


def converted(old: Mapping[str, Any]) -> dict[str, Any]:
    """What `peftc.language.resolved.read` takes. Raises KeyError, TypeError or ValueError on damaged data."""
    return {
        "name": old["name"],
        "title": old["title"],
        "with": dict(old["arguments"]),
        "deltas": [_delta(entry) for entry in old["entries"]],
    }


def _delta(entry: Mapping[str, Any]) -> dict[str, Any]:
    delta = {
        "method": entry["method"],
        "with": dict(entry["arguments"]),
        "at": _at(entry),
        "where": _where(entry),
        "expect": entry["expect"],
        "params": {one["name"]: _param(one) for one in entry["params"]},
        "let": dict(entry["let"]),
        "delta": entry["delta"],
        "compose": entry["compose"],
        "train": list(entry["train"]),
        "penalty": entry.get("penalty"),
        "positions": entry.get("positions"),
        "words": entry.get("words"),
    }
    if entry["delta"] is None and not entry["train"]:
        delta["rewrite"] = dict(entry["assign"])
    empty: tuple[Any, ...] = (None, {}, [])
    return {key: one for key, one in delta.items() if key == "with" or one not in empty}


def _at(entry: Mapping[str, Any]) -> Any:
    at = entry["at"]
    return {"op": at, "scope": entry["scope"]} if at in by_op() else at or None


def _where(entry: Mapping[str, Any]) -> dict[str, Any]:
    where, layers = entry["where"], entry["where"]["layers"]
    said = {
        "stack": where["stack"],
        "kind": where["kind"],
        "layers": None if layers is None else ",".join(str(int(one)) for one in layers),
        "scope": None if entry["at"] in by_op() else entry["scope"],
    }
    return {key: one for key, one in said.items() if one is not None}


def _param(param: Mapping[str, Any]) -> dict[str, Any]:
    name, *args = param["init"]
    # A formula of the site's ports stood behind this word.
    init = args[0] if name == "formula" else f"{name}({', '.join(args)})" if args else name
    return {
        "shape": list(param["shape"]),
        "init": init,
        "per": param["per"],
        "trainable": param["trainable"],
    }
