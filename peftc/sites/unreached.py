"""Reach: weights that no spec can name, and the op that stands in the way."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from torch import fx

from peftc.graph.program import Program, aten, is_call, op_name, scope_of
from peftc.sites import dataflow as flow

# Products of matrices that are no linear: experts in one batch, `x @ W` with W as it is.
_PRODUCTS = ("matmul", "mm", "bmm", "baddbmm", "addmm", "einsum", "_grouped_mm")
_TRANSPOSED = (
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
    aten.convolution.default,
)


def unreached(program: Program) -> dict[str, Mapping[str, str]]:
    """For `linear` and `conv`: the weights that belong there and are no site, each with the reason."""
    return {"linear": dict(_products(program)), "conv": dict(_kernels(program))}


def _products(program: Program) -> Iterator[tuple[str, str]]:
    """Matrices that a product other than a linear reads, or an op from outside torch."""
    for node in program.graph.nodes:
        path = program.parameter(node) if node.op == "placeholder" else None
        if path and len(flow.static_shape(node)) > 1:
            readers = [one for one in _readers(node) if not is_call(one, *flow.LINEAR)]
            outside = [one for one in readers if not str(one.target).startswith("aten.")]
            products = [one for one in readers if op_name(one) in _PRODUCTS]
            if outside or products:
                op = op_name([*outside, *products][0])
                yield path, f"'{op}' reads this weight, and it is no linear"


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    for user in node.users:
        if is_call(user, *flow.MOVE):
            yield from _readers(user)
        elif user.op == "call_function":
            yield user


def _kernels(program: Program) -> Iterator[tuple[str, str]]:
    """Weights of convolutions that a graph computes (weight norm), and those of transposed ones."""
    for node in program.graph.nodes:
        path = f"{scope_of(node)}.weight"
        if flow.is_convolution(node):
            weight = flow.weight_of(node)
            if weight.op == "call_function" and not program.parameter(weight):
                yield path, f"'{op_name(weight)}' computes this weight in the graph"
            elif not program.parameter(weight):
                yield path, "this weight is no parameter"
        elif is_call(node, *_TRANSPOSED):
            yield path, f"'{op_name(node)}' reads this weight, and it is a transposed convolution"
