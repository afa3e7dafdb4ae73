"""The op table: name, arity, shape rule, affine rule, lowering. New maths that torch has an op for is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftc.errors import number_of, suggest
from peftc.language import shapes
from peftc.language.expr import (
    ARITHMETIC,
    Expr,
    ExprError,
    Name,
    Number,
    Shape,
    calls,
    names,
    number,
    show,
)
from peftc.language.shapes import NUMBER, ShapeRule


@dataclass(frozen=True)
class Op:
    """What a formula may call.

    `shape` gives the result's shape from those of the arguments, and may read the arguments themselves;
    it raises ShapeError. `affine` says how the op acts on affine maps of x: sum, product, matmul, lookup,
    identity or opaque. `lowering` is torch's own op where it starts with "aten.", which then takes `args`
    and `options` behind the expression's arguments; else it names one in `peftc/rewrite/lower.py`. `sample` is a use
    of it over the names of `docs/language.md`, where it is not `name(x)`.
    """

    name: str
    arity: int
    shape: ShapeRule
    affine: str
    lowering: str
    doc: str
    args: tuple[object, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)
    sample: str = ""


_ROWS = (
    Op("add", 2, shapes.broadcast, "sum", "add", "a + b", sample="h + scale"),
    Op("sub", 2, shapes.broadcast, "sum", "sub", "a - b", sample="h - scale"),
    Op("neg", 1, shapes.same, "sum", "aten.neg.default", "-a", sample="-h"),
    Op("mul", 2, shapes.broadcast, "product", "mul", "a * b, elementwise", sample="h * scale"),
    Op("div", 2, shapes.broadcast, "product", "div", "a / b, elementwise", sample="h / 4"),
    Op(
        "floordiv",
        2,
        shapes.broadcast,
        "opaque",
        "floordiv",
        "a // b, elementwise, rounded down",
        sample="h // 2",
    ),
    Op("matmul", 2, shapes.matmul, "matmul", "aten.matmul.default", "a @ b", sample="x @ down"),
    Op("relu", 1, shapes.same, "opaque", "aten.relu.default", "max(x, 0)"),
    Op(
        "gelu",
        1,
        shapes.same,
        "opaque",
        "aten.gelu.default",
        "Gaussian error linear unit, x * Φ(x)",
    ),
    Op(
        "gelu_tanh",
        1,
        shapes.same,
        "opaque",
        "aten.gelu.default",
        "its tanh approximation, x/2 * (1 + tanh(sqrt(2/π) * (x + 0.044715 x^3)))",
        options={"approximate": "tanh"},
    ),
    Op("silu", 1, shapes.same, "opaque", "aten.silu.default", "x * sigmoid(x)"),
    Op("tanh", 1, shapes.same, "opaque", "aten.tanh.default", "hyperbolic tangent"),
    Op("sigmoid", 1, shapes.same, "opaque", "aten.sigmoid.default", "1 / (1 + exp(-x))"),
    Op("exp", 1, shapes.same, "opaque", "aten.exp.default", "exponential, e^x"),
    Op(
        "log", 1, shapes.same, "opaque", "aten.log.default", "natural logarithm", sample="log(size)"
    ),
    Op("sqrt", 1, shapes.same, "opaque", "aten.sqrt.default", "square root", sample="sqrt(size)"),
    Op(
        "softmax",
        1,
        shapes.same,
        "opaque",
        "aten.softmax.int",
        "exp(x) / sum(exp(x)), over the last axis",
        (-1,),
    ),
    Op(
        "sum",
        1,
        shapes.drop_last,
        "opaque",
        "aten.sum.dim_IntList",
        "over the last axis",
        ([-1],),
        sample="sum(W)",
    ),
    Op(
        "transpose",
        1,
        shapes.last_two,
        "opaque",
        "aten.transpose.int",
        "of the last two axes",
        (-2, -1),
        sample="transpose(W)",
    ),
    Op(
        "clamp",
        3,
        shapes.clamp,
        "opaque",
        "aten.clamp.default",
        "clamp(x, low, high): min(max(x, low), high)",
        sample="clamp(x, 0, 1)",
    ),
    Op(
        "dropout",
        2,
        shapes.drawn,
        "identity",
        "dropout",
        "dropout(x, p): in training 0 with probability p, else x / (1 - p)",
        sample="dropout(x, 0.1)",
    ),
    Op(
        "norm",
        1,
        shapes.keep_last,
        "opaque",
        "aten.linalg_vector_norm.default",
        "L2, of the last axis, which stays: sqrt(sum(x * x))",
        (2, [-1], True),
        sample="norm(W)",
    ),
    Op(
        "sum_first",
        1,
        shapes.drop_first,
        "opaque",
        "aten.sum.dim_IntList",
        "over the first axis",
        ([0],),
        sample="sum_first(blocks)",
    ),
    Op("detach", 1, shapes.same, "opaque", "aten.detach.default", "x, without a gradient"),
    Op(
        "kron",
        2,
        shapes.kron,
        "opaque",
        "kron",
        "Kronecker product of matrices: blocks a[i, j] * b",
        sample="kron(down, up)",
    ),
    Op(
        "block_diag",
        1,
        shapes.blocks,
        "opaque",
        "block_diag",
        "[n, a, b] to [n*a, n*b]: the blocks on the diagonal, else 0",
        sample="block_diag(blocks)",
    ),
    Op(
        "cayley",
        1,
        shapes.square,
        "opaque",
        "cayley",
        "rotation from a matrix: (I + Q)^-1 (I - Q) of Q = (x - transpose(x)) / 2",
        sample="cayley(turn)",
    ),
    Op(
        "lookup",
        2,
        shapes.lookup,
        "lookup",
        "aten.embedding.default",
        "lookup(table, ids): the rows of the table that ids name",
        sample="lookup(table, ids)",
    ),
    Op(
        "logistic_noise",
        1,
        shapes.drawn,
        "opaque",
        "logistic_noise",
        "log u - log(1 - u) of u ~ U(0, 1), as large as x; in evaluation 0, its median",
    ),
    Op(
        "svd_in",
        2,
        shapes.factor(True),
        "opaque",
        "svd_in",
        "svd_in(W, r): V sqrt(S) of W = U S V^T, of the r largest singular values",
        sample="svd_in(W, r)",
    ),
    Op(
        "svd_out",
        2,
        shapes.factor(False),
        "opaque",
        "svd_out",
        "svd_out(W, r): sqrt(S) U^T of the same; svd_in(W, r) @ svd_out(W, r) is the best of rank r",
        sample="svd_out(W, r)",
    ),
    Op(
        "split_heads",
        2,
        shapes.split_heads,
        "opaque",
        "split_heads",
        "split_heads(x, n): [l, n*dh] to [n, l, dh]",
        sample="split_heads(rows, heads)",
    ),
    Op(
        "prepend",
        2,
        shapes.prepend,
        "opaque",
        "prepend",
        "P [n, l, dh] or [l, d] in front",
        sample="prepend(P, k)",
    ),
)
OPS: Mapping[str, Op] = {row.name: row for row in _ROWS}


def infer(expr: Expr, known: Mapping[str, Shape]) -> Shape:
    """The shape of `expr`, from those of its names, by the op table; NUMBER is that of a number.

    Raises ExprError: an unknown name or op, a wrong number of arguments, shapes that do not fit, a number
    that has no value.
    """
    match expr:
        case Number():
            return NUMBER
        case Name():
            if expr.id not in known:
                raise ExprError(expr.column, f"unknown name '{expr.id}'", suggest(expr.id, known))
            return known[expr.id]
    if expr.op not in OPS:
        raise ExprError(expr.column, f"unknown op '{expr.op}'", suggest(expr.op, OPS))
    row = OPS[expr.op]
    if len(expr.args) != row.arity:
        takes = number_of(row.arity, "argument")
        raise ExprError(expr.column, f"'{expr.op}' takes {takes}, not {len(expr.args)}")
    args = tuple(infer(arg, known) for arg in expr.args)
    try:
        shape = row.shape(args, expr.args)
    except shapes.ShapeError as error:
        raise ExprError(expr.column, f"'{show(expr)}': {error}") from error
    if shape != () or not all(isinstance(arg, shapes.Plain) for arg in args):
        return shape
    if not names(expr) and all(call.op in ARITHMETIC for call in calls(expr)):
        number(expr, {})
    return NUMBER
