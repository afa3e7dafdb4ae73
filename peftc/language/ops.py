"""The op table: name, arity, shape rule, affine rule, lowering. New maths that torch has an op for is one row."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from peftc.errors import suggest
from peftc.language.expr import (
    ARITHMETIC,
    Dim,
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
from peftc.language.ports import site_dims

ShapeRule = Callable[[tuple[Shape, ...], tuple[Expr, ...]], Shape]


class ShapeError(Exception):
    """Shapes that an op cannot take."""


class Plain(tuple[Dim, ...]):
    """The shape of a number, which is known before any tensor is; that of a tensor without axes is ()."""

    __slots__ = ()


NUMBER = Plain()


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
    """Axes meet from the right, as in torch. Those that "..." stands for meet none but themselves."""
    short, long = sorted(args, key=len)
    if short == ():
        return long
    shape = list(long)
    for i in range(1, len(short) + 1):
        one, other = short[-i], long[-i]
        if other == 1:
            shape[-i] = one
        elif one not in (1, other) and ("..." in (one, other) or not agree(one, other)):
            left, right = args[0][-i], args[1][-i]
            raise ShapeError(
                f"{text(args[0])} and {text(args[1])} differ: '{left}' is not '{right}'"
            )
    return tuple(shape)


def _same(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    return args[0]


def _drawn(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    """Of an op that draws anew for each element: a number has none."""
    if isinstance(args[0], Plain):
        raise ShapeError("it takes a tensor, not a number")
    _plain(args[1:])
    return args[0]


def _clamp(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _plain(args[1:])
    return args[0]


def _plain(shapes: tuple[Shape, ...]) -> None:
    for shape in shapes:
        if not isinstance(shape, Plain):
            raise ShapeError(f"{text(shape)} is a tensor, where it takes a number")


def _matmul(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    a, b = args
    if not a or len(b) < 2 or "..." in b[-2:]:
        raise ShapeError(f"{text(a)} @ {text(b)} needs a matrix on the right")
    if not agree(a[-1], b[-2]):
        raise ShapeError(f"{text(a)} @ {text(b)}: '{a[-1]}' is not '{b[-2]}'")
    if len(b) == 2:
        return (*a[:-1], b[-1])
    if a[-2:-1] == ("...",):
        raise ShapeError(f"{text(a)} @ {text(b)}: one matrix on the right, not several")
    return (*broadcast((a[:-2], b[:-2]), ()), *a[-2:-1], b[-1])


def _needs(rank: int, shape: Shape, what: str) -> None:
    """At least `rank` axes of its own: what "..." stands for is the batch's."""
    if len(shape) < rank or "..." in shape[-rank:]:
        raise ShapeError(f"{text(shape)} is not {what}")


def _exactly(rank: int, shape: Shape, what: str) -> None:
    if len(shape) != rank or "..." in shape:
        raise ShapeError(f"{text(shape)} is not {what}")


