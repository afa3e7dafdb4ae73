"""Fits: what an edit asks of its site, checked with the site's numbers before the graph is touched."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from peftc.language import expr as ex
from peftc.language.ops import infer
from peftc.language.ports import SITES
from peftc.plan.algebra import grown, inlined, port_shapes, shape_of, ungrown
from peftc.plan.edit import Edit, Parameter

# What ports call the lengths of a sequence.
LENGTHS = ("tokens", "keys", "queries")


def check(edit: Edit) -> None:
    """The language's own shape rules, now with this site's numbers. Raises ExprError."""
    site, entry = edit.site, edit.entry
    ports = port_shapes(site)
    for parameter in edit.parameters:
        if parameter.formula is not None:
            _check_formula(parameter, ports)
    lets: dict[str, ex.Shape] = {}
    for name, expression in entry.let:
        lets[name] = shape_of(expression, edit, lets)
    _check_growth(edit)
    _check_each(edit)
    for port, expression in entry.assign:
        got, want = shape_of(expression, edit, lets), ports[port]
        if got[-1:] != want[-1:] and got != ():
            raise ex.ExprError(0, f"'{port}' is {_text(want)} but is assigned {_text(got)}")


def _check_growth(edit: Edit) -> None:
    """Rows go in front of ports that grow, of keys and values alike, and nowhere inside a formula."""
    assigned, grows = inlined(edit)[1], SITES[edit.site.at].grows
    for port, expression in assigned.items():
        inner = expression if port not in grows else ungrown(expression)
        if any(call.op == "prepend" for call in ex.calls(inner)):
            fix = f"rows go in front of {', '.join(grows)}" if grows else "this site has no rows"
            raise ex.ExprError(0, f"'{port}' of {edit.site.at} is prepended to; {fix}")
    counts = {port: grown(expression, edit) for port, expression in assigned.items()}
    k, v = counts.get("k", 0), counts.get("v", 0)
    if edit.site.at == "attention.heads" and k != v:
        raise ex.ExprError(0, f"k gets {k} rows and v {v}; put as many in front of both")
    if edit.entry.positions == "shift" and not k:
        raise ex.ExprError(0, "'positions: shift' goes with keys that are prepended")


# Ops that count axes from the front, where what is of each expert has these.
_OF_ONE = ("sum_first", "split_heads", "prepend", "lookup", "svd_in", "svd_out")


def _check_each(edit: Edit) -> None:
    if not any(one.experts for one in edit.parameters):
        return
    found = {call.op for one in inlined(edit)[1].values() for call in ex.calls(one)}
    odd = [op for op in _OF_ONE if op in found]
    if odd:
        raise ex.ExprError(0, f"'{odd[0]}' does not go with parameters that are per: expert", "")


def _check_formula(parameter: Parameter, ports: Mapping[str, ex.Shape]) -> None:
    assert parameter.formula is not None
    got = infer(parameter.formula, ports)
    # A value at the site: without its batch, and as long as the words are made.
    if got[:1] == ("...",):
        got = tuple(
            size if one in LENGTHS else one
            for one, size in zip(got[1:], parameter.shape, strict=False)
        )
    if got != parameter.seen:
        raise ex.ExprError(
            0, f"'{parameter.name}' is {_text(parameter.shape)} but starts as {_text(got)}", ""
        )


def _text(shape: ex.Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def behind_rows(edits: Sequence[Edit]) -> Iterator[str]:
    """What acts on the tokens of an embedding must come before the rows that are put in front of them."""
    grown_by: dict[str, str] = {}
    for edit in edits:
        if edit.site.at != "embedding":
            continue
        first = grown_by.get(edit.site.name)
        if first and "h" in dict(edit.entry.assign):
            yield f"{edit.entry.place}: {edit.name} comes after the rows of {first}; put it before them"
        if any(grown(expression, edit) for expression in inlined(edit)[1].values()):
            grown_by[edit.site.name] = edit.entry.method
