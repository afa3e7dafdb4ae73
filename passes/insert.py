"""Insert: write a Plan's deltas into a Program's graph."""

from __future__ import annotations

import operator
import sys
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import fx

from peftc.graph.program import Keys, Part, Port, Program, Read, Slot, Value, aten, is_call
from peftc.language.expr import Expr, Name, names, substitute
from peftc.language.ports import SITES
from peftc.plan.algebra import constant_parts, grown, inlined, replaced, ungrown
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder, Operand
from peftc.rewrite.pipeline import PassError
from peftc.sites.attention import FILL, SDPA
from peftc.sites.locate import Place, Ports, locate, weights_used


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
            for place in places:
                _insert(program, edit, place, shared, top)
                count += 1
        _penalize(program, self.edits, shared)
        program.finish()
        return count


def _must_be_absent(program: Program, edit: Edit) -> None:
    """A site may be missing in one entry (no encoder while decoding), but only with its weights."""
    if edit.site.at == "embedding":
        read = {edit.site.anchors["ids"], edit.site.anchors["ids"].replace("_ids", "s_embeds")}
        present = sorted(read & program.inputs)
    else:
        present = weights_used(program, edit.site)
    if present:
        raise PassError(f"{edit.name} has no place in '{program.entry}', yet it uses {present[0]}")


def _insert(program: Program, edit: Edit, where: Place, shared: Builder, top: fx.Node) -> None:
    ports, assigned = where.ports, _assigned(program, edit)
    env = _environment(program, edit, assigned.values())
    for port, expression in assigned.items():
        place = ports[port]
        with program.graph.inserting_before(top):
            hoisted = _hoist(expression, edit, env, shared)
        stack = root(place).meta.get("nn_module_stack")
        builder = Builder(program.graph, program.training, edit.entry.method, edit.name, stack)
        builder.axes = len(SITES[edit.site.at].shapes[port]) - 1
        with program.graph.inserting_before(_anchor(program, place, ports, expression)):
            read = {name: ports[name] for name in names(expression) if name in ports}
            env |= {name: take(builder, program, one, name) for name, one in read.items()}
            if edit.site.at == "embedding":
                _make_room(builder, env, grown(expression, edit))
            result = builder.lower(hoisted, env, port)
            if not isinstance(result, fx.Node):
                raise PassError(f"{edit.name}: '{port}' is assigned a number")
            if isinstance(place, Part):
                result = put(builder, program, place, result, port)
        whole = place.whole if isinstance(place, Part) else place
        if isinstance(whole, Read) and program.parameter(whole.node):
            result.meta["parameter"] = program.parameter(whole.node)
        program.splice(whole, result, builder.inserted)
        length = grown(expression, edit) if port == "k" else 0
        if length and where.keys is not None:
            extend_keys(program, root(ports["h"]), where.keys, length)


def _assigned(program: Program, edit: Edit) -> dict[str, Expr]:
    """What the edit assigns here. Rows in front of the tokens are there once: later steps find them cached."""
    assigned = inlined(edit)[1]
    if edit.site.at != "embedding" or edit.site.anchors["ids"] in program.wide:
        return assigned
    without = {port: ungrown(one) for port, one in assigned.items()}
    return {port: one for port, one in without.items() if one != Name(port)}


def _make_room(builder: Builder, env: dict[str, Operand], rows: int) -> None:
    """Leave out the embeddings of the ids that keep the place of the rows in front."""
    if rows:
        h = env["h"]
        env["h"] = builder.call(aten.slice.Tensor, h, -2, rows, sys.maxsize, name="tokens")


def _penalize(program: Program, edits: tuple[Edit, ...], shared: Builder) -> None:
    """Add the penalties of all edits to the loss, while training and where there is one."""
    place = program.output("loss")
    penalized = [edit for edit in edits if edit.entry.penalty is not None]
    if place is None or not program.training or not penalized:
        return
    loss = place.node
    with program.graph.inserting_before(place.user):
        for edit in penalized:
            shared.label = shared.tag = edit.entry.method
            assert edit.entry.penalty is not None
            penalty = substitute(edit.entry.penalty, inlined(edit)[0])
            term = shared.lower(penalty, _environment(program, edit, [penalty]), "penalty")
            loss = shared.call(aten.add.Tensor, loss, term, name="loss")
    outputs = list(place.user.args[0])  # type: ignore[arg-type]
    outputs[place.index] = loss
    place.user.args = (tuple(outputs),)


def root(port: Port) -> fx.Node:
    """The node that a port belongs to: the consumer of an operand, the producer of a result."""
    whole = port.whole if isinstance(port, Part) else port
    return whole.user if isinstance(whole, Read) else whole.node


def take(builder: Builder, program: Program, port: Port, name: str) -> fx.Node:
    """The value of a port as it is now."""
    if isinstance(port, Value):
        return program.current(port.node)
    if isinstance(port, Read):
        return port.node
    value = take(builder, program, port.whole, name)
    form = port.form
    if form is not None:
        value = builder.call(form.op, value, *form.args, name=f"{name}_{form.name}")
    if port.columns is None:
        return value
    one, axis = port.columns, _inner(port.axis)
    if one.groups == 1:
        return builder.call(aten.slice.Tensor, value, port.axis, one.start, one.stop, name=name)
    split = [one.groups, one.period]
    groups = builder.call(aten.unflatten.int, value, port.axis, split, name=f"{name}_groups")
    mine = builder.call(aten.slice.Tensor, groups, axis, one.start, one.stop, name=f"{name}_mine")
    return builder.call(aten.flatten.using_ints, mine, *_axes(port.axis), name=name)


