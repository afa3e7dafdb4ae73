"""Lowering: an expression of the spec language becomes fx nodes, or what they compute."""

from __future__ import annotations

import functools
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from peftc.graph.program import aten
from peftc.language.expr import ARITHMETIC, Call, Expr, Name, Number, names, number
from peftc.language.ops import OPS

Operand = fx.Node | torch.Tensor | float | int
Env = Mapping[str, Operand]


@functools.cache
def target(path: str) -> Any:
    """The torch function that a row of the op table names, such as `aten.relu.default`."""
    found: Any = torch.ops
    for part in path.split("."):
        found = getattr(found, part)
    return found


Known = dict[str, Any]


def value_of(graph: fx.Graph, fn: Any, args: Any, kwargs: Any, known: Known | None = None) -> Any:
    """What a node gives: the sizes and type of its result, computed on those of its operands; None in a graph
    that was not traced. What is `known` of equal operands is not computed again: layers are alike."""
    nodes = [one for one in pytree.tree_leaves((args, kwargs)) if isinstance(one, fx.Node)]
    first: Any = next(iter(graph.nodes)).meta.get("val")
    if not isinstance(first, FakeTensor) or any(one.meta.get("val") is None for one in nodes):
        return None
    known = {} if known is None else known
    said = fx.map_arg((args, kwargs), lambda one: _said(one.meta["val"]))
    key = f"{fn} {said}"
    if key not in known:
        real_args, real_kwargs = fx.map_arg((args, kwargs), lambda one: one.meta["val"])
        # Without Python's decompositions some ops ask for numbers, and sizes become those of the example.
        with first.fake_mode, enable_python_dispatcher():
            known[key] = fn(*real_args, **real_kwargs)
    return known[key]


def _said(value: Any) -> str:
    """What tells a value of a traced graph from others, as far as an op sees it."""
    if not isinstance(value, torch.Tensor):
        return f"<{value}>"
    return f"<{value.dtype} {value.device} {tuple(value.shape)} {value.stride()}>"


class Lowering(ABC):
    """Walks an expression; `call` says what an op on tensors becomes. `axes` are those of rows that are
    prepended: [heads, l, head_dim] or [l, d]."""

    training: bool = False
    axes: int = 3

    @abstractmethod
    def call(self, fn: Any, *args: Any, name: str = "", **kwargs: Any) -> Operand:
        """An op on operands, lowered; `name` is for whoever reads the graph."""

    def lower(self, expr: Expr, env: Env, name: str) -> Operand:
        """What `expr` becomes: a number where no tensor is in it. The last op is called `name`. `env` binds
        ports, parameters and numbers. Raises ExprError where a number has no value."""
        if isinstance(expr, Name):
            return env[expr.id]
        if isinstance(expr, Number) or _is_plain(expr, env):
            return plain(expr, env)
        row = OPS[expr.op]
        rule = LOWERINGS.get(row.lowering)
        if rule is not None:
            return rule(self, expr, env, name)
        args = [self.lower(arg, env, f"{name}_{expr.op}") for arg in expr.args]
        return self.call(target(row.lowering), *args, *row.args, name=name, **row.options)


