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


# In the meta of a selection: which of its operands is the result of a layer that is left out where the draw says so.
LEFT_OUT = "left_out"


# What stands for an op where it is called, of the node and the op.
Around = Callable[[fx.Node, Any], Any]


def as_it_is(node: fx.Node, target: Any) -> Any:
    """The op itself."""
    return target


def function_of(root: nn.Module, graph: fx.Graph, around: Around = as_it_is) -> Callable[..., Any]:
    """A graph, which calls what is in `root`, as a function of its placeholders in their order. What only the result of
    a layer that is left out needs is not run then. `around` says what is called in the place of an op."""
    named = fx.Graph()
    found: dict[fx.Node, fx.Node] = {}
    several = [node for node in graph.nodes if LEFT_OUT in node.meta]
    layers = {node: layer for node in several if (layer := _alone(node))}
    inside = {one for layer in layers.values() for one in layer}
    for node in graph.nodes:
        if node in inside:
            continue
        if node in layers:
            found[node] = _unless(root, named, node, layers[node], found)
            continue
        args, kwargs = fx.map_arg((node.args, node.kwargs), found.__getitem__)
        target = NAMED.get(node.target, node.target)
        if node.op == "call_function":
            target = around(node, target)
        found[node] = named.create_node(node.op, target, args, kwargs, node.name)
    return fx.GraphModule(root, named).forward


def _alone(selection: fx.Node) -> list[fx.Node]:
    """The nodes that nothing but one side of a selection needs, in order."""
    draw, after = selection.args[0], selection.args[selection.meta[LEFT_OUT]]
    mine: set[fx.Node] = set()
    node = selection.prev
    while node is not draw and node.op != "placeholder":
        users = set(node.users)
        if users and ((node is after and users == {selection}) or users <= mine):
            mine.add(node)
        node = node.prev
    return [one for one in selection.graph.nodes if one in mine]


def _unless(
    root: nn.Module,
    named: fx.Graph,
    selection: fx.Node,
    layer: list[fx.Node],
    found: dict[fx.Node, fx.Node],
) -> fx.Node:
    """A selection that runs the layer only where its result is taken."""
    body, side = fx.Graph(), selection.meta[LEFT_OUT]
    reads = list(dict.fromkeys(n for one in layer for n in one.all_input_nodes if n not in layer))
    copies = {one: body.placeholder(one.name) for one in reads}
    for one in layer:
        copies[one] = body.node_copy(one, copies.__getitem__)
    body.output(copies[layer[-1]])
    run = function_of(root, body)

    def unless(draw: torch.Tensor, past: torch.Tensor, *given: torch.Tensor) -> torch.Tensor:
        if torch.compiler.is_compiling():
            there = run(*given)
            return torch.where(draw, past, there) if side == 2 else torch.where(draw, there, past)
        taken = bool(draw) is (side == 1)
        result: torch.Tensor = run(*given) if taken else past
        return result

    draw, past = selection.args[0], selection.args[3 - side]
    return named.call_function(unless, fx.map_arg((draw, past, *reads), found.__getitem__))
