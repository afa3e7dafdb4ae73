"""What an expression means: the same in plain torch, whatever stands where, in value and in gradient."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx
from torch.nn import functional as F

from peftc.language.expr import Expr, ExprError, Name, Number, Shape, calls, names, parse
from peftc.language.ops import OPS, infer
from peftc.language.shapes import NUMBER
from peftc.rewrite.affine import _RULES as RULES
from peftc.rewrite.evaluate import evaluate
from peftc.rewrite.lower import LOWERINGS, Builder, Operand, target

Value = torch.Tensor | float | int


def number(value: Value) -> torch.Tensor:
    return value if isinstance(value, torch.Tensor) else torch.tensor(value, dtype=torch.float64)


def floor_divide(a: Value, b: Value) -> Value:
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return torch.div(number(a), number(b), rounding_mode="floor")
    return a // b


def kron(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.kron of the last two axes."""
    if a.ndim == 2:
        return torch.kron(a, b)
    return torch.stack([kron(one, other) for one, other in zip(a, b, strict=True)])


def cayley(x: torch.Tensor) -> torch.Tensor:
    skew, eye = (x - x.mT) / 2, torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.inv(eye + skew) @ (eye - skew)


def factors(weight: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = s.sqrt()
    return (vh.mT * root)[:, :rank], (u * root).mT[:rank]


def prepend(rows: torch.Tensor, rest: torch.Tensor) -> torch.Tensor:
    return torch.stack([torch.cat([rows, one], -2) for one in rest])


# Each op in torch's own words, without a look at how the compiler lowers it.
TORCH: Mapping[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "neg": operator.neg,
    "mul": operator.mul,
    "div": operator.truediv,
    "floordiv": floor_divide,
    "matmul": torch.matmul,
    "relu": lambda x: number(x).clamp(min=0),
    "gelu": lambda x: F.gelu(number(x)),
    "gelu_tanh": lambda x: F.gelu(number(x), approximate="tanh"),
    "silu": lambda x: number(x) * torch.sigmoid(number(x)),
    "tanh": lambda x: torch.tanh(number(x)),
    "sigmoid": lambda x: torch.sigmoid(number(x)),
    "exp": lambda x: torch.exp(number(x)),
    "log": lambda x: torch.log(number(x)),
    "sqrt": lambda x: torch.sqrt(number(x)),
    "softmax": lambda x: torch.softmax(number(x), -1),
    "sum": lambda x: x.sum(-1),
    "transpose": lambda x: x.mT,
    "clamp": lambda x, low, high: number(x).clamp(low, high),
    "dropout": lambda x, p: x,
    "norm": lambda x: x.square().sum(-1, keepdim=True).sqrt(),
    "sum_first": lambda x: x.sum(0),
    "detach": lambda x: number(x).detach(),
    "kron": kron,
    "block_diag": lambda x: torch.block_diag(*x),
    "cayley": cayley,
    "lookup": lambda table, ids: table[ids],
    "logistic_noise": torch.zeros_like,
    "svd_in": lambda weight, rank: factors(weight, rank)[0],
    "svd_out": lambda weight, rank: factors(weight, rank)[1],
    "split_heads": lambda x, n: torch.stack(x.chunk(n, -1)),
    "prepend": prepend,
}


def meant(expr: Expr, env: Mapping[str, Value]) -> Value:
    """The expression in plain torch."""
    match expr:
        case Number():
            return expr.value
        case Name():
            return env[expr.id]
    found: Value = TORCH[expr.op](*(meant(arg, env) for arg in expr.args))
    return found


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(sum(shape) + 31 * seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


NUMBERS: dict[str, float | int] = {"r": 2, "s": 0.75, "c": -1.5}
TENSORS = {
    "M": random(4, 4),
    "N": random(4, 4, seed=1),
    "W": torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=torch.float64)) + random(4, 4) / 9,
    "v": random(4),
    "w": random(4, seed=1),
    "S": random(2, 2),
    "T": random(2, 2, seed=1),
    "B": random(2, 2, 2),
    "P": random(2, 3, 2),
    "k": random(5, 2, 7, 2),
}
IDS = torch.tensor([[2, 0, 1], [3, 3, 0]])
SHAPES = {**{name: tuple(t.shape) for name, t in TENSORS.items()}, **dict.fromkeys(NUMBERS, NUMBER)}


