"""Layers: a graph cut where the layers of its model begin and end, and each region run as the forward of its layer.

Whatever hooks modules (sharding, offloading, checkpointing, a user's hook) then sees the layers that it knows. The
order of the nodes stays, and with it every number, dropout's too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

from torch import fx, nn

from peftc.graph.code import function_of
from peftc.graph.program import Program

# The argument by which a layer is given what it runs; its own code never sees it.
REGION = "peftc_region"


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """The layers of a model by their paths: the elements of its lists of modules, outermost lists first."""
    found: dict[str, nn.Module] = {}
    for path, module in model.named_modules():
        inside = any(path.startswith(f"{layer}.") for layer in found)
        if isinstance(module, nn.ModuleList) and not inside:
            found |= {f"{path}.{i}": one for i, one in enumerate(module)}
    return found


def outside(model: nn.Module, paths: Iterable[str]) -> dict[str, nn.Module]:
    """Of the modules at these paths, those without modules of their own that stand in no layer: an embedding, a last
    norm, a head. As a layer's, their nodes are one region."""
    layers = layers_of(model)
    found = {}
    for path in paths:
        module = submodule(model, path)
        inside = any(f"{path}.".startswith(f"{layer}.") for layer in layers)
        if path and not inside and not module._modules:
            found[path] = module
    return found


def submodule(root: nn.Module, path: str) -> nn.Module:
    """As torch's `get_submodule`, for modules of any name: one called `half` is no method."""
    module = root
    for name in path.split(".") if path else ():
        module = module._modules[name]  # type: ignore[assignment]
    return module


class Forward:
    """A layer's forward that runs a region where it is given one, and the layer's own code where it is not."""

    def __init__(self, layer: nn.Module) -> None:
        self._layer = ref(layer)  # the layer holds this

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        region = kwargs.pop(REGION, None)
        if region is not None:
            return region(*args)
        layer: Any = self._layer()
        return type(layer).forward(layer, *args, **kwargs)

    def __reduce__(self) -> Any:
        return Forward, (self._layer(),)


def lend(layers: Mapping[str, nn.Module]) -> None:
    """Let these layers run regions."""
    for layer in layers.values():
        name = _inner(layer)
        if not isinstance(vars(layer).get(name), Forward):
            layer.__dict__[name] = Forward(layer)


def take_back(model: nn.Module) -> None:
    """Leave the layers of a model as they were."""
    for module in model.modules():
        name = _inner(module)
        if isinstance(vars(module).get(name), Forward):
            del module.__dict__[name]
            if name != "forward":
                module.__dict__[name] = type(module).forward.__get__(module)


def _inner(module: nn.Module) -> str:
    """The attribute that is a module's own forward: accelerate puts one of its hook's in front."""
    return "_old_forward" if "_old_forward" in vars(module) else "forward"


@dataclass(frozen=True)
class Region:
    """A run of nodes of one layer, or of none (`layer` is ""). `code` takes the values of `reads`, in this order,
    then the stored tensors at `own` (places among a Program's stored slots), and gives those of `gives`.

    Values are numbered: first the placeholders of the Program in order, then what regions give. `drops` are those
    that no later region reads.
    """

    layer: str
    code: Callable[..., Any]
    reads: tuple[int, ...]
    own: tuple[int, ...]
    gives: tuple[int, ...]
    drops: tuple[int, ...] = ()


@dataclass(frozen=True)
class Cut:
    """A Program as regions in order, and what it returns: the numbers of values, or constants as they are."""

    regions: tuple[Region, ...]
    returns: tuple[int | _Constant, ...]


@dataclass(frozen=True)
class _Constant:
    value: Any


def cut(program: Program, layers: Mapping[str, nn.Module]) -> Cut:
    """The regions of a Program whose layers stand at these paths."""
    nodes = list(program.graph.nodes)
    placeholders = [node for node in nodes if node.op == "placeholder"]
    numbers = {node: i for i, node in enumerate(placeholders)}
    stored = [node for node in placeholders if program.slots[node.name].kind != "input"]
    at = {node: i for i, node in enumerate(stored)}
    regions: list[Region] = []
    for layer, part in _parts(program, layers):
        inside = set(part)
        read = [n for n in _operands(part) if n not in inside]
        own = [n for n in read if _belongs(program, n, layer)]
        given = [n for n in part if any(user not in inside for user in n.users)]
        # A layer takes its states first, as they are what it reads first, and gives them first, as its last result.
        given.reverse()
        passed = sorted((n for n in read if n not in own), key=lambda n: n.op == "placeholder")
        for node in reversed(given):
            numbers[node] = len(numbers)
        regions.append(
            Region(
                layer,
                _code(program, part, (*passed, *own), given),
                tuple(numbers[n] for n in passed),
                tuple(at[n] for n in own),
                tuple(numbers[n] for n in given),
            )
        )
    results: Any = next(node for node in nodes if node.op == "output").args[0]
    returns = tuple(numbers[one] if isinstance(one, fx.Node) else _Constant(one) for one in results)
    return Cut(tuple(_dropping(regions, returns)), returns)


def _parts(
    program: Program, layers: Mapping[str, nn.Module]
) -> Iterator[tuple[str, list[fx.Node]]]:
    """Runs of nodes of one call of a layer. What stands between two of its nodes and is of no layer goes with
    them; the rest is of none."""
    layer, part, loose = None, list[fx.Node](), list[fx.Node]()
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        mine = _layer(node, layers)
        if mine is None:
            loose.append(node)
        elif mine == layer:
            part += [*loose, node]
            loose = []
        else:
            if layer is not None:
                yield layer[0], part
            if loose:
                yield "", loose
            layer, part, loose = mine, [node], []
    if layer is not None:
        yield layer[0], part
    if loose:
        yield "", loose


def _layer(node: fx.Node, layers: Mapping[str, nn.Module]) -> tuple[str, str] | None:
    """The outermost layer that a node was traced in, and which of its calls."""
    for key, (path, _) in node.meta.get("nn_module_stack", {}).items():
        name = path.partition(".")[2].partition("@")[0]
        if name in layers:
            return name, key
    return None


def _operands(part: Sequence[fx.Node]) -> list[fx.Node]:
    return list(dict.fromkeys(n for node in part for n in node.all_input_nodes))


def _belongs(program: Program, node: fx.Node, layer: str) -> bool:
    """Whether a placeholder is a weight of that layer, or of none: it may be there only while the region runs."""
    slot = program.slot(node)
    of_backbone = slot is not None and slot.kind in ("parameter", "buffer")
    return of_backbone and (not layer or slot.name.startswith(f"{layer}."))  # type: ignore[union-attr]


def _code(
    program: Program, part: Sequence[fx.Node], taken: Sequence[fx.Node], given: Sequence[fx.Node]
) -> Callable[..., Any]:
    """A function of `taken` that gives the one value of `given`, or all as a tuple."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in taken}
    for node in part:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    results = tuple(copies[node] for node in given)
    graph.output(results[0] if len(results) == 1 else results)
    return function_of(program.root, graph)


def _dropping(regions: Sequence[Region], returns: Sequence[Any]) -> Iterator[Region]:
    """The regions, each with the values that it is the last to read."""
    last = {number: i for i, one in enumerate(regions) for number in (*one.reads, *one.gives)}
    kept = set(returns)
    for i, one in enumerate(regions):
        over = tuple(n for n, at in last.items() if at == i and n not in kept)
        yield Region(one.layer, one.code, one.reads, one.own, one.gives, over)
