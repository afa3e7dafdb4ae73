"""Shape rules: what an op makes of the shapes of its arguments, and what it cannot take."""

from __future__ import annotations

from collections.abc import Callable

from peftc.language.expr import Dim, Expr, Name, Number, Shape
from peftc.language.ports import site_dims

ShapeRule = Callable[[tuple[Shape, ...], tuple[Expr, ...]], Shape]


class ShapeError(Exception):
    """Shapes that an op cannot take."""


class Plain(tuple[Dim, ...]):
    """The shape of a number, which is known before any tensor is; that of a tensor without axes is ()."""

    __slots__ = ()


NUMBER = Plain()


def text(shape: Shape) -> str:
    """A shape as a message shows it: [..., in]."""
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


def same(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    return args[0]


def drawn(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    """Of an op that draws anew for each element: a number has none."""
    if isinstance(args[0], Plain):
        raise ShapeError("it takes a tensor, not a number")
    _plain(args[1:])
    return args[0]


def clamp(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _plain(args[1:])
    return args[0]


def _plain(shapes: tuple[Shape, ...]) -> None:
    for shape in shapes:
        if not isinstance(shape, Plain):
            raise ShapeError(f"{text(shape)} is a tensor, where it takes a number")


def matmul(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
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


def last_two(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    return (*args[0][:-2], args[0][-1], args[0][-2])


def drop_last(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return args[0][:-1]


def split_heads(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
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


def prepend(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    rows, rest = args
    if len(rows) != len(rest) - 1 or len(rows) < 2:
        raise ShapeError(
            f"{text(rows)} before {text(rest)}: a prefix is [heads, l, head_dim], a prompt [l, d]"
        )
    for mine, theirs in zip((*rows[:-2], rows[-1]), (*rest[1:-2], rest[-1]), strict=True):
        if not agree(mine, theirs):
            raise ShapeError(f"{text(rows)} before {text(rest)}: '{mine}' is not '{theirs}'")
    return (*rest[:-2], f"{rows[-2]} + {rest[-2]}", rest[-1])


def keep_last(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(1, args[0], "a vector")
    return (*args[0][:-1], 1)


def drop_first(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    if args[0][:1] in ((), ("...",)):
        raise ShapeError(f"the first axis of {text(args[0])} is not its own")
    return args[0][1:]


def times(a: Dim, b: Dim) -> Dim:
    """The product of two sizes, as text where one is a name."""
    return a * b if isinstance(a, int) and isinstance(b, int) else f"({a}) * ({b})"


def kron(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    a, b = args
    _needs(2, a, "a matrix")
    _needs(2, b, "a matrix")
    if a[:-2] != b[:-2]:
        raise ShapeError(f"kron of {text(a)} and {text(b)}: the leading axes differ")
    return (*a[:-2], times(a[-2], b[-2]), times(a[-1], b[-1]))


def blocks(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _exactly(3, args[0], "blocks [n, rows, columns]")
    count, rows, columns = args[0]
    return (times(count, rows), times(count, columns))


def square(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _needs(2, args[0], "a matrix")
    if not agree(args[0][-1], args[0][-2]):
        raise ShapeError(f"{text(args[0])} is not square")
    return args[0]


def lookup(args: tuple[Shape, ...], _: tuple[Expr, ...]) -> Shape:
    _exactly(2, args[0], "a table [rows, features]")
    if isinstance(args[1], Plain):
        raise ShapeError("it takes ids, not a number")
    return (*args[1], args[0][-1])


def factor(rows: bool) -> ShapeRule:
    def rule(args: tuple[Shape, ...], exprs: tuple[Expr, ...]) -> Shape:
        _exactly(2, args[0], "a weight [out, in]")
        rank = _count(args[1], exprs[1], "singular values")
        return (args[0][-1], rank) if rows else (rank, args[0][-2])

    return rule