def check(text: str) -> None:
    """`evaluate` and a graph agree with plain torch, in value and in gradient."""
    expr = parse(text)
    read = [name for name in names(expr) if name in TENSORS]
    leaves = {name: TENSORS[name].clone().requires_grad_() for name in read}
    want = number(meant(expr, {**NUMBERS, **leaves, "ids": IDS}))
    close(evaluate(expr, {**TENSORS, "ids": IDS}, NUMBERS), want)
    graph = fx.Graph()
    read = [*read, *(["ids"] if "ids" in names(expr) else [])]
    nodes: dict[str, Operand] = {name: graph.placeholder(name) for name in read}
    result = Builder(graph).lower(expr, {**NUMBERS, **nodes}, "value")
    if not isinstance(result, fx.Node):
        return close(torch.tensor(result, dtype=torch.float64), want)
    graph.output(result)
    graph.lint()
    mine = {name: TENSORS[name].clone().requires_grad_() for name in read if name != "ids"}
    got = fx.GraphModule({}, graph)(*(IDS if name == "ids" else mine[name] for name in read))
    close(got, want)
    if want.requires_grad:
        weights = random(*want.shape, seed=3)
        (got * weights).sum().backward()
        (want * weights).sum().backward()
        for name, leaf in leaves.items():
            both = [
                torch.zeros_like(one) if one.grad is None else one.grad
                for one in (mine[name], leaf)
            ]
            close(*both)
    assert got.requires_grad == want.requires_grad


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-9, equal_nan=True)


# At least one expression for every op, numbers on either side of those that take two.
SAMPLES = {
    "add": [
        "M + v",
        "3 + v",
        "v + 3",
        "r + M @ N",
        "r + 2 * (M @ N @ W)",
        "v + (2 + r)",
        "0.5 + 1",
    ],
    "sub": ["M - v", "3 - v", "v - 3", "1 - sigmoid(M)", "r - (s - v)", "c - c * v", "0.5 - r"],
    "neg": ["-M", "--M", "-(-r)", "-(v - M)", "-c * v", "-r"],
    "mul": ["M * v", "3 * v", "v * 3", "r * s * v", "c * (M @ N)", "2 * 3"],
    "div": ["M / v", "3 / v", "v / 3", "1 / (1 + exp(-v))", "r / (s / v)", "2 / 3", "r / 2"],
    "floordiv": ["M // 2", "7 // v", "r // v", "M // v", "v * (7 // r)", "7 // 2", "v // s"],
    "matmul": ["M @ N", "v @ M", "v @ M @ N", "B @ B", "M @ (2 * N)", "B @ S"],
    "clamp": ["clamp(M, -1, 0.5)", "clamp(M, c, r / 4)", "clamp(r, 0, 1)"],
    "dropout": ["dropout(M, 0.5)", "dropout(v, s / 2)"],
    "detach": ["detach(M) * M", "detach(r) * M"],
    "sum": ["sum(M)", "sum(v)", "sum(sum(M))", "2 - sum(v)"],
    "sum_first": ["sum_first(B)", "sum_first(v)"],
    "norm": ["norm(M)", "M / norm(M)", "1 / norm(v)"],
    "transpose": ["transpose(M)", "transpose(B)"],
    "kron": ["kron(S, T)", "kron(B, B)", "kron(2 * S, T)"],
    "block_diag": ["block_diag(B)"],
    "cayley": ["cayley(M)", "cayley(B)"],
    "lookup": ["lookup(M, ids)", "lookup(3 - M, ids) @ N"],
    "logistic_noise": ["logistic_noise(M) + M"],
    "svd_in": ["svd_in(W, r)", "svd_in(W, 1) @ svd_out(W, 1)"],
    "svd_out": ["svd_out(W, r)"],
    "split_heads": ["split_heads(M, 2)", "split_heads(M, r)"],
    "prepend": ["prepend(P, k)", "prepend(2 - P, 1 / k)"],
} | {
    op: [f"{op}(M)", f"{op}(1 + v)", f"2 - {op}(r)", f"{op}(s) * v"]
    for op in (
        "relu",
        "gelu",
        "gelu_tanh",
        "silu",
        "tanh",
        "sigmoid",
        "exp",
        "log",
        "sqrt",
        "softmax",
    )
}


