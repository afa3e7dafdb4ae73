"""Sites: the places of a Program that a spec can name, found in the data flow, not by model."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

from torch import fx

from peftc.graph.facts import Stacks
from peftc.graph.program import Columns, Program, aten, is_call, op_name, scope_of
from peftc.sites import dataflow as flow
from peftc.sites import fused
from peftc.sites.attention import Core, cores

# The anchors that are paths of a site's own parameters; others only help to find it.
ROLES = ("W", "b", "q", "o", "up", "gate", "down")


@dataclass(frozen=True)
class Site:
    """A place, named by what stays the same in every entry: parameter paths and the module path.

    `anchors` maps a role (`W` of a linear; `up`, `down` of a feed-forward; ...) to a weight path;
    `columns` is the slice of a fused projection; `dims` are the sizes that specs may use; `transposed`
    says that the linear which produces `h` stores its weight as [in, out] (GPT-2's Conv1D); `shared` names
    another op that reads its weight too (a tied embedding, a fused kernel); `kernel` is what a convolution's
    stored weight has behind its first axis, [channels / groups, *kernel].
    """

    at: str
    scope: str
    stack: str
    kind: str
    layer: int | None
    dims: Mapping[str, int] = field(hash=False)
    anchors: Mapping[str, str] = field(hash=False)
    columns: Columns | None = None
    transposed: bool = False
    shared: str = ""
    kernel: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.scope}:{self.at}"

    @property
    def weights(self) -> tuple[str, ...]:
        """The parameters that the site is made of."""
        return tuple(path for role, path in self.anchors.items() if role in ROLES)

    @property
    def group(self) -> str:
        """What `per: kind` shares over: the stack and the kind of attention."""
        return "_".join(part for part in (self.stack, self.kind) if part)


def find_sites(program: Program, stacks: Stacks) -> tuple[Site, ...]:
    """Every site of a `forward` Program, in graph order within each kind of site."""
    attention = [site for core in cores(program) for site in _attention(program, core, stacks)]
    taken = {site.anchors["W"] for site in attention if "W" in site.anchors}
    linears = [n for n in program.graph.nodes if is_call(n, *flow.LINEAR) and _weight(program, n)]
    own = {n for n in linears if _weight(program, n) in taken}
    ffn: list[Site] = []
    for node in linears:
        found = flow.feed_forward(node, own) if node not in own else None
        if found:
            ffn += _feed_forward(program, found, stacks)
    taken |= {site.anchors["W"] for site in ffn if "W" in site.anchors}
    everything = [*attention, *ffn]
    everything += [_linear(program, n, "linear", scope_of(n), stacks) for n in linears]
    everything += [
        _linear(program, n, "head", scope_of(n), stacks)
        for n in linears
        if _weight(program, n) not in taken and stacks.is_head(scope_of(n))
    ]
    everything += _by_weight(program, stacks)
    return tuple(_unique(everything))


def _unique(sites: list[Site]) -> Iterator[Site]:
    """A module that runs several times (shared layers) is one site."""
    seen: set[tuple[str, str, Columns | None]] = set()
    for site in sites:
        key = (site.at, site.scope, site.columns)
        if key not in seen:
            seen.add(key)
            yield site


def _weight(program: Program, linear: fx.Node) -> str | None:
    return program.parameter(flow.weight_of(linear))


def _layer(scope: str) -> int | None:
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", scope)
    return int(number[1]) if number else None


def _linear(
    program: Program,
    linear: fx.Node,
    at: str,
    scope: str,
    stacks: Stacks,
    kind: str = "",
    dims: Mapping[str, int] | None = None,
    columns: Columns | None = None,
) -> Site:
    n_in, n_out = flow.features(linear)
    if columns:
        n_out = columns.count
    bias = flow.bias_of(linear)
    anchors = {"W": _weight(program, linear) or ""}
    if bias is not None and program.parameter(bias):
        anchors["b"] = program.parameter(bias) or ""
    sizes = {**(dims or {}), "in": n_in, "out": n_out}
    sizes.setdefault("d", n_out)
    transposed = linear.target is aten.addmm.default
    layer, shared = _layer(scope), _shared(flow.weight_of(linear), flow.LINEAR)
    return Site(
        at, scope, stacks.of(scope), kind, layer, sizes, anchors, columns, transposed, shared
    )


def _shared(weight: fx.Node, own: tuple[Any, ...]) -> str:
    """The op outside `own` that reads this weight, if there is one."""
    return next((op_name(user) for user in weight.users if not is_call(user, *own)), "")


def _attention(program: Program, core: Core, stacks: Stacks) -> Iterator[Site]:
    sides = {side: flow.projections(getattr(core, side).node) for side in ("q", "k", "v")}
    out = flow.next_linear(core.h)
    if any(len(found) != 1 for found in sides.values()) or out is None:
        return
    q, k = sides["q"][0], sides["k"][0]
    same = q.args[flow.x_index(q)] is k.args[flow.x_index(k)]
    kind = "self" if same or q is k else "cross"
    heads, head_dim = flow.static_shape(core.q.node)[-3], flow.static_shape(core.q.node)[-1]
    kv_heads = flow.static_shape(core.k.node)[-3]
    dims = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim, "kv": kv_heads * head_dim}
    dims["value_dim"] = flow.static_shape(core.v.node)[
        -1
    ]  # MLA's values are narrower than its keys
    dims["d"] = flow.features(out)[1]
    scope, stack, layer = core.scope, stacks.of(core.scope), _layer(core.scope)
    weights = {"q": _weight(program, q) or "", "o": _weight(program, out) or ""}
    sizes = {**dims, "in": flow.features(q)[0], "out": flow.features(out)[1]}
    turned = out.target is aten.addmm.default
    yield Site("attention", scope, stack, kind, layer, sizes, weights, transposed=turned)
    yield Site("attention.heads", scope, stack, kind, layer, sizes, {"core": scope})
    first = {"input": weights["q"]}
    for side, (linear,) in sides.items():
        columns = fused.columns(getattr(core, side).node, linear)
        if columns is not None or len(set(sides.values())) == 3:
            site = _linear(program, linear, f"attention.{side}", scope, stacks, kind, dims, columns)
            yield replace(site, anchors={**site.anchors, **first})
    last = _linear(program, out, "attention.o", scope, stacks, kind, dims)
    yield replace(last, anchors={**last.anchors, **first})


def _feed_forward(program: Program, found: flow.FeedForward, stacks: Stacks) -> Iterator[Site]:
    names = {"up": _weight(program, found.up) or "", "down": _weight(program, found.down) or ""}
    parts = {"up": found.up, "down": found.down}
    if found.gate is not None:
        names["gate"] = _weight(program, found.gate) or ""
        parts["gate"] = found.gate
    scope = _common_scope([scope_of(node) for node in parts.values()])
    n_in, n_out = flow.features(found.up)[0], flow.features(found.down)[1]
    hidden = flow.features(found.down)[0]
    stack, layer = stacks.of(scope), _layer(scope)
    sizes = {"in": n_in, "out": n_out, "d": n_out}
    turned = found.down.target is aten.addmm.default
    yield Site("ffn", scope, stack, "", layer, sizes, names, transposed=turned)
    wide = {"in": hidden, "out": hidden, "d": n_out}
    yield Site("ffn.hidden", scope, stack, "", layer, wide, {"down": names["down"]})
    halves = fused.gated_halves(found.down, found.up) if found.gate is None else None
    for part, linear, columns in _parts(parts, halves):
        yield _linear(program, linear, f"ffn.{part}", scope, stacks, "", {"d": n_out}, columns)
        own = f"{scope_of(linear)}.{part}" if columns else scope_of(linear)
        yield _linear(program, linear, "ffn.linear", own, stacks, "", {"d": n_out}, columns)


def _parts(
    linears: Mapping[str, fx.Node], halves: tuple[Columns, Columns] | None
) -> Iterator[tuple[str, fx.Node, Columns | None]]:
    """(part, linear, its columns); `up` and `gate` may be halves of one linear."""
    if halves is None:
        yield from ((part, linear, None) for part, linear in linears.items())
    else:
        yield from zip(("up", "gate"), (linears["up"],) * 2, halves, strict=True)
        yield "down", linears["down"], None


def _common_scope(scopes: list[str]) -> str:
    split = [scope.split(".") for scope in scopes]
    shared = []
    for parts in zip(*split, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def _by_weight(program: Program, stacks: Stacks) -> Iterator[Site]:
    """Norms, token embeddings and convolutions: ops that own a parameter and stand alone."""
    for norm in flow.norms(program):
        anchors = {"W": program.parameter(norm.weight.node) or ""}
        if norm.bias is not None:
            anchors["b"] = program.parameter(norm.bias.node) or ""
        yield _owner(norm.h, "norm", anchors, stacks)
    for node in program.graph.nodes:
        if is_call(node, aten.embedding.default):
            weight, ids = program.parameter(node.args[0]), _token_input(program, node.args[1])
            if weight and ids:
                table, anchors = node.args[0], {"W": weight, "ids": ids}
                shared = _shared(table, (aten.embedding.default,))
                vocab = flow.static_shape(table)[0]
                yield _owner(node, "embedding", anchors, stacks, shared, vocab=vocab)
        elif flow.is_convolution(node) and _weight(program, node):
            yield _convolution(program, node, stacks)


def _convolution(program: Program, conv: fx.Node, stacks: Stacks) -> Site:
    """Its weight is a matrix [out, in], in = channels / groups * kernel: all that one output sees."""
    n_out, *kernel = flow.static_shape(flow.weight_of(conv))
    channels = flow.static_shape(conv.args[0])[-len(kernel)]  # type: ignore[arg-type]
    anchors = {"W": _weight(program, conv) or ""}
    scope = anchors["W"].rpartition(".")[0]  # Mamba calls it from outside its module
    if bias := program.parameter(flow.bias_of(conv)):
        anchors["b"] = bias
    dims = {"in": prod(kernel), "out": n_out, "d": n_out}
    dims |= {"channels": channels, "groups": channels // kernel[0]}
    shared, sizes = _shared(flow.weight_of(conv), flow.CONV), tuple(kernel)
    stack, layer = stacks.of(scope), _layer(scope)
    return Site("conv", scope, stack, "", layer, dims, anchors, shared=shared, kernel=sizes)


def _owner(
    node: fx.Node,
    at: str,
    anchors: Mapping[str, str],
    stacks: Stacks,
    shared: str = "",
    **more: int,
) -> Site:
    scope, size = scope_of(node), flow.static_shape(node)[-1]
    dims = {"in": size, "out": size, "d": size, **more}
    return Site(at, scope, stacks.of(scope), "", _layer(scope), dims, anchors, shared=shared)


def _token_input(program: Program, node: object) -> str | None:
    """The input of token ids that `node` is, moved at most."""
    while is_call(node, *flow.MOVE):
        assert isinstance(node, fx.Node)
        node = node.args[0]
    slot = program.slot(node) if isinstance(node, fx.Node) else None
    return slot.name if slot is not None and slot.name.endswith("input_ids") else None
