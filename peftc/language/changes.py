"""What a delta does: its formulas, what they start from, what trains besides."""

from __future__ import annotations

from typing import Any

import yaml

from peftc.errors import suggest
from peftc.language import expr as ex
from peftc.language.field import Draft
from peftc.language.ports import SITES, STORED
from peftc.language.shapes import agree, text
from peftc.language.spec import FORMULA, Entry

POSITIONS = ("keep", "shift")
DEFAULT = "h + delta"  # `compose` where it is left out


def read_with(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    given: dict[str, float | int] = {}
    for name, (key, value) in draft.source.mapping(node, "'with'").items():
        number = draft.formulas.number(value, draft.arguments)
        given[name] = 0 if number is None else number
        draft.own[name] = key
    draft.arguments = given
    return {"arguments": given}


def read_let(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    found = []
    for name, (key, inner) in draft.source.mapping(node, "'let'").items():
        if draft.formulas.fresh(key, name, draft.names):
            expression, draft.names.shapes[name] = draft.formulas.checked(inner, draft.names)
            if expression is not None:
                found.append((name, expression))
    return {"let": tuple(found)}


def read_delta(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    """Without a `compose`, `h` has the shape of what is added to it."""
    expression, shape = draft.formulas.checked(node, draft.names)
    draft.result = (node, shape)
    return {"delta": expression, "compose": ex.parse(DEFAULT)}


def read_compose(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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


def read_rewrite(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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


def write_rewrite(entry: Entry) -> dict[str, str] | None:
    if entry.delta is not None or entry.train:
        return None
    return {port: ex.show(one) for port, one in entry.assign}


def _fits(draft: Draft, node: yaml.Node, port: str, got: ex.Shape) -> None:
    """An assigned value has the features of its port."""
    want = SITES[draft.at].shapes[port]
    if got and "..." not in got[-1:] and not agree(got[-1], want[-1]):
        draft.source.fail(node, f"'{port}' is {text(want)} but is assigned {text(got)}")


def read_penalty(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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


def read_positions(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    return {"positions": draft.source.choice(node, "'positions'", POSITIONS) or "keep"}


def read_words(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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


def read_train(draft: Draft, node: yaml.Node) -> dict[str, Any]:
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
