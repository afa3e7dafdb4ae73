"""Held: rows of a prefix that a cache can hold are found, so that no step but the first puts them there."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from peftc.graph.aten import static_shape
from peftc.graph.cache import CacheSlot
from peftc.graph.program import Held, Program, aten, is_call
from peftc.rewrite.constants import alone

_KEYS = (-2, 2)  # the axis of keys in [batch, heads, keys, head_dim]


@dataclass(frozen=True)
class HeldRows:
    """A step with a cache puts the prefix in front of all keys anew, though nothing of it changed: a copy of the cache for
    each key and value. The graph stays; `peftc.model.running` makes two of it, one that gives what it concatenated
    and one that takes it (`peftc.rewrite.held`)."""

    name: str = "held"

    def run(self, program: Program) -> int:
        program.held = ()
        if program.entry != "decode" or program.training:
            return 0
        constant = alone(program)
        found = [
            held
            for node in program.graph.find_nodes(op="call_function", target=aten.cat.default)
            if "delta" in node.meta and (held := _held(program, node, constant)) is not None
        ]
        program.held = tuple(found)
        return len(found)


def _held(program: Program, wide: fx.Node, constant: dict[fx.Node, None]) -> Held | None:
    """The prefix that `wide` puts in front of the keys or the values of a cache, if that is all that reads them."""
    parts: list[fx.Node] = wide.args[0]  # type: ignore[assignment]
    if wide.args[1:] not in [(axis,) for axis in _KEYS] or len(parts) != 2:
        return None
    rows, keys = parts
    prefix: fx.Node = rows.args[0]  # type: ignore[assignment]
    if not is_call(rows, aten.expand.default) or prefix not in constant:
        return None
    past = keys
    if is_call(keys, aten.cat.default) and keys.args[1:] in [(axis,) for axis in _KEYS]:
        past = keys.args[0][0]  # type: ignore[index, assignment]
    slot = program.slot(past)
    read = None if slot is None or slot.kind != "input" else CacheSlot.read(slot.name)
    if slot is None or read is None or read.cross is not (past is keys):
        return None
    given = program.output(slot.name)
    if past is not keys and (given is None or given.node is not keys):
        return None
    known = {keys, wide, given.user if given is not None else wide}
    readers = {*past.users, *keys.users} - known
    if not all(is_call(user, aten.sym_size.int) for user in readers):
        return None
    return Held(slot.name, wide, past, keys, prefix, static_shape(prefix)[-2])
