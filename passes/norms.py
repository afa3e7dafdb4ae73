"""Norms: a root mean square that a model computes op by op is the one op that torch has for it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from peftc.graph.aten import static_shape
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.lower import Known
from peftc.rewrite.nodes import made


@dataclass(frozen=True)
class Norms:
    """`w * (x * rsqrt(mean(x^2) + eps))`, over the last axis, is `rms_norm(x, w, eps)`: the same kernels on a CPU, to
    the bit, called by one node instead of six, which is more than half of its time where one token is few numbers. `w` stays apart where x is cast before it is scaled."""

    name: str = "norms"

    def run(self, program: Program) -> int:
        known: Known = {}
        roots = program.graph.find_nodes(op="call_function", target=aten.rsqrt.default)
        count = sum(_write(program, root, known) for root in roots)
        if count:
            program.graph.eliminate_dead_code()
        return count


def _write(program: Program, root: fx.Node, known: Known) -> bool:
    found = _normed(root)
    if found is None:
        return False
    x, eps, node = found
    width = static_shape(x)[-1]
    weight = _weight(node, width)
    if weight is not None:
        (node,) = node.users
    with program.graph.inserting_before(node):
        args = (x, [width], weight, eps)
        result = made(program, node, aten.rms_norm.default, args, name="rms_norm", known=known)
    node.replace_all_uses_with(result)
    program.graph.erase_node(node)
    return True


def _normed(root: fx.Node) -> tuple[fx.Node, float, fx.Node] | None:
    """x, eps and the node that is x in units of its root mean square, of which `root` is 1; None of another root."""
    if len(root.users) != 1:
        return None
    (node,) = root.users
    added: Any = root.args[0]
    if not is_call(added, aten.add.Tensor) or added.kwargs or len(added.users) != 1:
        return None
    mean, eps = added.args
    if not is_call(mean, aten.mean.dim) or not isinstance(eps, float) or len(mean.users) != 1:
        return None
    square, axes, *kept = mean.args
    last = square.meta["val"].ndim - 1
    if kept != [True] or mean.kwargs or axes not in ([-1], [last]):
        return None
    if not is_call(square, aten.pow.Tensor_Scalar) or square.args[1] != 2:
        return None
    x: Any = square.args[0]
    fits = is_call(node, aten.mul.Tensor) and {*node.args} == {x, root} and static_shape(x)[-1] > 0
    return (x, eps, node) if fits and _dtype(x) == _dtype(node) == _dtype(mean) else None


def _weight(node: fx.Node, width: int) -> fx.Node | None:
    """What alone scales the features of `node`, behind it."""
    if len(node.users) != 1:
        return None
    (scaled,) = node.users
    if not is_call(scaled, aten.mul.Tensor):
        return None
    others = [one for one in scaled.args if one is not node]
    if len(others) != 1 or not isinstance(others[0], fx.Node):
        return None
    one = others[0]
    return one if static_shape(one) == (width,) and _dtype(one) == _dtype(node) else None


def _dtype(node: Any) -> Any:
    return node.meta["val"].dtype
