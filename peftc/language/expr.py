"""The expression language: parse, names, numbers, shapes. Python's grammar against a whitelist; never eval."""

from __future__ import annotations

import ast
import keyword
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from string import ascii_letters

from peftc.errors import suggest

Dim = int | str
Shape = tuple[Dim, ...]
MAX_LENGTH, MAX_DEPTH, MAX_NUMBER = 2000, 60, 1e12
# More than fit into the longest text.
_PAIRS = tuple(
    pair for a, b in product(ascii_letters + "_", repeat=2) if not keyword.iskeyword(pair := a + b)
)


class ExprError(Exception):
    """What is wrong with an expression, and at which of its columns (from 0)."""

    def __init__(self, column: int, fact: str, fix: str = "") -> None:
        super().__init__(fact)
        self.column, self.fact, self.fix = column, fact, fix


@dataclass(frozen=True)
class Number:
    value: float | int
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Name:
    id: str
    column: int = field(default=0, compare=False)


@dataclass(frozen=True)
class Call:
    """An op on expressions; `a + b` is `add(a, b)`."""

    op: str
    args: tuple[Expr, ...]
    column: int = field(default=0, compare=False)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """See `names`; every site of an entry asks again."""
        return tuple(dict.fromkeys(name for arg in self.args for name in names(arg)))


Expr = Number | Name | Call

BINARY = {"add": "+", "sub": "-", "mul": "*", "div": "/", "floordiv": "//", "matmul": "@"}
_OPERATORS: Mapping[type[ast.operator], str] = {
    ast.Add: "add",
    ast.Sub: "sub",
    ast.Mult: "mul",
    ast.Div: "div",
    ast.FloorDiv: "floordiv",
    ast.MatMult: "matmul",
}
_PRECEDENCE = {"add": 1, "sub": 1, "mul": 2, "div": 2, "floordiv": 2, "matmul": 2, "neg": 3}


def parse(text: str) -> Expr:
    """The expression that `text` writes. Raises ExprError."""
    if len(text) > MAX_LENGTH:
        raise ExprError(0, f"the expression is longer than {MAX_LENGTH} characters")
    # A dim of ours is a keyword of Python's: it goes by a name of the same width that the text does not have.
    stand_in = next(pair for pair in _PAIRS if pair not in text)
    source = re.sub(r"\bin\b", stand_in, text)
    try:
        tree = ast.parse(source.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        column = (getattr(error, "offset", 1) or 1) - 1
        raise ExprError(column, f"'{text.strip()[:60]}' is not an expression") from error
    for node in ast.walk(tree):
        if isinstance(node, ast.Name) and node.id == stand_in:
            node.id = "in"
    return _convert(tree.body, MAX_DEPTH)


def is_name(text: str) -> bool:
    """Whether a formula can read something by this name."""
    return text == "in" or (text.isidentifier() and not keyword.iskeyword(text))


def _convert(node: ast.expr, depth: int) -> Expr:
    column = node.col_offset
    if depth == 0:
        raise ExprError(column, f"the expression is nested deeper than {MAX_DEPTH}")
    match node:
        case ast.Constant(value=bool() as value):
            raise ExprError(column, f"'{value}' is not a number")
        case ast.Constant(value=int() | float() as value) if abs(value) <= MAX_NUMBER:
            return Number(value, column)
        case ast.Name():
            return Name(node.id, column)
        case ast.BinOp() if type(node.op) in _OPERATORS:
            args = (_convert(node.left, depth - 1), _convert(node.right, depth - 1))
            return Call(_OPERATORS[type(node.op)], args, column)
        case ast.UnaryOp(op=ast.USub()):
            return Call("neg", (_convert(node.operand, depth - 1),), column)
        case ast.Call(func=ast.Name(id=op), keywords=[]):
            return Call(op, tuple(_convert(arg, depth - 1) for arg in node.args), column)
        case _:
            fix = "allowed: names, numbers, + - * / // @ and ops such as relu(x)"
            raise ExprError(column, f"'{_snippet(node)}' is not part of the language", fix)


def _snippet(node: ast.expr) -> str:
    try:
        return ast.unparse(node)[:40]
    except (ValueError, RecursionError):
        return type(node).__name__


def names(expr: Expr) -> tuple[str, ...]:
    """The names that `expr` reads, each once, from left to right."""
    match expr:
        case Name():
            return (expr.id,)
        case Call():
            return expr.names
        case _:
            return ()


def leaves(expr: Expr) -> tuple[Name, ...]:
    """Every name in `expr` where it stands, from left to right."""
    match expr:
        case Name():
            return (expr,)
        case Call():
            return tuple(leaf for arg in expr.args for leaf in leaves(arg))
        case _:
            return ()


def calls(expr: Expr) -> tuple[Call, ...]:
    """Every call in `expr`, outermost first."""
    if not isinstance(expr, Call):
        return ()
    return (expr, *(inner for arg in expr.args for inner in calls(arg)))


def substitute(expr: Expr, mapping: Mapping[str, Expr]) -> Expr:
    """`expr` with names replaced."""
    match expr:
        case Name():
            return mapping.get(expr.id, expr)
        case Call():
            return replace(expr, args=tuple(substitute(arg, mapping) for arg in expr.args))
        case _:
            return expr


def show(expr: Expr, context: int = 0) -> str:
    """Source text again, with no more parentheses than needed."""
    match expr:
        case Number():
            return repr(expr.value)
        case Name():
            return expr.id
        case Call(op="neg"):
            return f"-{show(expr.args[0], 3)}"
        case Call() if expr.op in BINARY and len(expr.args) == 2:
            level = _PRECEDENCE[expr.op]
            left, right = show(expr.args[0], level), show(expr.args[1], level + 1)
            text = f"{left} {BINARY[expr.op]} {right}"
            return f"({text})" if level < context else text
        case Call():
            return f"{expr.op}({', '.join(show(arg) for arg in expr.args)})"


ARITHMETIC: Mapping[str, Callable[..., float | int]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "neg": lambda a: -a,
    "sqrt": lambda a: a**0.5,
}


def number(expr: Expr, values: Mapping[str, float | int]) -> float | int:
    """The value of an expression of numbers: sizes and arguments. Raises ExprError."""
    match expr:
        case Number():
            return expr.value
        case Name():
            if expr.id not in values:
                raise ExprError(expr.column, f"unknown name '{expr.id}'", suggest(expr.id, values))
            return values[expr.id]
    if expr.op not in ARITHMETIC:
        raise ExprError(expr.column, f"'{expr.op}' does not work on plain numbers")
    args = [number(arg, values) for arg in expr.args]
    try:
        result = ARITHMETIC[expr.op](*args)
        fits = not isinstance(result, complex) and abs(result) <= MAX_NUMBER
    except (ZeroDivisionError, OverflowError, TypeError):
        fits = False
    if not fits:
        raise ExprError(expr.column, f"'{show(expr)}' has no usable value")
    return result