@pytest.mark.parametrize("op", OPS)
def test_every_op_is_torchs(op: str) -> None:
    for text in SAMPLES[op]:
        assert any(call.op == op for call in calls(parse(text)))
        check(text)


UNARY = (
    """
{} | -{} | -(-({})) | relu({}) | gelu({}) | gelu_tanh({}) | silu({}) | tanh({}) | sigmoid({}) | exp(tanh({}))
log({0} * {0} + 1) | sqrt(1 + {0} * {0}) | softmax({}) | clamp({}, -1, 0.5) | clamp({}, c, r) | detach({})
1 - sigmoid({}) | r - {} | {} - s | 1 / (1 + exp(-tanh({}))) | 2 / ({0} * {0} + r) | {} / c | 0.5 * {} | 3 + {}
""".strip()
    .replace("\n", " | ")
    .split(" | ")
)
OF_TENSORS = ["dropout({}, 0.5)", "logistic_noise({})", "norm({})"]
BINARY = ["{} + {}", "{} - {}", "{} * {}", "{} / (1.5 + tanh({}))", "{} + c * {}", "{} - s * {}"]
PLAIN = st.sampled_from(
    ["0", "1", "2", "0.5", "1.25e-1", "7", "r", "s", "c", "(7 // r)", "sqrt(r)"]
)


