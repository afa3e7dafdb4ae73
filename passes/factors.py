"""Factors: while training, a linear of a weight that a small product changes is that of the stored weight, and the
product by itself: no gradient of a whole weight is computed for the sake of a few columns."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import repeat
from math import prod
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import LINEAR, TURN, static_shape
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made

_SCALED = (aten.mul.Tensor, aten.div.Tensor)
# What cuts a weight along its rows, and puts it together.
_CUTS = (aten.slice.Tensor, aten.unflatten.int, aten.flatten.using_ints)
_PUT = aten.slice_scatter.default


@dataclass(frozen=True)
class Factors:
    """`linear(x, a * (W + c * B @ A))` is `a * (linear(x, W) + c * (x @ A^T) @ B^T)`, a being one number a row: DoRA
    costs a LoRA, and a row of numbers. What is only read behind `detach` is computed of detached values."""

    name: str = "factors"

    def run(self, program: Program) -> int:
        if not program.training:
            return 0  # such a weight is a constant in evaluation
        known: Known = {}
        count = 0
        for node in program.graph.find_nodes(op="call_function", target=LINEAR[0]):
            weight = node.args[1]
            if "delta" in weight.meta and weight.op == "call_function":
                count += _factored(_Applied(program, node, known))
        if count:
            program.graph.eliminate_dead_code()
            for node in program.graph.find_nodes(op="call_function", target=aten.detach.default):
                if "delta" in node.meta:
                    _detached(program, node)
        return count


@dataclass(frozen=True)
class _Value:
    """The product of x with a weight [out, in] turned: `node`, times `scale` [out] or a `factor`, where there is one."""

    node: fx.Node
    scale: fx.Node | None = None
    factor: float = 1


@dataclass
class _Applied:
    """Makes the products of one linear's input with the parts of its weight, each once."""

    program: Program
    linear: fx.Node
    known: Known
    found: dict[fx.Node, _Value] = field(default_factory=dict)

    @property
    def x(self) -> fx.Node:
        return self.linear.args[0]  # type: ignore[return-value]

    def make(self, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = made(self.program, self.linear, op, args, kwargs, known=self.known)
        weight: Any = self.linear.args[1]
        node.meta |= {key: weight.meta[key] for key in ("delta", "edit") if key in weight.meta}
        return node

    def of(self, weight: fx.Node) -> _Value:
        if weight not in self.found:
            self.found[weight] = self._of(weight)
        return self.found[weight]

    def _of(self, weight: fx.Node) -> _Value:
        if _is_stored(self.program, weight):
            return _Value(self.make(aten.linear.default, self.x, weight))
        if is_call(weight, aten.transpose.int):
            return self._product(weight.args[0], turned=True)
        if is_call(weight, aten.matmul.default):
            return self._product(weight, turned=False)
        if is_call(weight, *_CUTS, _PUT):
            return _Value(self._cut(weight))
        if is_call(weight, *_SCALED):
            whole, scale = _scaled(weight)
            return self._times(self.of(whole), weight.target, scale)
        assert is_call(weight, aten.add.Tensor)
        left, right = (self.of(one) for one in weight.args)  # type: ignore[arg-type]
        alpha: Any = weight.kwargs.get("alpha", 1)
        scaled = {} if alpha * right.factor == 1 else {"alpha": alpha * right.factor}
        right = replace(right, factor=1)
        sides = (self._whole(left), self._whole(right))
        return _Value(self.make(aten.add.Tensor, *sides, **scaled))

    def _product(self, product: Any, turned: bool) -> _Value:
        """x @ P^T of a product P, or of its transpose: x @ P."""
        first, second = product.args
        if not turned:
            first, second = (self.make(aten.transpose.int, one, 0, 1) for one in (second, first))
        narrow = self.make(aten.matmul.default, self.x, first)
        return _Value(self.make(aten.matmul.default, narrow, second))

    def _cut(self, weight: fx.Node) -> fx.Node:
        """The same of the features of a result as of the rows of its weight."""
        rank = len(static_shape(weight.args[0])) - 1
        put = is_call(weight, _PUT)
        given: list[Any] = list(weight.args[2 if put else 1 :])
        axes = 2 if is_call(weight, aten.flatten.using_ints) else 1
        given[:axes] = [axis - rank for axis in given[:axes]]
        values = [self._whole(self.of(one)) for one in weight.args[: 1 + put]]  # type: ignore[arg-type]
        return self.make(weight.target, *values, *given)

    def _times(self, value: _Value, op: Any, scale: Any) -> _Value:
        if not isinstance(scale, fx.Node):
            factor = scale if op is aten.mul.Tensor else 1 / scale
            return replace(value, factor=value.factor * factor)
        row = self.make(aten.flatten.using_ints, scale, 0, -1)
        if value.scale is not None:
            return replace(value, scale=self.make(op, value.scale, row))
        if op is aten.div.Tensor:
            row = self.make(aten.reciprocal.default, row)
        return replace(value, scale=row)

    def _whole(self, value: _Value) -> fx.Node:
        scaled = value.node
        if value.factor != 1:
            scaled = self.make(aten.mul.Tensor, scaled, value.factor)
        if value.scale is not None:
            scaled = self.make(aten.mul.Tensor, scaled, value.scale)
            scaled = self.make(aten.type_as.default, scaled, value.node)  # autocast: as a linear's
        return scaled

    def result(self) -> fx.Node:
        whole = self._whole(self.of(self.linear.args[1]))  # type: ignore[arg-type]
        bias = self.linear.args[2] if len(self.linear.args) > 2 else None
        if bias is None:
            return whole
        return self.make(aten.type_as.default, self.make(aten.add.Tensor, whole, bias), whole)


def _factored(applied: _Applied) -> bool:
    linear, program = applied.linear, applied.program
    weight: Any = linear.args[1]
    n_out, n_in = static_shape(weight)
    if not _is_narrow(program, weight, n_out * n_in):
        return False
    with program.graph.inserting_before(linear):
        linear.replace_all_uses_with(applied.result())
    program.graph.erase_node(linear)
    return True


def _is_stored(program: Program, node: Any) -> bool:
    """A weight of the backbone, as it is or turned."""
    source = node.args[0] if is_call(node, *TURN) else node
    return program.parameter(source) is not None


def _is_narrow(program: Program, weight: Any, size: int) -> bool:
    """Whether a weight is made of a stored one and of products that are cheaper apart than together."""
    if _is_stored(program, weight):
        return True
    product = weight.args[0] if is_call(weight, aten.transpose.int) else weight
    if is_call(product, aten.matmul.default):
        if any(one.meta["val"].ndim != 2 for one in product.args):
            return False
        (rows, inner), (_, columns) = (static_shape(one) for one in product.args)
        return inner * (rows + columns) < size and not any(
            _is_stored(program, one) for one in product.args
        )
    if is_call(weight, *_CUTS, _PUT):
        parts: tuple[Any, ...] = weight.args[: 1 + is_call(weight, _PUT)]
        sizes = [prod(static_shape(one)) for one in parts]
        return _cuts_rows(weight) and all(map(_is_narrow, repeat(program), parts, sizes))
    if is_call(weight, *_SCALED):
        whole, scale = _scaled(weight)
        row = not isinstance(scale, fx.Node) or _is_row(scale, weight)
        return row and isinstance(whole, fx.Node) and _is_narrow(program, whole, size)
    if is_call(weight, aten.add.Tensor):
        sides = [isinstance(one, fx.Node) and _is_narrow(program, one, size) for one in weight.args]
        same = [static_shape(one) == static_shape(weight) for one in weight.all_input_nodes]
        return all(sides) and all(same)
    return False


def _cuts_rows(node: fx.Node) -> bool:
    """Whether a cut or put leaves the last axis, which the input is multiplied along, as it is."""
    rank = len(static_shape(node.args[0]))
    axes: Any = node.args[2 if is_call(node, _PUT) else 1 :]
    used = axes[: 2 if is_call(node, aten.flatten.using_ints) else 1]
    return all(isinstance(axis, int) and 0 <= axis < rank - 1 for axis in used)


def _scaled(node: fx.Node) -> tuple[Any, Any]:
    """The larger operand of a multiplication or division, and what scales it."""
    left, right = node.args[:2]
    first_is_scale = isinstance(left, fx.Node) and _is_row(left, node)
    swaps = node.target is aten.mul.Tensor and first_is_scale
    return (right, left) if swaps else (left, right)


def _is_row(scale: fx.Node, weight: fx.Node) -> bool:
    """Whether a tensor has one number for each row of a weight."""
    return static_shape(scale) == (static_shape(weight)[0], 1)


def _detached(program: Program, node: fx.Node) -> None:
    """Let what is read behind this `detach` alone be computed of detached parameters: nothing of it is kept for a
    way back that it has not."""
    inside, stack = {node}, [node]
    while stack:
        for one in stack.pop().all_input_nodes:
            if one.op == "call_function" and one not in inside and set(one.users) <= inside:
                inside.add(one)
                stack.append(one)
    leaves: dict[fx.Node, fx.Node] = {}
    for one in sorted(inside - {node}):
        for source in one.all_input_nodes:
            if source in inside or not _learns(program, source):
                continue
            if source not in leaves:
                with program.graph.inserting_before(one):
                    leaves[source] = made(program, one, aten.detach.default, (source,))
            one.replace_input_with(source, leaves[source])


def _learns(program: Program, node: fx.Node) -> bool:
    value = node.meta.get("val")
    floating = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floating and not is_call(node, aten.detach.default)
