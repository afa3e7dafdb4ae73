"""Beside: the hidden units of a bottleneck stand beside those of the feed-forward that it is parallel to."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from functools import partial
from operator import getitem
from typing import Any

from torch import fx

from peftc.graph.aten import ADD, LINEAR, MUL, TURN, bias_of, features, static_shape, weight_of
from peftc.graph.program import Program, aten, behind, is_call
from peftc.rewrite.constants import alone
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made

Constants = Collection[fx.Node]


@dataclass(frozen=True)
class Beside:
    """`f(x @ W1 + b1) @ W2 + b2 + c * (g(x @ down + b) @ up + b3)` is `z = x @ [W1 down] + [b1 b]`, cut, and `[f g] @
    [W2 c*up] + (b2 + c*b3)`: as many products as without the bottleneck, whatever f and g are. The wider matrices are
    constants where the weights are, in an exported graph; graphs that run in torch would hold each weight twice."""

    name: str = "beside"

    def run(self, program: Program) -> int:
        known: Known = {}
        sums = program.graph.find_nodes(op="call_function", target=aten.add.Tensor)
        found = sum(_joined(program, node, known) for node in sums if "delta" in node.meta)
        if found:
            program.graph.eliminate_dead_code()
        return found


@dataclass(frozen=True)
class _Branch:
    """`factor * (hidden @ up)` and `offsets`, each a vector with its own factor. `hidden` is made of `units` alone,
    which are `x @ down + bias`. Matrices are [in, out], and constants, as the vectors are."""

    x: fx.Node
    down: fx.Node
    bias: fx.Node | None
    units: fx.Node
    hidden: fx.Node
    up: fx.Node
    factor: float
    offsets: tuple[tuple[fx.Node, float], ...]


def _joined(program: Program, total: fx.Node, known: Known) -> bool:
    """Write a sum of a linear and a branch as one linear."""
    constant = alone(program)
    for one, other, factor in _summands(total):
        if _is_stored(one, constant) and len(one.users) == 1:
            branch = _branch(other, factor, constant)
            first = None if branch is None else _first(one, branch, constant)
            if branch is not None and first is not None:
                _write(program, total, first, one, branch, known)
                return True
    return False


def _summands(total: fx.Node) -> Iterator[tuple[Any, Any, float]]:
    """Each summand that nothing scales, the other, and what scales that."""
    (left, right), alpha = total.args, total.kwargs.get("alpha", 1)
    yield left, right, alpha  # type: ignore[misc]
    if alpha == 1:
        yield right, left, 1


def _is_stored(node: Any, constant: Constants) -> bool:
    """Whether it is a linear of a constant: a parameter, as it is or turned, or what an edit like this made of one."""
    return is_call(node, *LINEAR) and _untransposed(weight_of(node)) in constant


def _untransposed(weight: fx.Node) -> fx.Node:
    return weight.args[0] if is_call(weight, *TURN) else weight  # type: ignore[return-value]


def _branch(node: Any, factor: float, constant: Constants) -> _Branch | None:
    """What a summand is, if it is a branch that nothing else reads."""
    offsets: list[tuple[fx.Node, float]] = []
    while isinstance(node, fx.Node) and len(node.users) == 1:
        if is_call(node, aten.matmul.default):
            hidden, up = node.args
            units = _units(hidden, constant) if up in constant else None
            return None if units is None else _Branch(*units, hidden, up, factor, tuple(offsets))  # type: ignore[arg-type]
        if is_call(node, *MUL) and isinstance(node.args[1], int | float):
            divides = "div" in str(node.target)
            factor *= 1 / node.args[1] if divides else node.args[1]
            node = node.args[0]
        elif is_call(node, *ADD) and (added := _vector(node, constant)) is not None:
            node, vector, scale = added
            offsets.append((vector, factor * scale))
        else:
            return None
    return None


def _vector(total: fx.Node, constant: Constants) -> tuple[fx.Node, fx.Node, float] | None:
    """What a constant vector is added to, that vector, and what scales it."""
    for one, other, factor in _summands(total):
        if other in constant and one not in constant and other.meta["val"].ndim == 1:
            return one, other, factor
    return None


def _units(
    hidden: Any, constant: Constants
) -> tuple[fx.Node, fx.Node, fx.Node | None, fx.Node] | None:
    """x, the matrix, the bias and the units that `hidden` is made of, by what nothing else reads."""
    node = hidden
    while isinstance(node, fx.Node) and len(node.users) == 1 and "delta" in node.meta:
        bare = _vector(node, constant) if is_call(node, *ADD) else None
        product = node if bare is None else bare[0]
        if is_call(product, aten.matmul.default) and (bare is None or bare[2] == 1):
            x, down = product.args
            if down not in constant or x in constant or len(product.users) > 1:
                return None
            return x, down, None if bare is None else bare[1], node  # type: ignore[return-value]
        data = [one for one in node.all_input_nodes if one not in constant]
        node = data[0] if len(data) == 1 else None
    return None


def _first(last: fx.Node, branch: _Branch, constant: Constants) -> fx.Node | None:
    """The linear of the branch's own x that `last` reads the hidden units of, if all of it can be one with it."""
    inner: Any = last.args[0]
    alike = [static_shape(one)[:-1] == static_shape(branch.hidden)[:-1] for one in (inner, last)]
    sizes = [static_shape(one) for one in (branch.down, branch.up)]
    types = {one.meta["val"].dtype for one in (inner, last, branch.down, branch.up, branch.x)}
    if not all(alike) or any(len(one) != 2 for one in sizes) or len(types) > 1:
        return None
    made_of = behind(inner, lambda one: one is branch.x)
    readers = [n for n in branch.x.users if n in made_of and n.args[0] is branch.x]
    firsts = [n for n in readers if _is_stored(n, constant)]
    own = [one for one in (branch.down, branch.bias) if one is not None]
    return next((one for one in sorted(firsts) if all(n < one for n in own)), None)