def one_of(forms: list[str], *parts: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.builds(
        lambda form, args: form.format(*args), st.sampled_from(forms), st.tuples(*parts)
    )


def wrapped(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return inner.map(lambda text: f"({text})")


def grown_numbers(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    inner = wrapped(inner)
    return one_of(UNARY, inner) | one_of(BINARY, inner, inner)


FIGURES = st.recursive(PLAIN, grown_numbers, max_leaves=4)
VECTOR_LEAVES = st.sampled_from(
    ["v", "w", "(v // 2)", "(7 // w)", "sum(M)", "sum_first(N)", "v @ M"]
)
MATRIX_LEAVES = st.sampled_from(
    [
        "M",
        "N",
        "(M // s)",
        "kron(S, T)",
        "block_diag(B)",
        "kron(2 - S, T)",
        "svd_in(W, r) @ svd_out(W, r)",
        "transpose(M)",
        "cayley(N)",
    ]
)


def grown(mine: st.SearchStrategy[str], other: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger expressions of the same shape: every way in which numbers and other tensors may join."""
    mine, other, figure = wrapped(mine), wrapped(other), wrapped(FIGURES)
    return (
        one_of(UNARY + OF_TENSORS[:2], mine)
        | one_of(BINARY, mine, mine)
        | one_of(BINARY, figure, mine)
        | one_of(BINARY, mine, figure)
        | one_of([*BINARY, "{} @ {}"], mine, other)
        | one_of(["{} / (1 + norm({}))"], mine, mine)
    )


VECTORS = st.recursive(VECTOR_LEAVES, lambda one: grown(one, MATRIX_LEAVES), max_leaves=5)
MATRICES = st.recursive(
    MATRIX_LEAVES | VECTOR_LEAVES.map(lambda text: f"({text}) * M"),
    lambda one: grown(one, MATRIX_LEAVES) | one_of(["transpose({})", "cayley(tanh({}))"], one),
    max_leaves=6,
)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.one_of(MATRICES, VECTORS, FIGURES))
def test_any_expression_is_the_same_in_torch(text: str) -> None:
    assert infer(parse(text), SHAPES) is not None
    check(text)


def test_every_row_has_its_lowering() -> None:
    """Plain rows name an op of torch; the others a lowering, and no lowering is without a row."""
    named = {row.lowering for row in OPS.values() if not row.lowering.startswith("aten.")}
    assert named == set(LOWERINGS)
    assert all(callable(target(row.lowering)) for row in OPS.values() if row.lowering not in named)
    assert all(row.doc and row.affine in (*RULES, "opaque") for row in OPS.values())


PORTS: dict[str, Shape] = {
    "x": ("...", "in"),
    "h": ("...", "out"),
    "W": ("out", "in"),
    "P": ("n", "in", "r"),
    "p": (),
    "r": NUMBER,
}
NO_MEANING = {
    "sum(sum(x))": "'sum(sum(x))': [...] is not a vector",
    "sum_first(x)": "'sum_first(x)': the first axis of [..., in] is not its own",
    "transpose(x)": "'transpose(x)': [..., in] is not a matrix",
    "cayley(x)": "'cayley(x)': [..., in] is not a matrix",
    "W @ x": "'W @ x': [out, in] @ [..., in] needs a matrix on the right",
    "x @ P": "'x @ P': [..., in] @ [n, in, r]: one matrix on the right, not several",
    "h + W": "'h + W': [..., out] and [out, in] differ: '...' is not 'out'",
    "split_heads(x, r)": "'split_heads(x, r)': [..., in] is not rows [l, heads * head_dim]",
    "split_heads(W, p)": "'split_heads(W, p)': the number of heads must be a name or a whole number",
    "split_heads(W, 2.5)": "'split_heads(W, 2.5)': the number of heads must be a name or a whole number",
    "dropout(x, p)": "'dropout(x, p)': [] is a tensor, where it takes a number",
    "dropout(r, 0.1)": "'dropout(r, 0.1)': it takes a tensor, not a number",
    "logistic_noise(r)": "'logistic_noise(r)': it takes a tensor, not a number",
    "clamp(x, p, 1)": "'clamp(x, p, 1)': [] is a tensor, where it takes a number",
    "lookup(W, 3)": "'lookup(W, 3)': it takes ids, not a number",
    "x * (3 / 0)": "'3 / 0' has no usable value",
}


@pytest.mark.parametrize("text", NO_MEANING)
def test_what_has_no_meaning_is_refused(text: str) -> None:
    """What could only be computed as something else than it says, or not at all."""
    with pytest.raises(ExprError) as error:
        infer(parse(text), PORTS)
    assert error.value.fact == NO_MEANING[text]


def test_several_matrices() -> None:
    shapes: dict[str, Shape] = {
        "q": ("...", "heads", "queries", "head_dim"),
        "P": ("heads", "head_dim", "l"),
    }
    assert infer(parse("q @ P"), shapes) == ("...", "heads", "queries", "l")
    assert infer(parse("S @ P"), {"S": (2, 3), "P": ("heads", 3, "l")}) == ("heads", 2, "l")


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("dropout(M, s / 3)", lambda m: F.dropout(m, 0.25)),
        ("2 - logistic_noise(M)", lambda m: 2 - torch.logit(torch.rand_like(m), 1e-4)),
    ],
)
def test_what_is_drawn_in_training(text: str, want: Callable[[torch.Tensor], torch.Tensor]) -> None:
    graph = fx.Graph()
    env = {**NUMBERS, "M": graph.placeholder("M")}
    graph.output(Builder(graph, training=True).lower(parse(text), env, "value"))
    torch.manual_seed(3)
    got = fx.GraphModule({}, graph)(TENSORS["M"])
    torch.manual_seed(3)
    close(got, want(TENSORS["M"]))
    assert got.unique().numel() > 2
