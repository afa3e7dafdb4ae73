"""Insert: write a Plan's deltas into a Program's graph."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from peftc import dataflow as flow
from peftc.algebra import constant_parts, inlined, put, shape_of
from peftc.edit import Edit
from peftc.expr import Call, Expr, Name, names
from peftc.lower import Builder, Operand
from peftc.pipeline import PassError
from peftc.places import Ports, consumers, locate
from peftc.program import Port, Program, Read, Slot, Value, aten, is_call


@dataclass(frozen=True)
class Insert:
    """One delta after another, in the order of the plan: a later one sees what an earlier one made."""

    edits: tuple[Edit, ...]
    name: str = "insert"

    def run(self, program: Program) -> int:
        top = next(node for node in program.graph.nodes if node.op != "placeholder")
        shared = Builder(program.graph, program.training, memo={})
        count = 0
        for edit in self.edits:
            places = locate(program, edit.site)
            if not places:
                _must_be_absent(program, edit)
            for ports in places:
                _insert(program, edit, ports, shared, top)
                count += 1
        program.finish()
        return count


def _must_be_absent(program: Program, edit: Edit) -> None:
    """A site may be missing in one entry (no encoder while decoding), but only with its weights."""
    present = [w for w in edit.site.anchors.values() if consumers(program, w)]
    if present and edit.site.at != "attention.heads":
        raise PassError(f"{edit.name} has no place in '{program.entry}', yet it uses {present[0]}")


def _insert(program: Program, edit: Edit, ports: Ports, shared: Builder, top: fx.Node) -> None:
    env = _environment(program, edit, ports)
    for port, expression in inlined(edit)[1].items():
        place = ports[port]
        with program.graph.inserting_before(top):
            hoisted = _hoist(expression, edit, env, shared)
        stack = _first(place).meta.get("nn_module_stack")
        builder = Builder(program.graph, program.training, edit.entry.method, edit.name, stack)
        with program.graph.inserting_before(_anchor(program, place, ports, expression)):
            result = builder.lower(hoisted, env, port)
        if not isinstance(result, fx.Node):
            raise PassError(f"{edit.name}: '{port}' is assigned a number")
        program.splice(place, result, builder.inserted)
        if isinstance(place, Value):
            env[port] = result
        if port == "k":
            extend_mask(program, ports, _added_keys(expression, edit))


def _hoist(expression: Expr, edit: Edit, env: dict[str, Operand], shared: Builder) -> Expr:
    """Lower what reads parameters alone at the top of the graph, once for all sites that share it."""
    shared.label = shared.tag = edit.entry.method
    found: dict[Expr, Name] = {}
    for i, part in enumerate(constant_parts(expression, edit)):
        found[part] = Name(f"constant {i}")
        env[f"constant {i}"] = shared.lower(part, env, "constant")
    return put(expression, found)


def _environment(program: Program, edit: Edit, ports: Ports) -> dict[str, Operand]:
    """What the names of the expressions stand for here: ports, numbers and delta tensors."""
    env: dict[str, Operand] = {**edit.entry.arguments, **edit.site.dims}
    for name, port in ports.items():
        env[name] = program.current(port.node) if isinstance(port, Value) else port.node
    for parameter in edit.parameters:
        label = "d_" + parameter.path.replace(".", "_")
        env[parameter.name] = program.placeholder(label, Slot("delta", parameter.path))
    return env


def _first(place: Port) -> fx.Node:
    return place.user if isinstance(place, Read) else place.node


def _anchor(program: Program, place: Port, ports: Ports, expression: Expr) -> fx.Node:
    """The node to insert before: the consumer of an operand; behind the last value that is read."""
    if isinstance(place, Read):
        return place.user
    read = [program.current(place.node)]
    for name in names(expression):
        if name in ports:
            port = ports[name]
            read.append(program.current(port.node) if isinstance(port, Value) else port.node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return max(read, key=order.__getitem__).next


def _added_keys(expression: Expr, edit: Edit) -> int:
    """How many keys a rewrite of `k` puts before those of the context."""
    if not isinstance(expression, Call) or expression.op != "prepend":
        return 0
    rows, keys = expression.args
    return int(shape_of(rows, edit)[-2]) + _added_keys(keys, edit)


def extend_mask(program: Program, ports: Ports, length: int) -> None:
    """Let every query see `length` more keys in front; the other keys keep their mask."""
    if not length:
        return
    if "mask" in ports:
        place = ports["mask"]
        assert isinstance(place, Read)
        place.user.update_arg(place.index, _padded(program, place, length))
        return
    keys = ports["k"]
    assert isinstance(keys, Read)
    if is_call(keys.user, flow.SDPA) and len(keys.user.args) > 5 and keys.user.args[5]:
        _explicit_causal(program, keys.user, length)


def _padded(program: Program, place: Read, length: int) -> fx.Node:
    """The mask with `length` visible keys on its left: True, or 0 for an additive one."""
    mask = place.node
    for user in mask.users:
        if user.meta.get("extends") == length:
            return user
    visible = True if mask.meta["val"].dtype == torch.bool else 0.0
    with program.graph.inserting_before(mask.next):
        wide = program.graph.create_node(
            "call_function",
            aten.constant_pad_nd.default,
            (mask, [length, 0], visible),
            {},
            "prefix_mask",
        )
    wide.meta.update(extends=length, delta="mask", val=mask.meta["val"])
    return wide


def _explicit_causal(program: Program, sdpa: fx.Node, length: int) -> None:
    """`is_causal` aligns at the top left, so with keys in front it must become a mask [queries, keys]."""
    query, keys = sdpa.args[0], sdpa.args[1]
    builder = Builder(program.graph, label="prefix", tag="mask")
    with program.graph.inserting_before(sdpa):
        rows = builder.call(aten.sym_size.int, query, -2, name="queries")
        columns = builder.call(aten.sym_size.int, keys, -2, name="keys")
        device = query.meta["val"].device  # type: ignore[union-attr]
        ones = builder.call(
            aten.ones.default, [rows, columns], dtype=torch.bool, device=device, name="ones"
        )
        mask = builder.call(aten.tril.default, ones, length, name="causal_mask")
    sdpa.update_arg(3, mask)
    sdpa.update_arg(5, False)
