"""Einsum: a sum of products over letters, written as the product of matrices, or as the linear, that it is."""

from __future__ import annotations

from typing import Any

from torch import fx

from peftc.graph.program import Program, aten
from peftc.rewrite.nodes import made


def as_product(program: Program, node: fx.Node) -> bool:
    """`bnid,bnjd->bnij`, and any other in which both operands and the result have the same letters in front, in some
    order, and one is summed over, as `matmul` of what is laid out for it. False where it is none of these."""
    operands: Any = node.args[1]
    left, right, result = _letters(str(node.args[0]))
    if len(operands) != 2 or not (left and right and result):
        return False
    shared = [one for one in result if one in left and one in right]
    summed = [one for one in left if one in right and one not in result]
    mine = [one for one in result if one not in right]
    theirs = [one for one in result if one not in left]
    fits = len(summed) == len(mine) == len(theirs) == 1
    if not fits or {*left} != {*shared, *summed, *mine} or {*right} != {*shared, *summed, *theirs}:
        return False
    first, second = operands
    with program.graph.inserting_before(node):
        a = _laid(program, node, first, left, [*shared, *mine, *summed])
        b = _laid(program, node, second, right, [*shared, *theirs, *summed])
        turned = made(program, node, aten.transpose.int, (b, -1, -2))
        product = made(program, node, aten.matmul.default, (a, turned))
        whole = _laid(program, node, product, [*shared, *mine, *theirs], result)
    node.replace_all_uses_with(whole)
    program.graph.erase_node(node)
    return True


def as_linear(program: Program, node: fx.Node) -> bool:
    """`ibh,hnd->ibnd` and `ibnd,hnd->ibh` by a parameter, and any other in which the result has what is not summed of
    the first operand, and then what is not summed of the parameter, whose first letter is the one of all that are summed or
    the one of all that are not. False where it is none of these."""
    operands: Any = node.args[1]
    left, right, result = _letters(str(node.args[0]))
    if len(operands) != 2 or not right or program.parameter(operands[1]) is None:
        return False
    summed = [one for one in right if one in left and one not in result]
    made_of = [one for one in right if one not in left]
    kept = [one for one in left if one not in summed]
    if result != kept + made_of or {*summed, *made_of} != {*right} or not summed or not made_of:
        return False
    turned = right[: len(summed)] == summed
    first, rest = (summed, made_of) if turned else (made_of, summed)
    if right != first + rest or len(first) != 1:
        return False
    x, weight = operands
    sizes: Any = weight.meta["val"].shape[1:]
    with program.graph.inserting_before(node):
        x = _laid(program, node, x, left, kept + summed)
        if len(rest) > 1:
            weight = made(program, node, aten.flatten.using_ints, (weight, 1))
        if turned:
            weight = made(program, node, aten.transpose.int, (weight, 0, 1))
        elif len(rest) > 1:
            x = made(program, node, aten.flatten.using_ints, (x, len(kept)))
        whole = made(program, node, aten.linear.default, (x, weight))
        if turned and len(rest) > 1:
            whole = made(program, node, aten.unflatten.int, (whole, -1, [*sizes]))
    node.replace_all_uses_with(whole)
    program.graph.erase_node(node)
    return True


def _letters(text: str) -> tuple[list[str], list[str], list[str]]:
    """The letters of both operands and of the result; none where they repeat, or some are left open."""
    sides, _, result = text.replace(" ", "").partition("->")
    several = [*sides.split(","), result]
    if len(several) != 3 or any(len({*one}) != len(one) or "." in one for one in several):
        return [], [], []
    return list(several[0]), list(several[1]), list(several[2])


def _laid(program: Program, like: fx.Node, value: Any, old: list[str], new: list[str]) -> Any:
    if old == new:
        return value
    order = [old.index(one) for one in new]
    return made(program, like, aten.permute.default, (value, order))
