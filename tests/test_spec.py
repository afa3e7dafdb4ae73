"""The spec language: what it reads, and the exact message for what it does not."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from peftc.errors import PeftcError
from peftc.language import resolved
from peftc.language.expr import ExprError, Name, names, number, parse, show, substitute
from peftc.language.field import FORMS
from peftc.language.fields import FIELDS, TOP
from peftc.language.params import PARAM
from peftc.language.reader import load_spec, parse_spec
from peftc.language.schema import json_schema
from peftc.language.shelf import directory, shipped
from peftc.language.skeleton import skeleton
from peftc.language.spec import Spec, Where
from peftc.language.where import WHERE

HEAD = "with: {r: 4}\ndeltas:\n  - at: ffn\n    params:\n"
DOWN = "      down: {shape: [in, r], init: zeros}\n"
UP = "      up: {shape: [r, out], init: zeros}\n"
ROWS = (
    "deltas:\n  - at: attention.heads\n    params: {P: {shape: [%s], init: zeros}}\n"
    "    rewrite:\n      k: %s\n"
)
GOOD = HEAD + DOWN + UP + "    delta: relu(x @ down) @ up\n"

BAD = {
    "": "s.yaml:1:1: the file is empty",
    "deltas: [": "s.yaml:1:10: not YAML: expected the node content, but found '<stream end>'",
    "- a": "s.yaml:1:1: a spec must be a mapping, not a list",
    "just words": "s.yaml:1:1: a spec must be a mapping, not 'just words'",
    "name: x": "s.yaml:1:1: 'deltas' is missing (a spec lists its deltas)",
    "deltas: []": "s.yaml:1:9: 'deltas' is empty",
    "deltas: 3": "s.yaml:1:9: 'deltas' must be a list, not '3'",
    "delta: []\ndeltas: [{train: [bias]}]": "s.yaml:1:1: unknown key 'delta' (did you mean 'deltas'?)",
    "deltas: [{train: [bias]}]\ndeltas: []": "s.yaml:2:1: 'deltas' stands here twice",
    "deltas: [&a {train: [bias]}, *a]": "s.yaml:1:10: anchors and aliases are not allowed (write it out, or `use:` a spec)",
    "deltas: " + "[" * 30 + "]" * 30: "s.yaml:1:28: nested deeper than 20",
    "deltas: [{}]": "s.yaml:1:10: 'at' is missing (say which site the delta modifies, such as ffn)",
    "deltas: [{train: []}]": "s.yaml:1:18: 'train' names no parameter",
    "deltas: [{train: [a.b]}]": "s.yaml:1:19: 'a.b' is not the last component of a parameter's name",
    "deltas: [{train: [bias], delta: x}]": "s.yaml:1:26: 'delta' does not go with 'train'",
    "deltas: [{use: lorra}]": "s.yaml:1:16: no spec 'lorra': neither a file nor a shipped name (did you mean 'lora'?)",
    "deltas: [{use: lora, at: ffn}]": "s.yaml:1:22: 'at' does not go with 'use'",
    "deltas: [{delta: x}]": "s.yaml:1:10: 'at' is missing (say which site the delta modifies, such as ffn)",
    "deltas: [{at: fnn, delta: x}]": "s.yaml:1:15: 'at' cannot be 'fnn' (did you mean 'ffn'?)",
    "deltas: [{at: {op: linear}, delta: x}]": "s.yaml:1:15: give both: {op: linear or conv, scope: a glob over module paths}",
    "deltas: [{at: ffn}]": "s.yaml:1:10: give either 'delta' or 'rewrite'",
    "deltas: [{at: ffn, delta: x, rewrite: {h: x}}]": "s.yaml:1:10: give either 'delta' or 'rewrite'",
    "deltas: [{at: ffn, rewrite: {h: x}, compose: h}]": "s.yaml:1:37: 'compose' does not go with 'rewrite'",
    "deltas: [{at: ffn, rewrite: {q: x}}]": "s.yaml:1:30: 'ffn' has no port 'q' to assign (one of: h)",
    "deltas: [{at: ffn, delta: x, where: {layer: 1}}]": "s.yaml:1:38: unknown key 'layer' (did you mean 'layers'?)",
    "deltas: [{at: ffn, delta: x, where: {layers: 1-x}}]": "s.yaml:1:46: 'layers' cannot be '1-x' (write it as \"0-5,11\")",
    "deltas: [{at: ffn, delta: x, where: {layers: 3-1}}]": "s.yaml:1:46: 'layers' selects nothing: '3-1'",
    "deltas: [{at: ffn, delta: x, where: {stack: top}}]": "s.yaml:1:45: 'stack' cannot be 'top' (one of: encoder, decoder, first, text, vision, audio)",
    "deltas: [{at: ffn, delta: x, words: hello}]": "s.yaml:1:30: no parameter starts from the words (init: k, for a prefix)",
    "deltas: [{at: ffn, delta: x, positions: move}]": "s.yaml:1:41: 'positions' cannot be 'move' (one of: keep, shift)",
    HEAD
    + "      a: {shape: [out], init: h}\n    delta: r * a\n": "s.yaml:4:5: 'a' starts as 'h', a value (say of which text: words: ...)",
    "deltas: [{at: ffn, delta: x, expect: some}]": "s.yaml:1:38: 'expect' must be a whole number",
    "deltas: [{at: ffn, delta: y}]": "s.yaml:1:27: unknown name 'y'",
    "deltas: [{at: ffn, delta: rellu(x)}]": "s.yaml:1:27: unknown op 'rellu' (did you mean 'relu'?)",
    "deltas: [{at: ffn, delta: 'relu(x, x)'}]": "s.yaml:1:27: 'relu' takes 1 argument, not 2",
    "deltas: [{at: ffn, delta: x.shape}]": "s.yaml:1:27: 'x.shape' is not part of the language (allowed: names, numbers, + - * / // @ and ops such as relu(x))",
    "deltas: [{at: ffn, delta: x ** 2}]": "s.yaml:1:27: 'x ** 2' is not part of the language (allowed: names, numbers, + - * / // @ and ops such as relu(x))",
    "deltas: [{at: ffn, delta: x +}]": "s.yaml:1:27: 'x +' is not an expression",
    "deltas: [{at: ffn, delta: x, compose: h}]": "s.yaml:1:39: 'compose' does not read 'delta'",
    "with: {r: 4}\ndeltas: [{at: ffn, delta: x}]": "s.yaml:1:8: argument 'r' is never used",
    "with: {r: q}\ndeltas: [{at: ffn, delta: r * x}]": "s.yaml:1:11: unknown name 'q'",
    "with: {r: 1 / 0}\ndeltas: [{at: ffn, delta: r * x}]": "s.yaml:1:11: '1 / 0' has no usable value",
    HEAD
    + DOWN
    + UP
    + "    delta: relu(x @ dwn) @ up\n": "s.yaml:7:21: unknown name 'dwn' (did you mean 'down'?)",
    HEAD
    + DOWN
    + UP
    + "    delta: x @ up @ down\n": "s.yaml:7:12: 'x @ up': [..., in] @ [r, out]: 'in' is not 'r'",
    HEAD
    + DOWN
    + "    delta: x @ down\n": "s.yaml:6:12: 'h' is [..., out] but is assigned [..., r]",
    HEAD
    + DOWN
    + UP
    + "      more: {shape: [r], init: zeros}\n    delta: x @ down @ up\n": "s.yaml:7:7: 'more' is never used",
    HEAD
    + "      x: {shape: [r], init: zeros}\n    delta: x\n": "s.yaml:5:7: 'x' already has a meaning here (choose another name)",
    HEAD
    + "      a: {shap: [out], init: zeros}\n    delta: r * a\n": "s.yaml:5:11: unknown key 'shap' (did you mean 'shape'?)",
    HEAD
    + "      a: {shape: [ot], init: zeros}\n    delta: r * h\n": "s.yaml:5:19: unknown size 'ot' (did you mean 'out'?)",
    HEAD
    + "      a: {shape: [out]}\n    delta: r * a\n": "s.yaml:5:10: parameter 'a' has no 'init'",
    HEAD
    + "      a: {shape: [out], init: zero}\n    delta: r * a\n": "s.yaml:5:31: unknown init 'zero' (did you mean 'zeros'?)",
    HEAD
    + "      a: {shape: [out], init: constant}\n    delta: r * a\n": "s.yaml:5:31: init 'constant' takes 1 argument, not 0",
    HEAD
    + "      a: {shape: [out], init: zeros, per: layer}\n    delta: r * a\n": "s.yaml:5:43: 'per' cannot be 'layer' (one of: site, kind, shape, model, expert)",
    HEAD
    + "      a-b: {shape: [r], init: zeros}\n    delta: x\n": "s.yaml:5:7: 'a-b' is not a name",
    HEAD
    + "      a: {shape: [1.5], init: zeros}\n    delta: r * a\n": "s.yaml:5:19: '1.5' is not a size",
    HEAD
    + DOWN
    + UP
    + "    delta: x @ down @ up\n    penalty: down\n": "s.yaml:8:14: 'penalty' is [in, r], not a number (sum(...) it)",
    "deltas: [{at: ffn, delta: x, penalty: sum(x)}]": "s.yaml:1:39: 'penalty' reads the value 'x' (parameters alone)",
    HEAD
    + "      a: {shape: [2, 3], init: zeros}\n    delta: x @ cayley(a)\n": "s.yaml:6:16: 'cayley(a)': [2, 3] is not square",
    HEAD
    + "      a: {shape: [2, 3, 4], init: zeros}\n      b: {shape: [5, 3, 4], init: zeros}\n"
    + "    delta: kron(a, b)\n": "s.yaml:7:12: 'kron(a, b)': kron of [2, 3, 4] and [5, 3, 4]: the leading axes differ",
    ROWS
    % (
        "2, 30",
        "prepend(split_heads(P, 4), k)",
    ): "s.yaml:5:18: 'split_heads(P, 4)': 30 features do not split into 4 heads",
    "with: {r: 4}\n"
    + ROWS
    % (
        "kv_heads, 2, r",
        "prepend(P, k)",
    ): "s.yaml:6:10: 'prepend(P, k)': [kv_heads, 2, r] before [..., kv_heads, keys, head_dim]: 'r' is not 'head_dim'",
    "deltas: [{at: ffn, delta: True}]": "s.yaml:1:27: 'True' is not a number",
    "with: {r: relu(2)}\ndeltas: [{at: ffn, delta: r * x}]": "s.yaml:1:11: 'relu' does not work on plain numbers",
    "with: {r: auto, s: auto}\ndeltas: [{at: ffn, delta: r * s * x}]": "s.yaml:1:20: 'r' is auto already; a budget decides one argument",
    "deltas: [{[a]: b}]": "s.yaml:1:11: a key must be a word",
    "#" * (1 << 18) + "\n": "s.yaml:1:1: the spec is larger than 262144 bytes",
}


@pytest.mark.parametrize("text", BAD, ids=range(len(BAD)))
def test_bad_specs_say_what_is_wrong(text: str) -> None:
    with pytest.raises(PeftcError) as error:
        parse_spec(text, "s.yaml")
    assert BAD[text] in str(error.value).splitlines()


def test_all_problems_are_shown_in_file_order() -> None:
    text = "nam: x\ndeltas:\n  - {at: ffn, delta: y}\n  - {at: fnn, delta: x}\n"
    with pytest.raises(PeftcError) as error:
        parse_spec(text, "s.yaml")
    assert [line.split(" ")[0] for line in str(error.value).splitlines()] == [
        "s.yaml:1:1:",
        "s.yaml:3:22:",
        "s.yaml:4:10:",
    ]


def test_shipped_specs() -> None:
    assert len(shipped()) == 34
    for name in shipped():
        path = directory() / f"{name}.yaml"
        assert len(path.read_text().splitlines()) <= 30
        spec = load_spec(name)
        assert spec.name == name and spec.title
        assert resolved.read(json.loads(json.dumps(resolved.write(spec)))) == spec


def test_arguments_reach_the_entries() -> None:
    spec = load_spec("mam", l=3, r=7)
    assert spec.entries[0].arguments == {"l": 3, "m": 800}
    assert spec.entries[1].arguments == {"r": 7, "s": 4.0}
    with pytest.raises(PeftcError, match=r"no argument 'rank' \(arguments: l, m, r, s\)"):
        load_spec("mam", rank=3)
    with pytest.raises(PeftcError, match="argument 'r' must be a number"):
        load_spec("mam", r="many")


def test_use_of_a_file_beside_and_of_itself(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(GOOD)
    (tmp_path / "both.yaml").write_text(
        "deltas:\n  - {use: mine.yaml, where: {stack: decoder}}\n  - use: bitfit\n"
    )
    spec = load_spec(tmp_path / "both.yaml")
    assert [entry.method for entry in spec.entries] == ["mine", "bitfit"]
    assert spec.entries[0].where.stack == "decoder"
    (tmp_path / "loop.yaml").write_text("deltas:\n  - use: loop.yaml\n")
    with pytest.raises(PeftcError, match=r"'loop\.yaml' uses itself"):
        load_spec(tmp_path / "loop.yaml")


def test_digest_ignores_comments() -> None:
    assert resolved.digest(parse_spec(GOOD, "s")) == resolved.digest(
        parse_spec("# a\n" + GOOD, "s")
    )
    assert resolved.digest(parse_spec(GOOD, "s")) != resolved.digest(parse_spec(GOOD, "s", r=5))


def test_expressions() -> None:
    for text in (
        "h + alpha / r * delta",
        "(a + b) * c",
        "-x @ (a - b)",
        "relu(x @ in) - (a - b)",
        "a - (b - c)",
    ):
        assert show(parse(text)) == text
    assert names(parse("a + in * a")) == ("a", "in")
    assert show(substitute(parse("a * b"), {"a": Name("c")})) == "c * b"
    assert number(parse("2 * d // 3"), {"d": 10}) == 6
    for text in ("a" * 3000, "-" * 200 + "a", "__import__('os')", "a if b else c", "1e400", "[a]"):
        with pytest.raises(ExprError):
            parse(text)


def test_schema_admits_the_shipped_specs() -> None:
    schema = json_schema()
    entry = schema["properties"]["deltas"]["items"]["properties"]
    assert "attention.heads" in entry["at"]["oneOf"][0]["oneOf"][0]["enum"]
    assert set(schema["properties"]) == {"name", "title", "with", "budget", "deltas"}


words = st.sampled_from(
    [
        "at",
        "ffn",
        "delta",
        "x @ a",
        "params",
        "shape",
        "with",
        "use",
        "lora",
        "train",
        "bias",
        "h",
        "1",
        "in",
        "let",
        "method",
        "rewrite",
        "where",
        "scope",
        "layers",
    ]
)
trees = st.recursive(
    words | st.integers() | st.none() | st.booleans() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(words, inner, max_size=4),
    max_leaves=20,
)


def read(text: str) -> None:
    try:
        assert isinstance(parse_spec(text, "fuzz.yaml"), Spec)
    except PeftcError as error:
        assert str(error)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=200))
def test_any_text_is_a_spec_or_an_error(text: str) -> None:
    read(text)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.dictionaries(words, trees, max_size=5), max_size=3))
def test_any_structure_is_a_spec_or_an_error(deltas: list[dict[str, object]]) -> None:
    read(json.dumps({"deltas": deltas}))
    try:
        spec = resolved.read({"deltas": deltas})
    except PeftcError as error:
        assert str(error)
    else:
        assert resolved.read(resolved.write(spec)) == spec


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="abx h()+-*/@.,1e9'\"[]", max_size=40))
def test_any_expression_is_one_or_an_error(text: str) -> None:
    try:
        assert parse(show(parse(text))) == parse(text)
    except ExprError as error:
        assert error.fact


def refused(text: str) -> str:
    with pytest.raises(PeftcError) as error:
        parse_spec(text, "s.yaml")
    return str(error.value)


def test_in_is_no_other_name() -> None:
    """`in` is a size, and a keyword of Python's: no name stands for it behind the user's back."""
    text = "with: {iN: 3, ab: 5}\ndeltas: [{at: ffn, delta: h * iN * ab + in}]"
    (entry,) = parse_spec(text, "s").entries
    assert entry.delta is not None and names(entry.delta) == ("h", "iN", "ab", "in")
    assert show(entry.delta) == "h * iN * ab + in"
    assert number(parse("iN + in"), {"iN": 3, "in": 4}) == 7


def test_names_that_no_formula_can_read() -> None:
    for name in ("lambda", "a-b", "'1'"):
        said = name.strip("'")
        assert f"'{said}' is not a name" in refused(
            f"with: {{{name}: 1}}\ndeltas: [{{train: [bias]}}]"
        )
    for at, name, what in (("ffn", "in", "size"), ("attention.heads", "k", "port")):
        text = f"with: {{{name}: 3}}\ndeltas:\n  - {{at: {at}, delta: {name} * h}}"
        fact = f"s.yaml:3:10: '{name}' is an argument and a {what} of {at} (rename the argument)"
        assert fact in refused(text)
    assert parse_spec("with: {k: 3}\ndeltas: [{at: ffn, delta: k * h}]", "s").arguments == {"k": 3}


def test_arguments_of_one_delta() -> None:
    text = (
        "with: {r: 4}\ndeltas:\n  - {at: ffn, with: {s: r / 8}, delta: s * h, method: scaled}\n"
        "  - {at: ffn.up, delta: r * h}\n"
    )
    one, other = parse_spec(text, "s").entries
    assert (one.method, one.arguments, other.arguments) == ("scaled", {"s": 0.5}, {"r": 4})
    assert "s.yaml:1:37: argument 's' is never used" in refused(
        "deltas: [{at: ffn, delta: h, with: {s: 1}}]"
    )
    # Not silently the file's: what a delta has of its own is all that it sees.
    inner = "with: {r: 4}\ndeltas: [{at: ffn, delta: r * h, with: {s: 1}}]"
    assert "s.yaml:2:27: unknown name 'r'" in refused(inner)


def using(inner: str, outer: str, tmp_path: Path) -> Spec:
    (tmp_path / "inner.yaml").write_text(f"deltas: [{inner}]")
    (tmp_path / "outer.yaml").write_text(f"deltas:\n  - use: inner.yaml\n    where: {outer}\n")
    return load_spec(tmp_path / "outer.yaml")


@pytest.mark.parametrize(
    ("own", "more", "left"),
    [
        ("{layers: 0-5}", "{layers: '4-9'}", Where(layers=(4, 5))),
        ("{layers: 0-5}", "{stack: decoder}", Where("decoder", None, tuple(range(6)))),
        ("{stack: first}", "{stack: encoder}", Where("encoder")),
        ("{stack: encoder}", "{stack: first}", Where("encoder")),
        ("{kind: self}", "{kind: self, layers: 3}", Where(None, "self", (3,))),
    ],
)
def test_where_of_a_use_narrows(own: str, more: str, left: Where, tmp_path: Path) -> None:
    (entry,) = using(f"{{at: attention, delta: x, where: {own}}}", more, tmp_path).entries
    assert entry.where == left


@pytest.mark.parametrize(
    ("inner", "more", "fact"),
    [
        ("layers: 0-2", "{layers: 3-4}", "at attention: layers 0,1,2 there, 3,4 here"),
        ("stack: encoder", "{stack: decoder}", "at attention: stack encoder there, decoder here"),
        ("stack: first", "{stack: decoder}", "at attention: stack first there, decoder here"),
        ("kind: self", "{kind: cross}", "at attention: kind self there, cross here"),
        ("scope: 'a*'", "{scope: 'b*'}", "at attention: scope a* there, b* here"),
    ],
)
def test_where_that_selects_nothing(inner: str, more: str, fact: str, tmp_path: Path) -> None:
    with pytest.raises(PeftcError) as error:
        using(f"{{at: attention, delta: x, where: {{{inner}}}}}", more, tmp_path)
    assert f"outer.yaml:3:12: 'where' selects nothing of inner {fact}" in str(error.value)


def test_where_without_sites(tmp_path: Path) -> None:
    """`train` without `at` is of any module: stacks and layers would be ignored, so they are refused."""
    with pytest.raises(
        PeftcError, match=r"of inner: it names no site to narrow \(narrow by scope\)"
    ):
        using("{train: [bias]}", "{stack: decoder}", tmp_path)
    (entry,) = using("{train: [bias]}", '{scope: "*.decoder.*"}', tmp_path).entries
    assert (entry.at, entry.scope) == ("", "*.decoder.*")
    fact = "'where' narrows sites, and this trains parameters of any (say 'at', or narrow by scope)"
    assert fact in refused("deltas: [{train: [bias], where: {layers: 1}}]")
    assert "'scope' stands in 'at' already" in refused(
        "deltas: [{at: {op: linear, scope: a}, delta: x, where: {scope: b}}]"
    )


def test_a_use_of_what_waits_for_a_budget(tmp_path: Path) -> None:
    (tmp_path / "auto.yaml").write_text(
        "budget: 5%\n" + load_spec("lora").text.replace("{r: 8,", "{r: auto,")
    )
    (tmp_path / "uses.yaml").write_text("deltas: [{use: auto.yaml}]")
    with pytest.raises(PeftcError) as error:
        load_spec(tmp_path / "uses.yaml")
    assert str(error.value).endswith(
        "uses.yaml:1:16: 'r' of auto.yaml is auto, which only a budget of the whole decides "
        "(give it: with: {r: 8})"
    )
    (tmp_path / "uses.yaml").write_text("deltas: [{use: auto.yaml, with: {r: 2}}]")
    assert load_spec(tmp_path / "uses.yaml").entries[0].arguments["r"] == 2


def test_overrides_are_finite_numbers() -> None:
    for value in (float("nan"), float("inf"), 1e13, True, "8"):
        with pytest.raises(PeftcError, match="argument 'r' must be a number"):
            load_spec("lora", r=value)


def test_every_key_has_its_row() -> None:
    """One table: what is read, offered, written and shown."""
    entry = json_schema()["properties"]["deltas"]["items"]
    assert list(entry["properties"]) == [row.name for row in FIELDS]
    assert [one["required"][-1] for one in entry["oneOf"]] == list(FORMS)
    assert all(row.doc and row.forms for row in FIELDS)
    assert all(row.doc for table in (TOP, WHERE, PARAM) for row in table)
    text = skeleton("mine")
    assert parse_spec(text, "mine").name == "mine"
    assert all(len(line) <= 120 for line in text.splitlines())


@pytest.mark.parametrize("key", [row.name for row in FIELDS if row.sample.startswith("#")])
def test_the_skeletons_comments_are_specs(key: str) -> None:
    """A comment of the skeleton may be taken as it stands."""
    lines = skeleton("mine").splitlines()
    at = next(i for i, line in enumerate(lines) if re.match(rf"\s*# (- )?{key}: ", line))
    lines[at] = lines[at].replace("# ", "", 1)
    if key == "rewrite":
        lines = [line for line in lines if not re.match(r"\s*(delta|compose): ", line)]
    if key == "let":
        lines = [line.replace("relu(x @ down)", "relu(hidden)") for line in lines]
    assert parse_spec("\n".join(lines), "mine").entries
