"""The op table: name, arity, shape rule, affine rule, lowering. New maths that torch has an op for is one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from peftc.errors import suggest
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
    and `options` behind the expression's arguments; else it names one in `peftc/rewrite/lower.py`.
    """

    name: str
    arity: int
    shape: ShapeRule
    affine: str
    lowering: str
    doc: str
    args: tuple[object, ...] = ()
    options: Mapping[str, object] = field(default_factory=dict)


_ROWS = (
    Op("add", 2, shapes.broadcast, "sum", "add", "a + b"),
    Op("sub", 2, shapes.broadcast, "sum", "sub", "a - b"),
    Op("neg", 1, shapes.same, "sum", "aten.neg.default", "-a"),
    Op("mul", 2, shapes.broadcast, "product", "mul", "a * b, elementwise"),
    Op("div", 2, shapes.broadcast, "product", "div", "a / b, elementwise"),
    Op("floordiv", 2, shapes.broadcast, "opaque", "floordiv", "a // b, elementwise, rounded down"),
    Op("matmul", 2, shapes.matmul, "matmul", "aten.matmul.default", "a @ b"),
    Op("relu", 1, shapes.same, "opaque", "aten.relu.default", "max(x, 0)"),
    Op("gelu", 1, shapes.same, "opaque", "aten.gelu.default", "Gaussian error linear unit"),
    Op(
        "gelu_tanh",
        1,
        shapes.same,
        "opaque",
        "aten.gelu.default",
        "its tanh approximation",
        options={"approximate": "tanh"},
    ),
    Op("silu", 1, shapes.same, "opaque", "aten.silu.default", "x * sigmoid(x)"),
    Op("tanh", 1, shapes.same, "opaque", "aten.tanh.default", "hyperbolic tangent"),
    Op("sigmoid", 1, shapes.same, "opaque", "aten.sigmoid.default", "1 / (1 + exp(-x))"),
    Op("exp", 1, shapes.same, "opaque", "aten.exp.default", "exponential"),
    Op("log", 1, shapes.same, "opaque", "aten.log.default", "natural logarithm"),
    Op("sqrt", 1, shapes.same, "opaque", "aten.sqrt.default", "square root"),
    Op("softmax", 1, shapes.same, "opaque", "aten.softmax.int", "over the last axis", (-1,)),
    Op("sum", 1, shapes.drop_last, "opaque", "aten.sum.dim_IntList", "over the last axis", ([-1],)),
    Op(
        "transpose",
        1,
        shapes.last_two,
        "opaque",
        "aten.transpose.int",
        "of the last two axes",
        (-2, -1),
    ),
    Op("clamp", 3, shapes.clamp, "opaque", "aten.clamp.default", "clamp(x, low, high)"),
    Op("dropout", 2, shapes.drawn, "identity", "dropout", "dropout(x, p), in training"),
    Op(
        "norm",
        1,
        shapes.keep_last,
        "opaque",
        "aten.linalg_vector_norm.default",
        "L2, of the last axis, which stays",
        (2, [-1], True),
    ),
    Op(
        "sum_first",
        1,
        shapes.drop_first,
        "opaque",
        "aten.sum.dim_IntList",
        "over the first axis",
        ([0],),
    ),
    Op("detach", 1, shapes.same, "opaque", "aten.detach.default", "without a gradient"),
    Op("kron", 2, shapes.kron, "opaque", "kron", "Kronecker product of matrices"),
    Op("block_diag", 1, shapes.blocks, "opaque", "block_diag", "[n, a, b] to [n*a, n*b]"),
    Op("cayley", 1, shapes.square, "opaque", "cayley", "rotation from a matrix"),
    Op("lookup", 2, shapes.lookup, "lookup", "aten.embedding.default", "lookup(table, ids): rows"),
    Op("logistic_noise", 1, shapes.drawn, "opaque", "logistic_noise", "log u/(1-u), in training"),
    Op("svd_in", 2, shapes.factor(True), "opaque", "svd_in", "svd_in(W, r): V sqrt(S)"),
    Op("svd_out", 2, shapes.factor(False), "opaque", "svd_out", "svd_out(W, r)"),
    Op("split_heads", 2, shapes.split_heads, "opaque", "split_heads", "[l, n*dh] to [n, l, dh]"),
    Op("prepend", 2, shapes.prepend, "opaque", "prepend", "P [n, l, dh] or [l, d] in front"),
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
        fact = f"'{expr.op}' takes {row.arity} arguments, not {len(expr.args)}"
        raise ExprError(expr.column, fact)
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
