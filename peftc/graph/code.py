"""Code: a graph as a function, in which frequent ops go by the names that Python has for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

aten = torch.ops.aten

# Ops that Python has functions for, of the same arguments. Their arguments are parsed in half the time that any op's
# take, about a microsecond each: in a step of decoding that is as much as a tenth.
NAMED: dict[Any, Callable[..., Any]] = {
    aten.add.Tensor: torch.add,
    aten.addmm.default: torch.addmm,
    aten.bmm.default: torch.bmm,
    aten.cat.default: torch.cat,
    aten.chunk.default: torch.chunk,
    aten.clone.default: torch.clone,
    aten.contiguous.default: torch.Tensor.contiguous,
    aten.cos.default: torch.cos,
    aten.div.Tensor: torch.div,
    aten.dropout.default: torch.dropout,
    aten.embedding.default: torch.embedding,
    aten.expand.default: torch.Tensor.expand,
    aten.flatten.using_ints: torch.flatten,
    aten.gelu.default: torch._C._nn.gelu,
    aten.layer_norm.default: torch.layer_norm,
    aten.linear.default: torch._C._nn.linear,
    aten.matmul.default: torch.matmul,
    aten.mul.Tensor: torch.mul,
    aten.neg.default: torch.neg,
    aten.permute.default: torch.permute,
    aten.pow.Tensor_Scalar: torch.pow,
    aten.relu.default: torch.relu,
    aten.reshape.default: torch.reshape,
    aten.rms_norm.default: torch.rms_norm,
    aten.scaled_dot_product_attention.default: torch._C._nn.scaled_dot_product_attention,
    aten.select.int: torch.select,
    aten.silu.default: torch._C._nn.silu,
    aten.sin.default: torch.sin,
    aten.softmax.int: torch.softmax,
    aten.split_with_sizes.default: torch.split_with_sizes,
    aten.sub.Tensor: torch.sub,
    aten.sym_size.int: torch.Tensor.size,
    aten.tanh.default: torch.tanh,
    aten.transpose.int: torch.transpose,
    aten.unsqueeze.default: torch.unsqueeze,
    aten.view.default: torch.Tensor.view,
    aten.view_as.default: torch.Tensor.view_as,
}


def function_of(root: nn.Module, graph: fx.Graph) -> Callable[..., Any]:
    """A graph, which calls what is in `root`, as a function of its placeholders in their order."""
    named = fx.Graph()
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
        target = NAMED.get(node.target, node.target)
        found[node] = named.create_node(node.op, target, args, kwargs, node.name)
    return fx.GraphModule(root, named).forward
