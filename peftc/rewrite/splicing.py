"""Splicing: one edit's expressions as nodes at one place of a graph.

All expressions of an edit read the ports as they were before it: `rewrite: {k: v, v: k}` swaps. Values are
computed in the widest type among the deltas and the ports that an edit reads, and what a port is assigned is
cast to the port's own type (float32 deltas train so on a bfloat16 backbone).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import reduce
from typing import Any

import torch
from torch import fx

from peftc.graph.program import Program, Read, Slot, Value, aten
from peftc.language.expr import Expr, Name, names
from peftc.language.ports import SITES, STORED
from peftc.plan.algebra import constant_parts, grown, growth, inlined, replaced, ungrown
from peftc.plan.edit import Edit
from peftc.rewrite.keys import extend_keys
from peftc.rewrite.lengths import release
from peftc.rewrite.lower import Builder, Operand
from peftc.rewrite.pipeline import PassError
from peftc.rewrite.routing import RoutedBuilder
from peftc.sites.site import Place
from peftc.sites.view import Part, Port, root, whole

Dtypes = Mapping[str, torch.dtype]


def splice(
    program: Program, edit: Edit, place: Place, shared: Builder, top: fx.Node, dtypes: Dtypes
) -> None:
    """Put what `edit` assigns in the place of its ports. What reads parameters alone is lowered before `top`,
    by `shared`, once for all edits that share it."""
    assigned = _assigned(edit, place)
    env = environment(program, edit, assigned.values(), dtypes)
    now = {name: _now(program, place.ports[name]) for name in _ports_read(assigned, place)}
    wide = _widest([*env.values(), *now.values()])
    made: list[tuple[Read | Value, fx.Node]] = []
    inserted: list[fx.Node] = []
    for name, expression in assigned.items():
        port = place.ports[name]
        with program.graph.inserting_before(top):
            hoisted = _hoist(expression, edit, env, shared, wide)
        builder = _builder(program, edit, place, name)
        builder.known = shared.known
        with program.graph.inserting_before(_anchor(program, port, now, expression)):
            if isinstance(builder, RoutedBuilder):
                stored = SITES[edit.site.at].having(*STORED)
                builder.see(
                    _now(program, place.ports[one]) for one in place.ports if one not in stored
                )
                builder.keep(
                    _now(program, place.ports[one]) for one in place.ports if one in stored
                )
                env = builder.learn(edit, env)
            seen = _seen(builder, edit, place, expression, name, now, wide)
            local = {k: _cast(builder, v, wide, k) for k, v in env.items()}
            result = builder.lower(hoisted, {**local, **seen}, name)
            if not isinstance(result, fx.Node):
                raise PassError(f"{edit.name}: '{name}' is assigned a number")
            own = _now(program, port)
            result = _cast(builder, result, own.meta["val"].dtype, name)
            if isinstance(builder, RoutedBuilder):
                part = port.view.read(builder.call, own, name) if isinstance(port, Part) else own
                result = builder.only(edit, result, part, name)
            if isinstance(port, Part):
                result = port.view.write(builder.call, own, result, name)
            elif result is not own and result not in builder.inserted:
                # The next edit here replaces this value, and not what it is another name of.
                result = builder.call(aten.alias.default, result, name=name)
        made.append((whole(port), result))
        inserted += builder.inserted
    for one, result in made:
        before = one.node if isinstance(one, Read) else program.current(one.node)
        if _grew(before, result):
            release(before, -2, [one.user] if isinstance(one, Read) else [*before.users])
        program.splice(one, result, inserted)
    if place.core is not None:
        for rows in growth(edit).values():
            follow = Builder(program.graph, label="prefix", tag="mask", known=shared.known)
            follow.edit = edit.key
            extend_keys(program, place.core, follow.call, rows)


def _grew(before: fx.Node, after: fx.Node) -> bool:
    """Whether rows were put in front of what had a length that is a number."""
    old, new = (one.meta["val"].shape for one in (before, after))
    return len(old) > 1 and isinstance(old[-2], int) and old[-2] != new[-2]


def _builder(program: Program, edit: Edit, place: Place, name: str) -> Builder:
    stack = root(place.ports[name]).meta.get("nn_module_stack")
    given = program.graph, program.training, edit.entry.method, edit.name, stack
    builder = RoutedBuilder(*given, routed=place.routed) if place.routed else Builder(*given)
    builder.axes = len(SITES[edit.site.at].shapes[name]) - 1
    builder.edit = edit.key
    return builder


def _assigned(edit: Edit, place: Place) -> dict[str, Expr]:
    """What the edit assigns here. Rows in front of the tokens are there once: later steps find them cached."""
    assigned = inlined(edit)[1]
    if place.holds:
        return assigned
    without = {port: ungrown(one) for port, one in assigned.items()}
    return {port: one for port, one in without.items() if one != Name(port)}


def _ports_read(assigned: Mapping[str, Expr], place: Place) -> list[str]:
    read = [name for one in assigned.values() for name in names(one) if name in place.ports]
    return list(dict.fromkeys(read))


def _now(program: Program, port: Port) -> fx.Node:
    """What a port, or the value that it is part of, is before the edit."""
    one = whole(port)
    return one.node if isinstance(one, Read) else program.current(one.node)


def _seen(
    builder: Builder,
    edit: Edit,
    place: Place,
    expression: Expr,
    name: str,
    now: Mapping[str, fx.Node],
    wide: torch.dtype,
) -> dict[str, Operand]:
    """The ports that an expression reads, as specs see them."""
    seen: dict[str, Operand] = {}
    for read in names(expression):
        if read in now:
            port, value = place.ports[read], now[read]
            if isinstance(port, Part):
                value = port.view.read(builder.call, value, read)
            seen[read] = _cast(builder, value, wide, read)
    rows = grown(expression, edit)
    if rows and place.behind is not None and name in seen:
        seen[name] = place.behind(builder.call, seen[name], rows)
    return seen


def _hoist(
    expression: Expr, edit: Edit, env: dict[str, Operand], shared: Builder, wide: torch.dtype
) -> Expr:
    """Lower what reads parameters alone at the top of the graph, once for all sites that share it."""
    shared.label = shared.tag = edit.entry.method
    shared.edit = edit.key
    found: dict[Expr, Name] = {}
    for part in constant_parts(expression, edit):
        found[part] = Name(f"constant {len(env)}")
        local = {name: _cast(shared, env[name], wide, name) for name in names(part)}
        env[found[part].id] = shared.lower(part, local, "constant")
    return replaced(expression, found)


def environment(
    program: Program, edit: Edit, expressions: Iterable[Expr], dtypes: Dtypes | None = None
) -> dict[str, Operand]:
    """What the names of the expressions stand for, but for ports: numbers and delta tensors."""
    env: dict[str, Operand] = {**edit.entry.arguments, **edit.site.dims}
    read = {name for one in expressions for name in names(one)}
    for parameter in edit.parameters:
        if parameter.name in read:
            label = re.sub(r"\W", "_", f"d_{parameter.path}")  # becomes an argument of the code
            node = program.placeholder(label, Slot("delta", parameter.path))
            if "val" not in node.meta:
                dtype = (dtypes or {}).get(parameter.path, program.dtype)
                node.meta["val"] = program.fake(parameter.shape, dtype)
            env[parameter.name] = node
    return env


def _anchor(program: Program, port: Port, now: Mapping[str, fx.Node], expression: Expr) -> fx.Node:
    """The node to insert before: the consumer of an operand; behind the last value that is read."""
    one = whole(port)
    if isinstance(one, Read):
        return one.user
    read = [now[name] for name in names(expression) if name in now]
    last: fx.Node = max([program.current(one.node), *read])
    return last.next


def _widest(values: Iterable[Any]) -> torch.dtype:
    """The floating type that all of these fit into."""
    nodes = [one for one in values if isinstance(one, fx.Node)]
    floats = [v.dtype for one in nodes if (v := one.meta["val"]).is_floating_point()]
    return reduce(torch.promote_types, floats) if floats else torch.get_default_dtype()


def _cast(builder: Builder, value: Any, dtype: torch.dtype, name: str) -> Any:
    """`value` in `dtype`, where it is a tensor of floating numbers of another type."""
    if not isinstance(value, fx.Node):
        return value
    tensor = value.meta["val"]
    if not tensor.is_floating_point() or tensor.dtype == dtype:
        return value
    return builder.call(aten.to.dtype, value, dtype, name=f"{name}_cast")