def put(builder: Builder, program: Program, port: Part, new: fx.Node, name: str) -> fx.Node:
    """What the whole becomes when this part of it becomes `new`."""
    one, axis, form = port.columns, _inner(port.axis), port.form
    whole = take(builder, program, replace(port, columns=None), name) if one else new
    if one is None:
        full = new
    elif one.groups == 1:
        full = builder.call(
            aten.slice_scatter.default,
            whole,
            new,
            port.axis,
            one.start,
            one.stop,
            name=f"{name}_put",
        )
    else:
        split = [one.groups, one.period]
        groups = builder.call(aten.unflatten.int, whole, port.axis, split, name=f"{name}_groups")
        split = [one.groups, one.stop - one.start]
        mine = builder.call(aten.unflatten.int, new, port.axis, split, name=f"{name}_mine")
        both = builder.call(
            aten.slice_scatter.default, groups, mine, axis, one.start, one.stop, name=f"{name}_put"
        )
        full = builder.call(aten.flatten.using_ints, both, *_axes(port.axis), name=f"{name}_whole")
    if form is not None:
        full = builder.call(form.inverse, full, *form.inverse_args, name=f"{name}_back")
    return full


def _axes(axis: int) -> tuple[int, int]:
    """The two axes that an axis becomes when it is unflattened."""
    return (-2, -1) if axis == -1 else (0, 1)


def _inner(axis: int) -> int:
    return _axes(axis)[1]


def _hoist(expression: Expr, edit: Edit, env: dict[str, Operand], shared: Builder) -> Expr:
    """Lower what reads parameters alone at the top of the graph, once for all sites that share it."""
    shared.label = shared.tag = edit.entry.method
    found: dict[Expr, Name] = {}
    for i, part in enumerate(constant_parts(expression, edit)):
        found[part] = Name(f"constant {i}")
        env[f"constant {i}"] = shared.lower(part, env, "constant")
    return replaced(expression, found)


def _environment(program: Program, edit: Edit, expressions: Iterable[Expr]) -> dict[str, Operand]:
    """What the names of the expressions stand for, but for ports: numbers and delta tensors."""
    env: dict[str, Operand] = {**edit.entry.arguments, **edit.site.dims}
    read = {name for one in expressions for name in names(one)}
    for parameter in edit.parameters:
        if parameter.name in read:
            label = "d_" + parameter.path.replace(".", "_")
            env[parameter.name] = program.placeholder(label, Slot("delta", parameter.path))
    return env


def _anchor(program: Program, place: Port, ports: Ports, expression: Expr) -> fx.Node:
    """The node to insert before: the consumer of an operand; behind the last value that is read."""
    whole = place.whole if isinstance(place, Part) else place
    if isinstance(whole, Read):
        return whole.user
    read = [program.current(whole.node)]
    for name in names(expression):
        if name in ports:
            port = ports[name]
            one = port.whole if isinstance(port, Part) else port
            read.append(program.current(one.node) if isinstance(one, Value) else one.node)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return max(read, key=order.__getitem__).next


def extend_keys(program: Program, core: fx.Node, keys: Keys, length: int) -> None:
    """Let every query see `length` more keys in front; the other keys keep their mask."""
    for mask in keys.masks:
        mask.user.update_arg(mask.index, _padded(program, mask, length))
    if not keys.masks and is_call(core, SDPA) and len(core.args) > 5 and core.args[5]:
        _explicit_causal(program, core, length)
    for view, place in keys.sized:
        _resize(program, view, place, length)


def _resize(program: Program, view: fx.Node, place: int, length: int) -> None:
    """Add to one of the sizes that a view is given; -1 and an int follow by themselves or stay."""
    sizes = list(view.args[1])  # type: ignore[arg-type]
    old = sizes[place]
    if isinstance(old, fx.Node):
        with program.graph.inserting_before(view):
            size = program.graph.call_function(operator.add, (old, length))
        size.meta["delta"] = "keys"
        sizes[place] = size
        view.update_arg(1, sizes)


def _padded(program: Program, place: Read, length: int) -> fx.Node:
    """The mask with `length` visible keys on its left: 0 where it is added, True or False by its op."""
    mask, value = place.node, place.node.meta["val"]
    if value.shape[-1] == 1:
        return mask
    visible = 0.0 if value.dtype != torch.bool else not is_call(place.user, *FILL)
    for user in mask.users:
        if user.meta.get("extends") == (length, visible):
            return user
    with program.graph.inserting_before(mask.next):
        wide = program.graph.create_node(
            "call_function",
            aten.constant_pad_nd.default,
            (mask, [length, 0], visible),
            {},
            "prefix_mask",
        )
    wide.meta.update(extends=(length, visible), delta="mask", val=value)
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
