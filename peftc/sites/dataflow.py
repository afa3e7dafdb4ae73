"""Walks over a captured graph: projections behind a value, feed-forwards, residual adds, norms."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from peftc.graph.program import Program, Read, aten, is_call

LINEAR = (aten.linear.default, aten.addmm.default)
CONV = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
DROPOUT = (aten.dropout.default, aten.native_dropout.default)
ADD = (aten.add.Tensor, aten.add_.Tensor)
MUL = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div_.Tensor,
)
_RESHAPE = (aten.view.default, aten.reshape.default)
# Ops that move or cast values but compute nothing.
MOVE = (
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
)
# Ops that cut a value into parts.
CUT = (
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.unbind.int,
    aten.select.int,
    aten.slice.Tensor,
    aten.index.Tensor,
    aten.unflatten.int,
    operator.getitem,
)
ACTIVATION = tuple(
    packet
    for packet in (
        aten.relu.default,
        aten.relu_.default,
        aten.gelu.default,
        aten.silu.default,
        aten.silu_.default,
        aten.tanh.default,
        aten.sigmoid.default,
        aten.leaky_relu.default,
        aten.elu.default,
        aten.hardtanh.default,
        aten.mish.default,
        aten.erf.default,
        aten.pow.Tensor_Scalar,
    )
)
POINTWISE = ACTIVATION + ADD + MUL + (aten.sub.Tensor, aten.neg.default, aten.exp.default)


def x_index(linear: fx.Node) -> int:
    """Where a linear's input stands among its arguments (`addmm` is [bias, x, W])."""
    return 1 if linear.target is aten.addmm.default else 0


def input_of(linear: fx.Node) -> Read:
    """The operand x as the model has it: `addmm` flattens it to two axes first."""
    read = Read(linear, x_index(linear))
    flat = linear.target is aten.addmm.default and is_call(read.node, *_RESHAPE)
    return Read(read.node, 0) if flat else read


def result_of(linear: fx.Node) -> fx.Node:
    """The result with the axes of x, behind the view that undoes the flattening for `addmm`."""
    users = list(linear.users)
    flat = linear.target is aten.addmm.default and len(users) == 1 and is_call(users[0], *_RESHAPE)
    return users[0] if flat else linear


def weight_of(linear: fx.Node) -> fx.Node:
    """The weight of a linear or a convolution."""
    node = linear.args[2 if linear.target is aten.addmm.default else 1]
    assert isinstance(node, fx.Node)
    return node


def is_convolution(node: object) -> bool:
    """Whether `node` convolves by a weight [out, channels / groups, *kernel]; a transposed one's is another."""
    if not is_call(node, *CONV):
        return False
    assert isinstance(node, fx.Node)
    return not (node.target is aten.convolution.default and node.args[6])


def bias_of(linear: fx.Node) -> fx.Node | None:
    if linear.target is aten.addmm.default:
        node = linear.args[0]
    else:
        node = linear.args[2] if len(linear.args) > 2 else None
    return node if isinstance(node, fx.Node) else None


def static_shape(node: fx.Node) -> tuple[int, ...]:
    """The sizes of a value; -1 for an axis that is dynamic."""
    return tuple(int(n) if isinstance(n, int) else -1 for n in node.meta["val"].shape)


def features(linear: fx.Node) -> tuple[int, int]:
    """(in, out) of a linear in either form."""
    weight = static_shape(weight_of(linear))
    return weight if linear.target is aten.addmm.default else (weight[1], weight[0])  # type: ignore[return-value]


_STOP = (
    aten.scaled_dot_product_attention.default,
    aten.softmax.int,
    aten._softmax.default,
    aten.embedding.default,
    aten.layer_norm.default,
)


