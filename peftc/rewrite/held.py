"""Two graphs of a step whose prefix a cache can hold: one that gives the cache with the rows, one that goes on from it.

What is in front of the tokens in a cache is no token: sizes that are read of it are those of the tokens.
"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import replace

from torch import fx
from torch.utils import _pytree as pytree

from peftc.graph.program import Held, Program, aten, is_call
from peftc.rewrite.nodes import made


def filling(program: Program) -> Program:
    """The same step, whose keys and values come out as attention read them, with their rows in front."""
    copied, held = _copied(program)
    _returned(copied, {one.name: one.wide for one in held})
    copied.graph.eliminate_dead_code()
    return copied


def holding(program: Program) -> Program:
    """The step behind it: it takes keys and values with their rows in front, and gives them so."""
    copied, held = _copied(program)
    for one in held:
        for value in dict.fromkeys((one.past, one.keys)):
            for size in [user for user in value.users if is_call(user, aten.sym_size.int)]:
                if size.args[1] in (2, -2):
                    _shortened(copied, size, one.rows)
        one.wide.replace_all_uses_with(one.keys)
        copied.graph.erase_node(one.wide)
    _returned(copied, {one.name: one.keys for one in held})
    copied.graph.eliminate_dead_code()
    for name in [n for n in copied.slots if n not in {x.name for x in copied.graph.nodes}]:
        del copied.slots[name]
    return copied


def _shortened(program: Program, size: fx.Node, rows: int) -> None:
    with program.graph.inserting_after(size):
        tokens = made(program, size, operator.sub, (size, rows))
        tokens.meta["delta"] = "held"
    size.replace_all_uses_with(tokens, delete_user_cb=lambda user: user is not tokens)


def _copied(program: Program) -> tuple[Program, list[Held]]:
    copied, of = program.copied()
    held = [
        replace(one, wide=of[one.wide], past=of[one.past], keys=of[one.keys])
        for one in program.held
    ]
    return copied, held


def _returned(program: Program, more: Mapping[str, fx.Node]) -> None:
    """Let the graph return these fields too, or in place of those that it has."""
    output = next(node for node in reversed(program.graph.nodes) if node.op == "output")
    fields = pytree.tree_unflatten(list(output.args[0]), program.out_spec)
    leaves, program.out_spec = pytree.tree_flatten({**fields, **more})
    output.args = (tuple(leaves),)