def _last_two(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    return (*args[0][:-2], args[0][-1], args[0][-2])


def _drop_last(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return args[0][:-1]


def _split_heads(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
    _exactly(2, args[0], "rows [l, heads * head_dim]")
    (length, width), heads = args[0], _count(args[1], exprs[1], "heads")
    if not isinstance(heads, int) or not isinstance(width, int):
        return (heads, length, f"({width}) / {heads}")
    if heads <= 0 or width % heads:
        raise ShapeError(f"{width} features do not split into {heads} heads")
    return (heads, length, width // heads)


def _count(shape: Shape, expr: Expr, what: str) -> Dim:
    """A size that stands as an argument: a name, or a whole number."""
    if isinstance(shape, Plain) and isinstance(expr, Name):
        return expr.id
    if isinstance(expr, Number) and expr.value == int(expr.value):
        return int(expr.value)
    raise ShapeError(f"the number of {what} must be a name or a whole number")


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
    if args[0][:1] in ((), ("...",)):
        raise ShapeError(f"the first axis of {text(args[0])} is not its own")
    return args[0][1:]


def times(a: Dim, b: Dim) -> Dim:
    """The product of two sizes, as text where one is a name."""
    return a * b if isinstance(a, int) and isinstance(b, int) else f"({a}) * ({b})"


def _kron(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    a, b = args
    _needs(2, a, "a matrix")
    _needs(2, b, "a matrix")
    if a[:-2] != b[:-2]:
        raise ShapeError(f"kron of {text(a)} and {text(b)}: the leading axes differ")
    return (*a[:-2], times(a[-2], b[-2]), times(a[-1], b[-1]))


def _blocks(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _exactly(3, args[0], "blocks [n, rows, columns]")
    count, rows, columns = args[0]
    return (times(count, rows), times(count, columns))


def _square(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    if not agree(args[0][-1], args[0][-2]):
        raise ShapeError(f"{text(args[0])} is not square")
    return args[0]


def _lookup(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _exactly(2, args[0], "a table [rows, features]")
    if isinstance(args[1], Plain):
        raise ShapeError("it takes ids, not a number")
    return (*args[1], args[0][-1])


def _factor(rows: bool) -> ShapeRule:
    def rule(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
        _exactly(2, args[0], "a weight [out, in]")
        rank = _count(args[1], exprs[1], "singular values")
        return (args[0][-1], rank) if rows else (rank, args[0][-2])

    return rule


_ROWS = (
    Op("add", 2, broadcast, "sum", "add", "a + b"),
    Op("sub", 2, broadcast, "sum", "sub", "a - b"),
    Op("neg", 1, _same, "sum", "aten.neg.default", "-a"),
    Op("mul", 2, broadcast, "product", "mul", "a * b, elementwise"),
    Op("div", 2, broadcast, "product", "div", "a / b, elementwise"),
    Op("floordiv", 2, broadcast, "opaque", "floordiv", "a // b, elementwise, rounded down"),
    Op("matmul", 2, _matmul, "matmul", "aten.matmul.default", "a @ b"),
    Op("relu", 1, _same, "opaque", "aten.relu.default", "max(x, 0)"),
    Op("gelu", 1, _same, "opaque", "aten.gelu.default", "Gaussian error linear unit"),
    Op(
        "gelu_tanh",
        1,
        _same,
        "opaque",
        "aten.gelu.default",
        "its tanh approximation",
        options={"approximate": "tanh"},
    ),
    Op("silu", 1, _same, "opaque", "aten.silu.default", "x * sigmoid(x)"),
    Op("tanh", 1, _same, "opaque", "aten.tanh.default", "hyperbolic tangent"),
    Op("sigmoid", 1, _same, "opaque", "aten.sigmoid.default", "1 / (1 + exp(-x))"),
    Op("exp", 1, _same, "opaque", "aten.exp.default", "exponential"),
    Op("log", 1, _same, "opaque", "aten.log.default", "natural logarithm"),
    Op("sqrt", 1, _same, "opaque", "aten.sqrt.default", "square root"),
    Op("softmax", 1, _same, "opaque", "aten.softmax.int", "over the last axis", (-1,)),
    Op("sum", 1, _drop_last, "opaque", "aten.sum.dim_IntList", "over the last axis", ([-1],)),
    Op("transpose", 1, _last_two, "opaque", "aten.transpose.int", "of the last two axes", (-2, -1)),
    Op("clamp", 3, _clamp, "opaque", "aten.clamp.default", "clamp(x, low, high)"),
    Op("dropout", 2, _drawn, "identity", "dropout", "dropout(x, p), in training"),
    Op(
        "norm",
        1,
        _keep_last,
        "opaque",
        "aten.linalg_vector_norm.default",
        "L2, of the last axis, which stays",
        (2, [-1], True),
    ),
    Op(
        "sum_first", 1, _drop_first, "opaque", "aten.sum.dim_IntList", "over the first axis", ([0],)
    ),
    Op("detach", 1, _same, "opaque", "aten.detach.default", "without a gradient"),
    Op("kron", 2, _kron, "opaque", "kron", "Kronecker product of matrices"),
    Op("block_diag", 1, _blocks, "opaque", "block_diag", "[n, a, b] to [n*a, n*b]"),
    Op("cayley", 1, _square, "opaque", "cayley", "rotation from a matrix"),
    Op("lookup", 2, _lookup, "lookup", "aten.embedding.default", "lookup(table, ids): rows"),
    Op("logistic_noise", 1, _drawn, "opaque", "logistic_noise", "log u/(1-u), in training"),
    Op("svd_in", 2, _factor(True), "opaque", "svd_in", "svd_in(W, r): V sqrt(S)"),
    Op("svd_out", 2, _factor(False), "opaque", "svd_out", "svd_out(W, r)"),
    Op("split_heads", 2, _split_heads, "opaque", "split_heads", "[l, n*dh] to [n, l, dh]"),
    Op("prepend", 2, _prepend, "opaque", "prepend", "P [n, l, dh] or [l, d] in front"),
)
OPS: Mapping[str, Op] = {row.name: row for row in _ROWS}


def infer(expr: Expr, shapes: Mapping[str, Shape]) -> Shape:
    """The shape of `expr`, from those of its names, by the op table; NUMBER is that of a number.

    Raises ExprError: an unknown name or op, a wrong number of arguments, shapes that do not fit, a number
    that has no value.
    """
    match expr:
        case Number():
            return NUMBER
        case Name():
            if expr.id not in shapes:
                raise ExprError(expr.column, f"unknown name '{expr.id}'", suggest(expr.id, shapes))
            return shapes[expr.id]
    if expr.op not in OPS:
        raise ExprError(expr.column, f"unknown op '{expr.op}'", suggest(expr.op, OPS))
    row = OPS[expr.op]
    if len(expr.args) != row.arity:
        fact = f"'{expr.op}' takes {row.arity} arguments, not {len(expr.args)}"
        raise ExprError(expr.column, fact)
    args = tuple(infer(arg, shapes) for arg in expr.args)
    try:
        shape = row.shape(args, expr.args)
    except ShapeError as error:
        raise ExprError(expr.column, f"'{show(expr)}': {error}") from error
    if shape != () or not all(isinstance(arg, Plain) for arg in args):
        return shape
    if not names(expr) and all(call.op in ARITHMETIC for call in calls(expr)):
        number(expr, {})
    return NUMBER
