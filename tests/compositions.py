"""Random compositions: one to three methods, shipped or made of small random formulas, on a random family."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
import yaml
from conftest import attention_of, tiny
from hypothesis import strategies as st
from methods import lacks, spec
from transformers import PreTrainedModel

from peftc.driver import planner, survey
from peftc.errors import PeftcError
from peftc.language.ports import SITES
from peftc.language.reader import parse_spec
from peftc.language.shelf import shipped
from peftc.language.spec import Spec
from peftc.plan.plan import Plan

Draw = Callable[..., Any]
DTYPES = {"mixtral": torch.float32}  # torch has no product of experts in float64
NUMBERS = (-2, -0.5, 0.25, 0.5, 1, 2, 3)
UNARY = ("relu", "gelu", "gelu_tanh", "silu", "tanh", "sigmoid", "softmax", "-", "norm")
BINARY = ("+", "-", "*", "/")
SPAN = 3  # the width of a bottleneck, the length of a prefix


@dataclass(frozen=True)
class Part:
    """A shipped method by its name, or a formula as the text of a spec."""

    name: str
    text: str = ""

    def spec(self) -> Spec:
        return parse_spec(self.text, f"{self.name}.yaml") if self.text else spec(self.name)

    def __repr__(self) -> str:
        return self.text or self.name


@dataclass(frozen=True)
class Composition:
    """Parts in their order, on a tiny model of a family."""

    family: str
    attention: str
    parts: tuple[Part, ...]

    @property
    def dtype(self) -> torch.dtype:
        """float64, where nothing but a wrong formula makes a difference."""
        return DTYPES.get(self.family, torch.float64)

    def backbone(self) -> PreTrainedModel:
        return tiny(self.family, self.attention).to(self.dtype)

    def specs(self) -> list[Spec]:
        return [part.spec() for part in self.parts]

    def __repr__(self) -> str:
        lines = [f"{self.family}, {self.attention}", *map(repr, self.parts)]
        return "\n".join(lines)


@dataclass
class Formulas:
    """Draws expressions by their shapes and collects the parameters that they read."""

    draw: Callable[..., str]
    params: dict[str, str] = field(default_factory=dict)
    lets: dict[str, str] = field(default_factory=dict)

    def one_of(self, *options: str) -> str:
        return self.draw(st.sampled_from(options))

    def tensor(self, *shape: object) -> str:
        name = f"p{len(self.params)}"
        dims = ", ".join(map(str, shape))
        self.params[name] = f"{{shape: [{dims}], init: normal(0.3)}}"
        return name

    def number(self) -> str:
        return str(self.draw(st.sampled_from(NUMBERS)))

    def vector(self, width: object) -> str:
        """What broadcasts over features: numbers, a scalar, a vector."""
        kind = self.one_of("number", "scalar", "vector", "vector", "bounded")
        if kind == "number":
            return self.number()
        one = self.tensor(1 if kind == "scalar" else width)
        return f"tanh({one})" if kind == "bounded" else one

    def mapped(self, inner: str) -> str:
        """An elementwise function, sometimes under a name of its own."""
        op = self.one_of(*UNARY)
        if op == "norm":
            return f"({inner}) / (1 + norm({inner}))"
        text = f"-({inner})" if op == "-" else f"{op}({inner})"
        if self.one_of("plain", "plain", "plain", "let") == "let":
            name = f"u{len(self.lets)}"
            self.lets[name] = text
            return name
        return text

    def value(self, leaves: Sequence[tuple[str, str]], width: str, depth: int) -> str:
        """[..., width], made of ports (name, width) and parameters."""
        same = [name for name, size in leaves if size == width]
        kinds = ["matmul"] if depth > 0 or not same else []
        kinds += ["port"] if same else []
        kinds += ["map", "scale", "sum", "dropout"] if depth > 0 else []
        kind = self.one_of(*kinds)
        if kind == "port":
            return self.one_of(*same)
        if kind == "matmul":
            name, size = self.draw(st.sampled_from(sorted(leaves)))
            inner = self.value(leaves, size, depth - 1) if depth > 0 else name
            if self.one_of("full", "narrow") == "full":
                return f"({inner}) @ {self.matrix(size, width, depth - 1)}"
            middle = f"({inner}) @ {self.tensor(size, SPAN)}"
            middle = self.mapped(middle) if self.one_of("linear", "curved") == "curved" else middle
            return f"({middle}) @ {self.tensor(SPAN, width)}"
        if kind == "map":
            return self.mapped(self.value(leaves, width, depth - 1))
        inner, op = self.value(leaves, width, depth - 1), self.one_of(*BINARY)
        if kind == "dropout":
            return f"dropout({inner}, 0.1)"
        if op == "/":  # by what is never near zero
            return f"({inner}) / (1 + sigmoid({self.tensor(width)}))"
        sums = kind == "sum"
        other = f"({self.value(leaves, width, depth - 1)})" if sums else self.vector(width)
        left = self.one_of("left", "right") == "left"
        return f"{other} {op} ({inner})" if left else f"({inner}) {op} {other}"

    def matrix(self, rows: str, columns: str, depth: int) -> str:
        """[rows, columns], made of parameters alone."""
        kind = self.one_of("plain", *(["product", "scaled", "map", "turned"] if depth > 0 else []))
        if kind == "product":
            return f"({self.tensor(rows, SPAN)} @ {self.tensor(SPAN, columns)})"
        if kind == "scaled":
            return f"({self.tensor(rows, columns)} * {self.vector(columns)})"
        if kind == "map":
            return f"tanh({self.matrix(rows, columns, depth - 1)})"
        if kind == "turned":
            return f"transpose({self.matrix(columns, rows, depth - 1)})"
        return self.tensor(rows, columns)

    def weight(self, rows: str, columns: str) -> str:
        """What W [rows, columns] may become."""
        matrix = self.matrix(rows, columns, 2)
        kind = self.one_of("add", "gate", "scale", "norm", "from")
        if kind == "add":
            return f"W + {self.number()} * {matrix}"
        if kind == "gate":
            return f"W * (1 + tanh({matrix}))"
        if kind == "scale":
            return f"W * {self.vector(columns)} + {matrix}"
        if kind == "norm":
            return f"{self.tensor(rows, 1)} * W / norm(W + {matrix})"
        return f"{self.number()} - W + {matrix}"


def assigned(formulas: Formulas, at: str, port: str) -> dict[str, str]:
    """A right-hand side for a port of a site, and for what must change with it."""
    if at == "attention.heads":
        return _of_heads(formulas, port)
    if port == "W":
        rows, columns = {"embedding": ("vocab", "out")}.get(at, ("out", "in"))
        if at == "norm":
            return {"W": f"W * {formulas.vector('out')} + {formulas.tensor('out')}"}
        return {"W": formulas.weight(rows, columns)}
    if port == "b":
        kind = formulas.one_of("b + {}", "3 - b * {}", "b * tanh({})", "-b / {} - b")
        return {"b": kind.format(f"(2 + tanh({formulas.tensor('out')}))")}
    width = {("conv", "x"): "channels", ("conv", "h"): "out"}.get(
        (at, port), "in" if port == "x" else "out"
    )
    value = formulas.value(_leaves(at, port), width, 2)
    if at == "embedding" and formulas.one_of("plain", "table") == "table":
        rows = f"lookup({formulas.tensor('vocab', SPAN)}, ids)"
        value = f"{value} + {rows} @ {formulas.tensor(SPAN, 'out')}"
    style = formulas.one_of("add", "scaled", "replace")
    if style == "replace":
        return {port: value}
    factor = formulas.number() if style == "scaled" else "1"
    return {port: f"{port} + {factor} * ({value})"}


def _leaves(at: str, port: str) -> list[tuple[str, str]]:
    """The ports with features that a formula for `port` may read, with their widths."""
    if at == "conv":
        return [("x", "channels")] if port == "x" else [("h", "out")]
    widths = {"x": "in", "h": "out", "input": "d", "residual": "out"}
    mine = [(name, widths[name]) for name in SITES[at].ports if name in widths]
    if at in (
        "attention.k",
        "attention.v",
    ):  # where attention is crossed, `input` has another length
        mine = [one for one in mine if one[0] != "input"]
    return [one for one in mine if port != "x" or one[0] != "h"]


def _of_heads(formulas: Formulas, port: str) -> dict[str, str]:
    if port == "h":
        keys = formulas.tensor("heads", "head_dim", SPAN)
        values = formulas.tensor("heads", SPAN, "value_dim")
        return {"h": f"h + {formulas.mapped(f'q @ {keys}')} @ {values}"}
    if port == "q":
        return {"q": f"q * {formulas.vector('head_dim')}"}
    width = "value_dim" if port == "v" else "head_dim"
    return {port: f"{port} * {formulas.vector(width)}"}


def prefix(formulas: Formulas) -> dict[str, str]:
    """Rows in front of keys and values, which grow together."""
    widths = {"k": "head_dim", "v": "value_dim"}
    return {
        one: f"prepend({formulas.tensor('kv_heads', SPAN, width)}, {one})"
        for one, width in widths.items()
    }


@cache
def places(family: str) -> dict[str, tuple[str, ...]]:
    """For each kind of site that the family has, the ports that a spec may assign at all of them."""
    model, found = tiny(family), {}
    plan = planner(model)
    for at in dict.fromkeys(site.at for site in survey(model)):
        ports = [port for port in SITES[at].assigns if _takes(plan, at, port)]
        if ports:
            found[at] = tuple(ports)
    return found


def _takes(plan: Callable[[Spec], Plan], at: str, port: str) -> bool:
    try:
        plan(parse_spec(f"deltas: [{{at: {_place(at)}, rewrite: {{{port}: {port} * 2}}}}]"))
    except PeftcError:
        return False
    return True


def _place(at: str) -> str:
    return f'{{op: {at}, scope: "*"}}' if SITES[at].by_op else at


@st.composite
def formulas(draw: Draw, family: str, name: str, kinds: Sequence[str] = ()) -> Part:
    """A spec of one delta at a random site, assigning one or two of its ports."""
    sites = {at: ports for at, ports in places(family).items() if not kinds or at in kinds}
    at = draw(st.sampled_from(sorted(sites)))
    chosen = draw(st.lists(st.sampled_from(sites[at]), min_size=1, max_size=2, unique=True))
    one = Formulas(draw)  # type: ignore[arg-type]
    rewrite: dict[str, str] = {}
    if at == "attention.heads" and draw(st.booleans()):
        rewrite |= prefix(one)
    for port in chosen:
        if port not in rewrite:
            rewrite |= assigned(one, at, port)
    body = [f"at: {_place(at)}"]
    if at not in ("head", "embedding", "linear", "conv") and draw(st.booleans()):
        body.append(f"where: {{layers: {draw(st.sampled_from((0, 1)))}}}")
    if one.params:
        body.append("params:" + "".join(f"\n      {k}: {v}" for k, v in one.params.items()))
    if one.lets:
        body.append("let:" + "".join(f"\n      {k}: {v}" for k, v in one.lets.items()))
    body.append("rewrite:" + "".join(f"\n      {k}: {v}" for k, v in rewrite.items()))
    text = f"name: {name}\ndeltas:\n  - " + "\n    ".join(body) + "\n"
    yaml.safe_load(text)
    return Part(name, text)


@st.composite
def methods(draw: Draw, family: str) -> Part:
    """A shipped method that the family has places for."""
    fitting = [m for m in shipped() if not lacks(m, family)]
    return Part(draw(st.sampled_from(fitting)))  # type: ignore[arg-type]


# Places whose formulas seldom share a value.
APART = (
    ("attention.q",),
    ("attention.k",),
    ("attention.v",),
    ("attention", "attention.o"),
    ("attention.heads",),
    ("ffn.up",),
    ("ffn.gate",),
    ("ffn", "ffn.down", "ffn.hidden"),
    ("norm",),
    ("embedding",),
)


@st.composite
def strangers(draw: Draw, family: str) -> list[Part]:
    """Two or three formulas, each at a place of its own."""
    groups = [group for group in APART if set(group) & places(family).keys()]
    if len(groups) < 2:  # no attention, no feed-forward
        return [draw(formulas(family, "formula_0"))]
    chosen = draw(st.lists(st.sampled_from(groups), min_size=2, max_size=3, unique=True))
    return [draw(formulas(family, f"formula_{i}", kinds)) for i, kinds in enumerate(chosen)]


@st.composite
def anything(draw: Draw, family: str) -> list[Part]:
    """One to three parts, shipped methods and formulas."""
    parts = [
        draw(st.one_of(formulas(family, f"formula_{i}"), methods(family)))
        for i in range(draw(st.integers(1, 3)))
    ]
    prompts = [part for part in parts if part.name == "prompt_tuning"][:1]  # once, and at the end
    return [*[part for part in parts if part.name != "prompt_tuning"], *prompts]


@st.composite
def compositions(draw: Draw, families: Sequence[str]) -> Composition:
    family = draw(st.sampled_from(families))
    parts = draw(st.one_of(anything(family), anything(family), strangers(family)))
    return Composition(family, attention_of(family), tuple(parts))