def _write(
    program: Program, total: fx.Node, first: fx.Node, last: fx.Node, branch: _Branch, known: Known
) -> None:
    make = partial(_made, program, total, known)
    width, more = features(first)[1], static_shape(branch.down)[1]
    with program.graph.inserting_before(first):
        down = make(aten.transpose.int, branch.down, 0, 1)
        weight = make(aten.cat.default, [_stored(first, make), down], 0)
        biases = bias_of(first), branch.bias
        sides = ((0, more), (width, 0))
        padded = [
            make(aten.constant_pad_nd.default, one, list(side))
            for one, side in zip(biases, sides, strict=True)
            if one is not None
        ]
        bias = make(aten.add.Tensor, *padded) if padded[1:] else padded[0] if padded else None
        whole = make(aten.linear.default, first.args[0], weight, bias)
        cut = make(aten.split_with_sizes.default, whole, [width, more], -1)
        own, units = (make(getitem, cut, i) for i in range(2))
    first.replace_all_uses_with(own)
    branch.units.replace_all_uses_with(units)
    with program.graph.inserting_before(total):
        hidden = make(aten.cat.default, [last.args[0], branch.hidden], -1)
        up = make(aten.transpose.int, _times(branch.up, branch.factor, make), 0, 1)
        weight = make(aten.cat.default, [_stored(last, make), up], 1)
        bias = bias_of(last)
        for vector, factor in branch.offsets:
            one = _times(vector, factor, make)
            bias = one if bias is None else make(aten.add.Tensor, bias, one)
        result = make(aten.linear.default, hidden, weight, bias)
    total.replace_all_uses_with(result)
    program.graph.erase_node(total)
    for old, new in ((total, result), (last, result), (first, own)):
        program.replaced[old] = new


def _made(program: Program, like: fx.Node, known: Known, op: Any, *args: Any) -> fx.Node:
    return made(program, like, op, args, known=known)


def _stored(linear: fx.Node, make: Any) -> fx.Node:
    """The weight [out, in] of a linear, as a constant."""
    weight = weight_of(linear)
    inner = _untransposed(weight)
    return weight if inner is weight else make(aten.transpose.int, inner, 0, 1)


def _times(node: fx.Node, factor: float, make: Any) -> fx.Node:
    return node if factor == 1 else make(aten.mul.Tensor, node, factor)
