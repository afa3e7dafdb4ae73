"""Normalize: remove what export leaves behind and nothing computes with."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from operator import getitem, neg
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops.wrap import wrap_with_set_grad_enabled

from peftc.graph.aten import MATMUL, TURN, VIEW
from peftc.graph.program import Program, aten, is_call
from peftc.rewrite.einsum import as_linear, as_product
from peftc.rewrite.inplace import write_out
from peftc.rewrite.nodes import made

_ASSERTS = (
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
)

# Ops that keep the elements and their order.
_RESHAPE = (
    aten.view.default,
    aten.reshape.default,
    aten.squeeze.dim,
    aten.unsqueeze.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
)


@dataclass(frozen=True)
class Normalize:
    """Drop metadata assertions, casts to the dtype and device a value already has, slices of all of a value,
    reshapes of a parameter to the shape it is stored in, updates of running statistics, and dead code; write a
    product with a turned weight as the linear that it is, what is computed without gradients as what it is, and what is
    written into a value as a value of its own."""

    name: str = "normalize"

    def run(self, program: Program) -> int:
        removed, written = 0, _unwrap(program) + write_out(program)
        for node in list(program.graph.nodes):
            idle = _is_idle_cast(node) or _is_idle_slice(node) or _is_idle_sum(node)
            same = node.args[0] if idle else _stored(program, node)
            if same is not None:
                node.replace_all_uses_with(same)
            if same is not None or is_call(node, *_ASSERTS) or _is_count(program, node):
                program.graph.erase_node(node)
                removed += 1
            elif is_call(node, aten.einsum.default):
                written += as_linear(program, node) or as_product(program, node)
            elif _is_linear(program, node):
                node.target = aten.linear.default
                node.update_arg(1, node.args[1].args[0])
                written += 1
            elif is_call(node, *MATMUL) and _is_permuted(node.args[1]):
                _write_turned(program, node)
                written += 1
            elif is_call(node, aten.addmm.default) and _is_turned(program, node):
                _write_linear(program, node)
                written += 1
            elif is_call(node, aten.batch_norm.default) and _is_buffer(program, node.args[3]):
                written += node.args[5] is not False
                node.update_arg(5, False)
        before = len(program.graph.nodes)
        program.graph.eliminate_dead_code()
        return written + removed + before - len(program.graph.nodes)


def _unwrap(program: Program) -> int:
    """Put what a model computes under `no_grad` into the graph itself: no gradient goes into it, or none comes
    back through what it gives."""
    count = 0
    while nodes := [n for n in program.graph.nodes if _is_without_grad(program, n)]:
        for node in nodes:
            _inline(program, node, _part(program, node.args[1]))
        count += len(nodes)
    return count


def _is_without_grad(program: Program, node: fx.Node) -> bool:
    if not is_call(node, wrap_with_set_grad_enabled) or node.args[0] is not False:
        return False
    inner = _part(program, node.args[1])
    calls = {one.args[1] for one in inner.graph.nodes if is_call(one, wrap_with_set_grad_enabled)}
    held = {one for one in inner.graph.nodes if one.op == "get_attr"}
    return held <= calls and all(is_call(user, getitem) for user in node.users)


def _part(program: Program, node: Any) -> fx.GraphModule:
    part: Any = program.root.get_submodule(node.target)
    return part  # type: ignore[no-any-return]


def _inline(program: Program, node: fx.Node, inner: fx.GraphModule) -> None:
    given = iter(node.args[2:])
    copies: dict[fx.Node, Any] = {}
    with program.graph.inserting_before(node):
        for one in inner.graph.nodes:
            if one.op == "placeholder":
                copies[one] = next(given)
            elif one.op == "get_attr":
                name = f"{node.args[1].target}_{one.target}"  # type: ignore[union-attr]
                program.root.add_module(name, inner.get_submodule(one.target))
                copies[one] = program.graph.get_attr(name)
            elif one.op != "output":
                copies[one] = program.graph.node_copy(one, copies.__getitem__)
        (results,) = next(n for n in inner.graph.nodes if n.op == "output").args
        for user in list(node.users):
            value = copies[results[user.args[1]]]
            learns = _may_learn(program, value)
            result = made(program, user, aten.detach.default, (value,)) if learns else value
            user.replace_all_uses_with(result)
            program.graph.erase_node(user)
    program.graph.erase_node(node)


def _may_learn(program: Program, value: fx.Node) -> bool:
    """Whether a gradient could come through `value` to a parameter or to floating numbers that were given."""
    if not isinstance(value.meta["val"], torch.Tensor):  # a size
        return False
    seen: set[fx.Node] = set()
    stack = [value]
    while stack:
        one = stack.pop()
        if one in seen:
            continue
        seen.add(one)
        stack += one.all_input_nodes
        slot = program.slot(one)
        if slot is None or slot.kind in ("buffer", "constant"):
            continue
        if slot.kind == "parameter" or one.meta["val"].is_floating_point():
            return True
    return False


def _is_linear(program: Program, node: fx.Node) -> bool:
    """Whether this is `x @ W.T` of a parameter W [out, in]."""
    if not is_call(node, aten.matmul.default):
        return False
    turned = node.args[1]
    if not is_call(turned, *TURN):
        return False
    assert isinstance(turned, fx.Node)
    weight = turned.args[0]
    return program.parameter(weight) is not None and len(weight.meta["val"].shape) == 2  # type: ignore[union-attr]


def _is_permuted(node: Any) -> bool:
    """Whether this is the second operand of a product, [..., features, length] of [..., length, ..., features]."""
    return (
        is_call(node, aten.permute.default)
        and list(node.args[1]) != sorted(node.args[1])
        and list(node.args[1][-2:]) == sorted(node.args[1][-2:], reverse=True)
        and sorted(node.args[1]) != [*node.args[1][:-2], *sorted(node.args[1][-2:])]
    )


def _write_turned(program: Program, product: fx.Node) -> None:
    """The operand laid out as a value is, and then turned: so keys have their places before their features."""
    permuted: Any = product.args[1]
    *first, features, length = permuted.args[1]
    with program.graph.inserting_before(product):
        order = [*first, length, features]
        laid = made(program, permuted, aten.permute.default, (permuted.args[0], order))
        product.update_arg(1, made(program, permuted, aten.transpose.int, (laid, -1, -2)))


def _is_turned(program: Program, addmm: fx.Node) -> bool:
    """Whether this is `b + x @ W` of a parameter W [in, out], as GPT-2 has it."""
    return addmm.kwargs == {} and program.parameter(addmm.args[2]) is not None


def _write_linear(program: Program, addmm: fx.Node) -> None:
    """`addmm(b, x, W)` as the linear of W turned, of x as the model has it: around addmm it is flattened to two
    axes and given its own back."""
    bias, x, weight = addmm.args
    users = list(addmm.users)
    flat = is_call(x, *VIEW) and len(users) == 1 and is_call(users[0], *VIEW)
    source, result = (x.args[0], users[0]) if flat else (x, addmm)  # type: ignore[union-attr]
    with program.graph.inserting_before(addmm):
        turned = made(program, addmm, aten.transpose.int, (weight, 0, 1))
        linear = made(program, addmm, aten.linear.default, (source, turned, bias))
    result.replace_all_uses_with(linear)


def _is_count(program: Program, node: fx.Node) -> bool:
    """Whether `node` counts batches, or keeps what was seen. A frozen backbone's statistics stay: deltas are saved without
    them."""
    source: Any = node.args[0] if is_call(node, aten.add_.Tensor, aten.copy_.default) else None
    if node.users or not _is_buffer(program, source):
        return False
    return all(user is node or user < node for user in source.users)


def _is_buffer(program: Program, node: object) -> bool:
    slot = program.slot(node) if isinstance(node, fx.Node) else None
    return slot is not None and slot.kind == "buffer"


def _stored(program: Program, node: fx.Node) -> fx.Node | None:
    """The parameter that `node` is again (Mamba squeezes its kernels and takes it back)."""
    source = node
    while is_call(source, *_RESHAPE):
        source = source.args[0]  # type: ignore[assignment]
    if source is node or not program.parameter(source):
        return None
    return source if source.meta["val"].shape == node.meta["val"].shape else None


def _is_idle_slice(node: fx.Node) -> bool:
    if not is_call(node, aten.slice.Tensor):
        return False
    defaults: tuple[Any, ...] = (None, 0, None, None, 1)
    source, axis, start, stop, step = node.args + defaults[len(node.args) :]
    first = start in (0, None) or _is_length(start, source, axis)
    return bool(first and stop in (None, sys.maxsize) and step == 1)


def _is_length(start: Any, source: Any, axis: Any) -> bool:
    """Whether a slice starts as far from the end as there are elements."""
    return (
        is_call(start, neg)
        and is_call(start.args[0], aten.sym_size.int)
        and start.args[0].args == (source, axis)
    )


def _is_idle_sum(node: fx.Node) -> bool:
    """Whether zero is added to whole numbers, as positions are moved by what a new cache holds."""
    if not is_call(node, aten.add.Tensor) or node.args[1] != 0 or isinstance(node.args[1], fx.Node):
        return False
    before, after = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]
    return bool(before.dtype == after.dtype and not after.is_floating_point())


def _is_idle_cast(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (aten.to.dtype, aten.to.dtype_layout):
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or "val" not in source.meta or node.args[3:]:
        return False
    before, after = source.meta["val"], node.meta["val"]
    same = isinstance(before, torch.Tensor) and before.dtype == after.dtype
    return same and before.device == after.device and before.layout == after.layout
