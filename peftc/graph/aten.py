"""The ops of captured graphs by what they do, and the operands of those that read weights."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from peftc.graph.program import aten, is_call

# The one form of a linear: Normalize writes the others (`addmm` of a turned weight, `x @ W.T`) as it.
LINEAR = (aten.linear.default,)
CONV = (
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
    aten.convolution.default,
)
SDPA = aten.scaled_dot_product_attention.default
SOFTMAX = (aten.softmax.int, aten._softmax.default)
NORM = (aten.layer_norm.default, aten.rms_norm.default)
MATMUL = (aten.matmul.default, aten.bmm.default)
FILL = (
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
)
WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
EMBEDDING = (aten.embedding.default,)
DROPOUT = (aten.dropout.default, aten.native_dropout.default)
ADD = (aten.add.Tensor, aten.add_.Tensor)
MUL = (
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.div_.Tensor,
)
VIEW = (aten.view.default, aten.reshape.default, aten._unsafe_view.default)
# Of a matrix these are its transpose.
TURN = (aten.numpy_T.default, aten.t.default, aten.transpose.int)
# Makes several axes one.
FLAT = (aten.flatten.using_ints,)
# Ops that move or cast values but compute nothing.
MOVE = (
    *VIEW,
    aten.transpose.int,
    aten.permute.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
    aten.reshape_as.default,
    aten.view_as.default,
    aten.alias.default,
    aten.detach.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    *FLAT,
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
# Sums and multiples; every other op that torch calls pointwise bends what it is given.
STRAIGHT = (*ADD, *MUL, aten.sub.Tensor, aten.sub.Scalar, aten.rsub.Scalar, aten.neg.default, *MOVE)
# Pointwise too, and not marked so.
_UNMARKED = (*FILL, aten.hardswish.default, aten.log_sigmoid.default, aten.prelu.default)


def is_pointwise(node: object) -> bool:
    """Whether each element of what `node` computes is of the elements at its place alone."""
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return False
    if getattr(node.target, "pointwise", False):  # a function with a backward of its own
        return True
    return is_call(node, *_UNMARKED) or torch.Tag.pointwise in getattr(node.target, "tags", ())


def is_nonlinear(node: object) -> bool:
    """Whether `node` is pointwise and no sum or multiple."""
    return is_pointwise(node) and not is_call(node, *STRAIGHT)


def shares(node: fx.Node) -> bool:
    """Whether what a node gives may lie where its argument does."""
    schema = getattr(node.target, "_schema", None)
    return schema is None or any(one.alias_info is not None for one in schema.returns)


def writes(node: fx.Node) -> bool:
    """Whether a node writes into what it is given."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and schema.is_mutable


def operand(node: fx.Node, index: int) -> fx.Node | None:
    """The node among the arguments of `node` at `index`, if there is one."""
    found = node.args[index] if len(node.args) > index else None
    return found if isinstance(found, fx.Node) else None


def weight_of(node: fx.Node) -> fx.Node:
    """What a linear or a convolution multiplies by: [out, in], or [out, channels / groups, *kernel]."""
    found = operand(node, 1)
    assert found is not None
    return found


def bias_of(node: fx.Node) -> fx.Node | None:
    """The bias of a linear or a convolution, [out]."""
    return operand(node, 2)


def is_convolution(node: object) -> bool:
    """Whether `node` convolves by a weight [out, channels / groups, *kernel]; a transposed one's is another."""
    if not is_call(node, *CONV):
        return False
    assert isinstance(node, fx.Node)
    # aten.convolution(input, weight, bias, stride, padding, dilation, transposed, ...)
    return not (node.target is aten.convolution.default and node.args[6])


def projects(node: object) -> bool:
    """Whether `node` multiplies the features of each token by a weight: a linear, or a convolution that reads one place
    at a time, along tokens, [batch, features, tokens] (SqueezeBERT, perhaps in groups of features), or over an image
    (SwiftFormer)."""
    if not is_call(node, aten.conv1d.default, aten.conv2d.default):
        return is_call(node, *LINEAR)
    assert isinstance(node, fx.Node)
    # aten.conv1d, conv2d(input, weight, bias, stride, padding, ...)
    ones = [1] * len(static_shape(weight_of(node))[2:])
    zeros = [0] * len(ones)
    alone = [*static_shape(weight_of(node))[2:]] == ones
    return alone and [*node.args[3:5]] in ([], [ones], [ones, zeros])


def groups(node: fx.Node) -> int:
    """In how many groups of features a convolution reads them."""
    return features(node)[0] // static_shape(weight_of(node))[1]


def static_shape(node: Any) -> tuple[int, ...]:
    """The sizes of a value; -1 for an axis that is dynamic."""
    return tuple(int(n) if isinstance(n, int) else -1 for n in node.meta["val"].shape)


def lies_flat(value: Any) -> bool:
    """Whether all axes but the last are one without a copy."""
    return all(
        statically_known_true(value.stride(i) == value.shape[i + 1] * value.stride(i + 1))
        for i in range(value.ndim - 2)
    )


def features(node: fx.Node) -> tuple[int, int]:
    """(in, out) of what `projects`, or convolves."""
    n_out, *kernel = static_shape(weight_of(node))
    return static_shape(node.args[0])[-len(kernel)] if is_convolution(node) else kernel[0], n_out


def hint(size: Any) -> int:
    """A size in the example that was traced."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)
