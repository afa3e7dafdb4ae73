"""The op table: name, aten target, shape rule, affine rule. New maths is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from peftc.errors import suggest
from peftc.language.expr import Dim, Expr, ExprError, Name, Number, Shape, show
from peftc.language.ports import site_dims

ShapeRule = Callable[[tuple[Shape, ...], tuple[Expr, ...]], Shape]


class ShapeError(Exception):
    """Shapes that an op cannot take."""


@dataclass(frozen=True)
class Op:
    """`affine` says how the op acts on affine maps of x: sum, product, matmul, lookup, identity or opaque."""

    name: str
    target: str
    arity: int
    shape: ShapeRule
    affine: str
    doc: str


def text(shape: Shape) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def agree(a: Dim, b: Dim) -> bool:
    """Whether two dims may be the same size; sizes of a site, and sums of them, are compared by the plan."""
    if a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    return (_open(a) and _open(b)) or _computed(a) or _computed(b)


def _open(dim: Dim) -> bool:
    return isinstance(dim, int) or dim in site_dims()


def _computed(dim: Dim) -> bool:
    """`in / n`, `l + keys`: only numbers tell."""
    return isinstance(dim, str) and not dim.isidentifier()


def broadcast(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    short, long = sorted(args, key=len)
    if short == ():
        return long
    shape = list(long)
    for i in range(1, len(short) + 1):
        one, other = short[-i], long[-i]
        if "..." in (one, other) or other == 1:
            shape[-i] = one if other == 1 else other
        elif one != 1 and not agree(one, other):
            left, right = args[0][-i], args[1][-i]
            raise ShapeError(
                f"{text(args[0])} and {text(args[1])} differ: '{left}' is not '{right}'"
            )
    return tuple(shape)


def _same(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    return args[0]


def _matmul(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    a, b = args
    if not a or len(b) < 2:
        raise ShapeError(f"{text(a)} @ {text(b)} needs a matrix on the right")
    if not agree(a[-1], b[-2]):
        raise ShapeError(f"{text(a)} @ {text(b)}: '{a[-1]}' is not '{b[-2]}'")
    return (*a[:-1], b[-1])


def _needs(rank: int, shape: Shape, what: str) -> None:
    if len(shape) < rank:
        raise ShapeError(f"{text(shape)} is not {what}")


def _last_two(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    return (*args[0][:-2], args[0][-1], args[0][-2])


def _drop_last(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return args[0][:-1]


def _split_heads(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
    rows, count = args[0], exprs[1]
    _needs(2, rows, "rows [l, heads * head_dim]")
    length, width = rows[-2:]
    if isinstance(count, Number) and isinstance(width, int):
        if count.value <= 0 or width % count.value:
            raise ShapeError(f"{width} features do not split into {count.value} heads")
        return (int(count.value), length, width // int(count.value))
    if not isinstance(count, Name | Number):
        raise ShapeError("the number of heads must be a name or a number")
    heads = count.id if isinstance(count, Name) else int(count.value)
    return (heads, length, "head_dim")


def _prepend(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    rows, rest = args
    if len(rows) != len(rest) - 1 or len(rows) < 2:
        raise ShapeError(
            f"{text(rows)} before {text(rest)}: a prefix is [heads, l, head_dim], a prompt [l, d]"
        )
    for mine, theirs in zip((*rows[:-2], rows[-1]), (*rest[1:-2], rest[-1]), strict=True):
        if not agree(mine, theirs):
            raise ShapeError(f"{text(rows)} before {text(rest)}: '{mine}' is not '{theirs}'")
    return (*rest[:-2], f"{rows[-2]} + {rest[-2]}", rest[-1])


def _keep_last(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return (*args[0][:-1], 1)


def _drop_first(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return args[0][1:]


def times(a: Dim, b: Dim) -> Dim:
    return a * b if isinstance(a, int) and isinstance(b, int) else f"({a}) * ({b})"


def _kron(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    a, b = args
    _needs(2, a, "a matrix")
    _needs(2, b, "a matrix")
    if a[:-2] != b[:-2]:
        raise ShapeError(f"kron of {text(a)} and {text(b)}: the leading axes differ")
    return (*a[:-2], times(a[-2], b[-2]), times(a[-1], b[-1]))


def _blocks(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    if len(args[0]) != 3:
        raise ShapeError(f"{text(args[0])} is not blocks [n, rows, columns]")
    count, rows, columns = args[0]
    return (times(count, rows), times(count, columns))


def _square(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    if not agree(args[0][-1], args[0][-2]):
        raise ShapeError(f"{text(args[0])} is not square")
    return args[0]


def _lookup(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a table [rows, features]")
    return (*args[1], args[0][-1])


def _factor(rows: bool) -> ShapeRule:
    def rule(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
        _needs(2, args[0], "a weight [out, in]")
        rank = exprs[1]
        if not isinstance(rank, Name | Number):
            raise ShapeError("the rank must be a name or a number")
        size: Dim = rank.id if isinstance(rank, Name) else int(rank.value)
        return (args[0][-1], size) if rows else (size, args[0][-2])

    return rule


_ROWS = (
    Op("add", "aten.add.Tensor", 2, broadcast, "sum", "a + b"),
    Op("sub", "aten.sub.Tensor", 2, broadcast, "sum", "a - b"),
    Op("neg", "aten.neg.default", 1, _same, "sum", "-a"),
    Op("mul", "aten.mul.Tensor", 2, broadcast, "product", "a * b, elementwise"),
    Op("div", "aten.div.Tensor", 2, broadcast, "product", "a / b, elementwise"),
    Op("matmul", "aten.matmul.default", 2, _matmul, "matmul", "a @ b"),
    Op("relu", "aten.relu.default", 1, _same, "opaque", "max(x, 0)"),
    Op("gelu", "aten.gelu.default", 1, _same, "opaque", "Gaussian error linear unit"),
    Op("gelu_tanh", "aten.gelu.default", 1, _same, "opaque", "its tanh approximation"),
    Op("silu", "aten.silu.default", 1, _same, "opaque", "x * sigmoid(x)"),
    Op("tanh", "aten.tanh.default", 1, _same, "opaque", "hyperbolic tangent"),
    Op("sigmoid", "aten.sigmoid.default", 1, _same, "opaque", "1 / (1 + exp(-x))"),
    Op("exp", "aten.exp.default", 1, _same, "opaque", "exponential"),
    Op("log", "aten.log.default", 1, _same, "opaque", "natural logarithm"),
    Op("sqrt", "aten.sqrt.default", 1, _same, "opaque", "square root"),
    Op("softmax", "aten.softmax.int", 1, _same, "opaque", "over the last axis"),
    Op("sum", "aten.sum.dim_IntList", 1, _drop_last, "opaque", "over the last axis"),
    Op("transpose", "aten.transpose.int", 1, _last_two, "opaque", "of the last two axes"),
    Op("clamp", "aten.clamp.default", 3, _same, "opaque", "clamp(x, low, high)"),
    Op("dropout", "aten.dropout.default", 2, _same, "identity", "dropout(x, p), in training"),
    Op("norm", "aten.linalg_vector_norm.default", 1, _keep_last, "opaque", "L2, of the last axis"),
    Op("sum_first", "aten.sum.dim_IntList", 1, _drop_first, "opaque", "over the first axis"),
    Op("detach", "aten.detach.default", 1, _same, "opaque", "without a gradient"),
    Op("kron", "aten.mul.Tensor", 2, _kron, "opaque", "Kronecker product of matrices"),
    Op("block_diag", "aten.diag_embed.default", 1, _blocks, "opaque", "[n, a, b] to [n*a, n*b]"),
    Op("cayley", "aten.linalg_solve.default", 1, _square, "opaque", "rotation from a matrix"),
    Op("lookup", "aten.embedding.default", 2, _lookup, "lookup", "lookup(table, ids): rows"),
    Op("logistic_noise", "aten.rand_like.default", 1, _same, "opaque", "log u/(1-u), in training"),
    Op("svd_in", "aten.linalg_svd.default", 2, _factor(True), "opaque", "svd_in(W, r): V sqrt(S)"),
    Op("svd_out", "aten.linalg_svd.default", 2, _factor(False), "opaque", "svd_out(W, r)"),
    Op("split_heads", "aten.unflatten.int", 2, _split_heads, "opaque", "[l, n*dh] to [n, l, dh]"),
    Op("prepend", "aten.cat.default", 2, _prepend, "opaque", "P [n, l, dh] or [l, d] in front"),
)
OPS: Mapping[str, Op] = {row.name: row for row in _ROWS}


def infer(expr: Expr, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of `expr` by the op table's shape rules. Raises ExprError where shapes do not fit."""
    match expr:
        case Number():
            return ()
        case Name():
            if expr.id not in shapes:
                raise ExprError(expr.column, f"unknown name '{expr.id}'", suggest(expr.id, shapes))
            return shapes[expr.id]
    if expr.op not in OPS:
        raise ExprError(expr.column, f"unknown op '{expr.op}'", suggest(expr.op, OPS))
    if len(expr.args) != OPS[expr.op].arity:
        wanted = OPS[expr.op].arity
        raise ExprError(expr.column, f"'{expr.op}' takes {wanted} arguments, not {len(expr.args)}")
    args = tuple(infer(arg, shapes) for arg in expr.args)
    try:
        return OPS[expr.op].shape(args, expr.args)
    except ShapeError as error:
        raise ExprError(expr.column, f"'{show(expr)}': {error}") from error
