"""The table of the language: a row for each key that a spec and its deltas may have. The reader, what a resolved
spec writes, the JSON Schema and the skeleton of `peftc new` follow from it."""

from __future__ import annotations

from typing import Any

from peftc.language import changes, params
from peftc.language import expr as ex
from peftc.language import where as sites
from peftc.language.field import FORMS, NEW, Field, data, formula, formulas, keys, shown, values
from peftc.language.ports import by_op
from peftc.language.source import Json
from peftc.language.spec import Spec

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
        changes.read_with,
        lambda entry: dict(entry.arguments),
        tuple(FORMS),
    ),
    Field(
        "at",
        "which sites it modifies",
        sites.at_schema,
        sites.read_at,
        sites.write_at,
        (*NEW, "train"),
        "at: ffn",
        more=lambda: (
            ", ".join([*sites.named_sites(), f"{{op: {' or '.join(by_op())}, scope: glob}}"])
            + ", or a list of these; `peftc plan --sites` lists a model's own"
        ),
    ),
    Field(
        "where",
        "narrows the sites",
        lambda: keys(sites.WHERE),
        sites.read_where,
        lambda entry: data(sites.WHERE, entry) or None,
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
        lambda: {"type": "object", "additionalProperties": keys(params.PARAM)},
        params.read_params,
        lambda entry: {one.name: data(params.PARAM, one) for one in entry.params} or None,
        NEW,
        "params:\n"
        "  down: {shape: [in, r],  init: kaiming_uniform}\n"
        "  up:   {shape: [r, out], init: zeros}",
        more=lambda: "; ".join(f"{row.name}: {row.doc}" for row in params.PARAM[1:]),
    ),
    Field(
        "let",
        "names for formulas",
        formulas,
        changes.read_let,
        lambda entry: {name: ex.show(one) for name, one in entry.let} or None,
        NEW,
        "# let: {hidden: x @ down}",
    ),
    Field(
        "delta",
        "the change, as a formula: reads x, so it is parallel; reads h: sequential",
        formula,
        changes.read_delta,
        lambda entry: shown(entry.delta),
        ("delta",),
        "delta: relu(x @ down) @ up",
    ),
    Field(
        "compose",
        f"how it joins the site's result, {changes.DEFAULT} where it is left out",
        lambda: {**formula(), "default": changes.DEFAULT},
        changes.read_compose,
        lambda entry: shown(entry.compose),
        ("delta",),
        "compose: h + s * delta",
    ),
    Field(
        "rewrite",
        "instead of delta and compose: what ports become",
        formulas,
        changes.read_rewrite,
        changes.write_rewrite,
        ("rewrite",),
        "# rewrite: {h: h + relu(x @ down) @ up * s}",
    ),
    Field(
        "penalty",
        "a number at each site, added to the loss",
        formula,
        changes.read_penalty,
        lambda entry: shown(entry.penalty),
        NEW,
        "# penalty: s * sum(sum(down * down))",
    ),
    Field(
        "positions",
        "shift: rows in front take the first positions, the tokens those behind",
        lambda: {"enum": list(changes.POSITIONS), "default": "keep"},
        changes.read_positions,
        lambda entry: None if entry.positions == "keep" else entry.positions,
        NEW,
    ),
    Field(
        "words",
        "what the backbone reads where an init is a value, such as k: a text, or ids",
        lambda: {"oneOf": [{"type": "string"}, {"type": "array", "items": {"type": "integer"}}]},
        changes.read_words,
        lambda entry: list(entry.words) if isinstance(entry.words, tuple) else entry.words,
        NEW,
    ),
    Field(
        "train",
        "existing parameters that train, by the last part of their name",
        lambda: {"type": "array", "items": {"type": "string"}, "minItems": 1},
        changes.read_train,
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