@dataclass
class Builder(Lowering):
    """Adds named, tagged nodes to one graph. With a `memo`, equal calls are one node. Builders of one graph may
    share what is `known` of values. `edit` is the key of the edit that its nodes are of, as the meta says; without a
    site where several share them."""

    graph: fx.Graph
    training: bool = False
    label: str = "fold"
    tag: str = ""
    stack: Any = None
    inserted: list[fx.Node] = field(default_factory=list)
    memo: dict[str, fx.Node] | None = None
    axes: int = 3
    known: Known = field(default_factory=dict)
    edit: tuple[int, str] | None = None

    def call(self, fn: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        """A node of `fn`, called `label_name`."""
        key = f"{fn} {args} {kwargs}"
        if self.memo is not None and key in self.memo:
            node = self.memo[key]
            if self.edit is not None and node.meta.get("edit") != self.edit:
                node.meta["edit"] = self.edit[0], ""
            return node
        node = self.graph.create_node(
            "call_function", fn, args, kwargs, name=f"{self.label}_{name}"
        )
        node.meta["delta"] = self.tag
        if self.edit is not None:
            node.meta["edit"] = self.edit
        if self.stack is not None:
            node.meta["nn_module_stack"] = self.stack
        node.meta["val"] = value_of(self.graph, fn, args, kwargs, self.known)
        self.inserted.append(node)
        if self.memo is not None:
            self.memo[key] = node
        return node


class Values(Lowering):
    """Computes at once, on tensors."""

    def call(self, fn: Any, *args: Any, name: str = "", **kwargs: Any) -> torch.Tensor:
        """What `fn` gives now."""
        value: torch.Tensor = fn(*args, **kwargs)
        return value


def _is_tensor(one: object) -> bool:
    return isinstance(one, fx.Node | torch.Tensor)


def _is_plain(expr: Expr, env: Env) -> bool:
    """Whether `expr` is a number here: no tensor in it."""
    return not any(_is_tensor(env[name]) for name in names(expr))


def plain(expr: Expr, env: Env) -> float | int:
    """The value of an expression of numbers; ops that are not arithmetic are torch's, of one float64.

    Raises ExprError where there is none, such as 1 / 0.
    """
    if not isinstance(expr, Call):
        return number(expr, env)  # type: ignore[arg-type]  # no name in it is a tensor
    args = tuple(Number(plain(arg, env)) for arg in expr.args)
    if expr.op in ARITHMETIC:
        return number(replace(expr, args=args), {})
    first = torch.tensor(args[0].value, dtype=torch.float64)
    call = replace(expr, args=(Name("x"), *args[1:]))
    value: Any = Values().lower(call, {"x": first}, "")
    return float(value)


def _operands(builder: Lowering, expr: Call, env: Env, name: str) -> tuple[Operand, Operand]:
    a, b = (builder.lower(arg, env, f"{name}_{expr.op}") for arg in expr.args)
    return a, b


# aten's binary ops want the tensor on the left; what a number there becomes is what torch's own
# __radd__, __rsub__ and __rtruediv__ make of it.


def _sub(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    a, b = _operands(builder, expr, env, name)
    if _is_tensor(a):
        return builder.call(aten.sub.Tensor, a, b, name=name)
    negative = builder.call(aten.neg.default, b, name=f"{name}_neg")
    return builder.call(aten.add.Tensor, negative, a, name=name)


def _mul(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    a, b = _operands(builder, expr, env, name)
    a, b = (a, b) if _is_tensor(a) else (b, a)
    return builder.call(aten.mul.Tensor, a, b, name=name)


def _div(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    a, b = _operands(builder, expr, env, name)
    if _is_tensor(a):
        return builder.call(aten.div.Tensor, a, b, name=name)
    inverse = builder.call(aten.reciprocal.default, b, name=f"{name}_reciprocal")
    return builder.call(aten.mul.Tensor, inverse, a, name=name)


def _floordiv(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """Not by a reciprocal: 49 * (1 / 49) is below 1. The mode of `div` has a gradient, `floor_divide` none."""
    a, b = _operands(builder, expr, env, name)
    if not _is_tensor(a):
        a = builder.call(aten.full_like.default, b, a, name=f"{name}_number")
    return builder.call(aten.div.Tensor_mode, a, b, rounding_mode="floor", name=name)


def _add(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """`h + c * e` with a constant c is one kernel: add with alpha."""
    left, right = expr.args
    if _is_plain(left, env):
        left, right = right, left
    if _is_plain(right, env):
        a = builder.lower(left, env, f"{name}_left")
        return builder.call(aten.add.Tensor, a, plain(right, env), name=name)
    factor, rest = _constant_factor(right, env)
    a, b = builder.lower(left, env, f"{name}_left"), builder.lower(rest, env, f"{name}_delta")
    scaled = {} if factor == 1 else {"alpha": factor}
    return builder.call(aten.add.Tensor, a, b, name=name, **scaled)


def _constant_factor(expr: Expr, env: Env) -> tuple[float | int, Expr]:
    if isinstance(expr, Call) and expr.op == "mul" and _is_plain(expr.args[0], env):
        return plain(expr.args[0], env), expr.args[1]
    return 1, expr


def _split_heads(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """[l, n * head_dim] -> [n, l, head_dim]"""
    rows = builder.lower(expr.args[0], env, f"{name}_rows")
    heads = builder.lower(expr.args[1], env, name)
    split = builder.call(aten.unflatten.int, rows, -1, [heads, -1], name=f"{name}_split")
    return builder.call(aten.transpose.int, split, 0, 1, name=name)


def _prepend(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """P [n, l, head_dim] before k [batch, n, keys, head_dim] along the keys; [l, d] before [batch, tokens, d]."""
    prefix = builder.lower(expr.args[0], env, f"{name}_prefix")
    keys = builder.lower(expr.args[1], env, name)
    batch = builder.call(aten.sym_size.int, keys, 0, name=f"{name}_batch")
    row = builder.call(aten.unsqueeze.default, prefix, 0, name=f"{name}_row")
    rows = builder.call(
        aten.expand.default, row, [batch, *[-1] * builder.axes], name=f"{name}_rows"
    )
    return builder.call(aten.cat.default, [rows, keys], -2, name=name)


def _dropout(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    x = builder.lower(expr.args[0], env, f"{name}_x")
    p = builder.lower(expr.args[1], env, name)
    if p == 0 or not builder.training:
        return x
    return builder.call(aten.dropout.default, x, p, True, name=name)


def _kron(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """[..., m, n] and [..., p, q] to [..., m * p, n * q]"""
    a, b = (builder.lower(arg, env, f"{name}_factor") for arg in expr.args)
    for axis in (-1, -3):  # [..., m, 1, n, 1]
        a = builder.call(aten.unsqueeze.default, a, axis, name=f"{name}_left")
    for axis in (-2, -4):  # [..., 1, p, 1, q]
        b = builder.call(aten.unsqueeze.default, b, axis, name=f"{name}_right")
    product = builder.call(aten.mul.Tensor, a, b, name=f"{name}_product")
    columns = builder.call(aten.flatten.using_ints, product, -2, -1, name=f"{name}_columns")
    return builder.call(aten.flatten.using_ints, columns, -3, -2, name=name)


def _block_diag(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """[..., n, a, b] to [..., n * a, n * b] with the blocks on the diagonal"""
    x = builder.lower(expr.args[0], env, f"{name}_blocks")
    last = builder.call(aten.movedim.int, x, -3, -1, name=f"{name}_last")
    wide = builder.call(aten.diag_embed.default, last, name=f"{name}_wide")  # [..., a, b, n, n]
    axes = [-2, -4, -1, -3], [-4, -3, -2, -1]
    order = builder.call(aten.movedim.intlist, wide, *axes, name=f"{name}_order")
    columns = builder.call(aten.flatten.using_ints, order, -2, -1, name=f"{name}_columns")
    return builder.call(aten.flatten.using_ints, columns, -3, -2, name=name)


def _cayley(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """(I + Q)^-1 (I - Q) of Q = (x - x^T) / 2: a rotation; the identity at x = 0."""
    given = builder.lower(expr.args[0], env, f"{name}_x")
    # Solving takes float32 at least; float64 stays what it is.
    single = builder.call(
        aten.new_zeros.default, given, [1], dtype=torch.float32, name=f"{name}_single"
    )
    x = builder.call(aten.add.Tensor, given, single, name=f"{name}_wide")
    turned = builder.call(aten.transpose.int, x, -2, -1, name=f"{name}_transposed")
    double = builder.call(aten.sub.Tensor, x, turned, name=f"{name}_double")
    skew = builder.call(aten.mul.Tensor, double, 0.5, name=f"{name}_skew")
    ones = builder.call(aten.ones_like.default, x, name=f"{name}_ones")
    lower = builder.call(aten.tril.default, ones, name=f"{name}_lower")
    eye = builder.call(aten.triu.default, lower, name=f"{name}_eye")
    left = builder.call(aten.add.Tensor, eye, skew, name=f"{name}_left")
    right = builder.call(aten.sub.Tensor, eye, skew, name=f"{name}_right")
    rotation = builder.call(aten.linalg_solve.default, left, right, name=f"{name}_rotation")
    return builder.call(aten.type_as.default, rotation, given, name=name)


def _logistic_noise(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
    """log u - log(1 - u) of u ~ U(0, 1), clamped to [1e-4, 1 - 1e-4]; in evaluation 0, its median."""
    x = builder.lower(expr.args[0], env, f"{name}_x")
    if not builder.training:
        return builder.call(aten.zeros_like.default, x, name=name)
    draw = builder.call(aten.rand_like.default, x, name=f"{name}_draw")
    return builder.call(aten.logit.default, draw, 1e-4, name=name)


def _factor(rows: bool) -> Callable[..., Operand]:
    """The best rank-r factors of W^T, `svd_in(W, r) @ svd_out(W, r)`, with the singular values in halves."""

    def rule(builder: Lowering, expr: Call, env: Env, name: str) -> Operand:
        weight = builder.lower(expr.args[0], env, f"{name}_weight")
        rank = builder.lower(expr.args[1], env, name)
        parts = builder.call(aten.linalg_svd.default, weight, False, name=f"{name}_svd")
        u, s, vh = (builder.call(operator.getitem, parts, i, name=f"{name}_{i}") for i in range(3))
        root = builder.call(aten.sqrt.default, s, name=f"{name}_root")
        turned = builder.call(
            aten.transpose.int, vh if rows else u, -2, -1, name=f"{name}_transposed"
        )
        if not rows:
            root = builder.call(aten.unsqueeze.default, root, -1, name=f"{name}_column")
        scaled = builder.call(aten.mul.Tensor, turned, root, name=f"{name}_scaled")
        axis = -1 if rows else 0
        return builder.call(aten.slice.Tensor, scaled, axis, 0, rank, name=name)

    return rule


# Lowerings that take more than one op, by the name that a row of the op table gives.
LOWERINGS: Mapping[str, Callable[[Lowering, Call, Env, str], Operand]] = {
    "add": _add,
    "sub": _sub,
    "mul": _mul,
    "div": _div,
    "floordiv": _floordiv,
    "split_heads": _split_heads,
    "prepend": _prepend,
    "dropout": _dropout,
    "kron": _kron,
    "block_diag": _block_diag,
    "cayley": _cayley,
    "logistic_noise": _logistic_noise,
    "svd_in": _factor(rows=True),
    "svd_out": _factor(rows=False),
}