def projections(node: fx.Node) -> tuple[fx.Node, ...]:
    """The linears that `node` is computed from, walking back through views, norms, rotary and pointwise ops."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack = [node]
    while stack:
        one = stack.pop()
        if one in seen or one.op != "call_function":
            continue
        seen.add(one)
        if is_call(one, *LINEAR):
            found[one] = None
        elif not is_call(one, *_STOP) or one is node:
            stack += reversed(one.all_input_nodes)
    return tuple(found)


def next_linear(node: fx.Node) -> fx.Node | None:
    """The first linear that consumes `node`, walking forward through moves, casts, dropout and gates."""
    frontier = [node]
    while frontier:
        onward: list[fx.Node] = []
        for one in frontier:
            for user in one.users:
                if is_call(user, *LINEAR) and user.args[x_index(user)] is one:
                    return user
                if is_call(user, *MOVE, *MUL, *DROPOUT):
                    onward.append(user)
        frontier = onward
    return None


@dataclass(frozen=True)
class FeedForward:
    """`down(act(up(x)))` that ends in a residual add; `gate` is set when two projections multiply."""

    up: fx.Node
    gate: fx.Node | None
    down: fx.Node
    residual: Read


def feed_forward(down: fx.Node, taken: set[fx.Node]) -> FeedForward | None:
    """The feed-forward that ends in the linear `down`, or None. `taken` are attention's own linears."""
    residual = residual_add(down)
    inner = _inner(down.args[x_index(down)])
    if residual is None or inner is None or not inner or len(inner) > 2 or set(inner) & taken:
        return None
    if len(inner) == 1:
        return FeedForward(inner[0], None, down, residual)
    gate = next((one for one in inner if _activated(one)), inner[0])
    up = inner[0] if inner[1] is gate else inner[1]
    return FeedForward(up, gate, down, residual)


def _inner(start: object) -> tuple[fx.Node, ...] | None:
    """The linears that `start` is a pointwise, nonlinear function of; None when anything else flows in."""
    found: dict[fx.Node, None] = {}
    seen: set[fx.Node] = set()
    stack, nonlinear = [start], False
    while stack:
        one = stack.pop()
        if not isinstance(one, fx.Node) or one in seen:
            continue
        seen.add(one)
        if is_call(one, *LINEAR):
            found[one] = None
        elif is_call(one, *POINTWISE, *MOVE, *CUT, *DROPOUT):
            nonlinear = nonlinear or is_call(one, *ACTIVATION)
            tensors = one.args if is_call(one, *POINTWISE) else one.args[:1]
            stack += reversed(tensors)
        else:
            return None
    return tuple(found) if nonlinear else None


def _activated(linear: fx.Node) -> bool:
    node = linear
    while len(node.users) == 1:
        node = next(iter(node.users))
        if is_call(node, *ACTIVATION):
            return True
        if not is_call(node, *MOVE):
            return False
    return any(is_call(user, *ACTIVATION) for user in node.users)


def residual_add(node: fx.Node) -> Read | None:
    """The operand that the residual add behind `node` adds to it; None when there is no such add."""
    one = node
    while True:
        onward = None
        for user in one.users:
            if is_call(user, *ADD):
                other = user.args[1] if user.args[0] is one else user.args[0]
                if isinstance(other, fx.Node) and other.op == "call_function":
                    return Read(user, user.args.index(other))
            if is_call(user, *MOVE, *DROPOUT, *MUL):
                onward = user
        if onward is None:
            return None
        one = onward


@dataclass(frozen=True)
class Norm:
    """A layer norm or RMS norm, as one op or written out: where its scale and shift are read, its result."""

    weight: Read
    bias: Read | None
    h: fx.Node


def norms(program: Program) -> Iterator[Norm]:
    """Normalisations with a learned scale, in graph order."""
    for node in program.graph.nodes:
        if is_call(node, aten.layer_norm.default, aten.rms_norm.default):
            if len(node.args) > 2 and program.parameter(node.args[2]):
                shifted = len(node.args) > 3 and program.parameter(node.args[3])
                yield Norm(Read(node, 2), Read(node, 3) if shifted else None, node)
        elif is_call(node, aten.mul.Tensor):
            for i in (0, 1):
                scale = _scale(program, node, i)
                if scale is not None and _is_normalised(node.args[1 - i]):
                    yield Norm(scale, None, node)


def _scale(program: Program, mul: fx.Node, i: int) -> Read | None:
    """The read of a learned scale: the parameter itself, or 1 + it."""
    node = mul.args[i]
    if program.parameter(node):
        return Read(mul, i)
    if isinstance(node, fx.Node) and is_call(node, *ADD) and program.parameter(node.args[0]):
        return Read(node, 0)
    return None


def _is_normalised(node: object) -> bool:
    """Whether `node` is x * rsqrt(...), perhaps cast."""
    while isinstance(node, fx.Node) and is_call(node, *MOVE):
        node = node.args[0]
    return (
        isinstance(node, fx.Node)
        and is_call(node, aten.mul.Tensor)
        and any(is_call(arg, aten.rsqrt.default) for arg in node.args)
    )
