"""Running: a Program on the tensors that a module tree holds now."""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from peftc.graph.capture import TRACING
from peftc.graph.layers import REGION, Cut, Region, cut, submodule
from peftc.graph.placement import hook_of, present
from peftc.graph.program import Program, behind
from peftc.graph.state import readable, traced
from peftc.rewrite.constants import Split, split
from peftc.rewrite.held import filling, holding

# Where a tensor lives: the dict of a module's parameters or buffers, and its name there.
Place = tuple[dict[str, Any], str]
_VERSION = operator.attrgetter("_version")
# Steps of optimizers in this process: torch counts no version where a fused one, Trainer's default, writes.
_STEPS = itertools.count(1)
_stepped = 0


def _step(*_: Any) -> None:
    global _stepped
    _stepped = next(_STEPS)


register_optimizer_step_post_hook(_step)


def run_program(
    model: nn.Module,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    by: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Run a graph (`by` an interpreter, or code, of it) on the tensors that `model`, compiled or plain, holds now."""
    stored = [registry[name] for registry, name in places(program, roots_of(model))]
    return program.structured((by or program.code())(*_arguments(program, stored, inputs)))


def roots_of(model: nn.Module) -> dict[str, nn.Module]:
    """The module tree that each kind of stored slot is looked up in."""
    deltas = model._modules.get("deltas") or model
    return {"parameter": model, "buffer": model, "delta": deltas}


def places(program: Program, roots: Mapping[str, nn.Module]) -> list[Place]:
    """Where the stored slots of a Program are, in order."""
    return [
        (program.constants, slot.name)
        if slot.kind == "constant"
        else place(roots[slot.kind], slot.name)
        for slot in program.order()
        if slot.kind != "input"
    ]


def place(root: nn.Module, path: str) -> Place:
    """Where the tensor at a path is held now."""
    owner, _, name = path.rpartition(".")
    module = submodule(root, owner)
    for registry in (module._parameters, module._buffers, vars(module)):
        if name in registry:
            return registry, name
    raise AttributeError(f"{type(module).__name__} '{owner}' has no tensor '{name}' any more")


def _arguments(
    program: Program, stored: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
) -> list[torch.Tensor]:
    rest = iter(stored)
    return [inputs[s.name] if s.kind == "input" else next(rest) for s in program.order()]


class Runner:
    """A Program with its slots found in the registries of one model.

    Slots are found once, and again when the model has changed; tensors are fetched at each call. What inserted
    nodes compute of parameters alone is, in evaluation without gradients, computed once, and again when one of
    these parameters is another tensor, was written to, an optimizer has stepped, or the model has changed. torch
    counts no write through `.data`: after one, switch the mode.
    """

    def __init__(self, program: Program, roots: Mapping[str, nn.Module]) -> None:
        self.program = program
        self._roots = roots
        self._names = [s.name if s.kind == "input" else None for s in program.order()]
        self.fields = flat_fields(program)
        self._places: list[Place] = []
        self._changes = -1
        self._known: _Known | None = None
        self._cuts: dict[tuple[str, ...], Cut] = {}
        self._owners: dict[int, list[nn.Module]] = {}

    @cached_property
    def whole(self) -> Callable[..., Any]:
        return self.program.code()

    @cached_property
    def _split(self) -> Split | None:
        """The graph in two, for evaluation; made when it is first evaluated so."""
        return None if self.program.training else split(self.program)

    def fetch(self, changes: int) -> list[torch.Tensor]:
        """The stored tensors as they are now; `changes` counts how often the model changed."""
        if self._changes != changes:
            self._places = places(self.program, self._roots)
            self._changes, self._known = changes, None
            self._owners.clear()
        return [registry[name] for registry, name in self._places]

    @cached_property
    def _steps(self) -> Steps | None:
        """The graphs of steps whose prefix a cache holds."""
        return Steps(self.program, self._roots) if self.program.held else None

    def forget(self) -> None:
        """Compute constants anew."""
        self._known = None
        if (steps := vars(self).get("_steps")) is not None:
            steps.forget()

    def run(
        self, stored: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """The fields of the output, of what `fetch` gave and the inputs."""
        if not torch.is_grad_enabled() and self._steps is not None and not traced():
            return self._steps.run(stored, inputs)
        parts = None if torch.is_grad_enabled() else self._split
        computed = None if parts is None else self._computed(parts, stored)
        if parts is not None and computed is not None:
            rest = [stored[i] for i in parts.keeps]
            given = [inputs[name] for name in parts.inputs]
            return self._fields(parts.rest(*rest, *given, *computed))
        left = iter(stored)
        arguments = [next(left) if name is None else inputs[name] for name in self._names]
        return self._fields(self.whole(*arguments))

    def run_layers(
        self,
        stored: Sequence[torch.Tensor],
        inputs: Mapping[str, torch.Tensor],
        layers: Mapping[str, nn.Module],
        recompute: Callable[[str], Callable[..., Any] | None],
    ) -> dict[str, Any]:
        """As `run`, each region as the forward of its layer, whose weights are fetched while it runs. `recompute`
        gives for a layer what runs it twice to save memory, or None."""
        key = tuple(layers)
        if key not in self._cuts:
            self._cuts[key] = cut(self.program, layers)
        pieces = self._cuts[key]
        left = iter(stored)
        first = [next(left) if name is None else inputs[name] for name in self._names]
        values: dict[int, Any] = dict(enumerate(first))
        for region in pieces.regions:
            arguments = [values[n] for n in region.reads]
            code = functools.partial(self._code, region)
            if region.layer:
                again = recompute(region.layer)
                code = code if again is None else functools.partial(again, code)
                results = nn.Module.__call__(layers[region.layer], *arguments, **{REGION: code})
            else:
                results = code(*arguments)
            several = results if len(region.gives) != 1 else (results,)
            values.update(zip(region.gives, several, strict=True))
            for number in region.drops:
                del values[number]
        returned = [values[one] if isinstance(one, int) else one.value for one in pieces.returns]
        return self._fields(returned)

    def _code(self, region: Region, *arguments: Any) -> Any:
        """A region on the values that it is given and its own weights as they are now."""
        with present(self._placed(region)) as moved:
            with TRACING:
                own = [registry[name] for registry, name in (self._places[i] for i in region.own)]
            return region.code(*moved(arguments), *own)

    def _placed(self, region: Region) -> list[nn.Module]:
        """The modules whose weights a region reads and accelerate places, but its layer, which is hooked itself."""
        if id(region) not in self._owners:
            slots = [slot for slot in self.program.order() if slot.kind != "input"]
            paths = dict.fromkeys(slots[i].name.rpartition(".")[0] for i in region.own)
            root = self._roots["parameter"]
            owners = [submodule(root, path) for path in paths if path != region.layer]
            self._owners[id(region)] = [one for one in owners if hook_of(one) is not None]
        return self._owners[id(region)]

    def _fields(self, results: Any) -> dict[str, Any]:
        if self.fields is None:
            return self.program.structured(results)
        return dict(zip(self.fields, results, strict=True))

    def _computed(
        self, parts: Split, stored: Sequence[torch.Tensor]
    ) -> Sequence[torch.Tensor] | None:
        """What the head computes; None where it may not be kept."""
        if traced():
            return None
        reads, known = [stored[i] for i in parts.reads], self._known
        if known is not None and known.seen.holds(reads):  # these were settled then
            return known.values
        if not _settled(reads):
            return None
        known = _Known.of(parts, reads)
        self._known = known  # whole, for another thread may read it at once
        return known.values


@dataclass(frozen=True)
class _Seen:
    """Tensors in a version, under a rule of precision: of equal ones the same is computed."""

    tensors: list[torch.Tensor]
    versions: list[int]
    pointers: list[int]
    steps: int
    rule: tuple[Any, ...]

    @staticmethod
    def of(tensors: list[torch.Tensor]) -> _Seen:
        return _Seen(
            tensors,
            list(map(_VERSION, tensors)),
            list(map(torch.Tensor.data_ptr, tensors)),
            _stepped,
            _rule(tensors[0].device.type),
        )

    def holds(self, tensors: list[torch.Tensor]) -> bool:
        """Whether `tensors` are these, as they were."""
        return (
            all(map(operator.is_, self.tensors, tensors))
            and self.versions == list(map(_VERSION, tensors))
            and self.pointers == list(map(torch.Tensor.data_ptr, tensors))
            and self.steps == _stepped
            and self.rule == _rule(tensors[0].device.type)
        )


@dataclass(frozen=True)
class _Known:
    """What was computed, and of what."""

    seen: _Seen
    values: Sequence[torch.Tensor]

    @staticmethod
    def of(parts: Split, tensors: list[torch.Tensor]) -> _Known:
        # Seen before they are read: a write meanwhile makes it another version.
        return _Known(_Seen.of(tensors), parts.head(*tensors))


class Steps:
    """A step with a cache in two graphs: the first puts a prefix in front of the keys and values that it is given, the
    other goes on from those that it gave.

    What a cache gets are views of the tokens behind the prefix, so that whoever reads, reorders or cuts a cache sees
    tokens alone; of a view that comes back as it was, the whole is known. It is used while the prefix is the same.
    """

    def __init__(self, program: Program, roots: Mapping[str, nn.Module]) -> None:
        self._first, self._next = Runner(filling(program), roots), Runner(holding(program), roots)
        self._rows = {one.name: one.rows for one in program.held}
        stored = [slot for slot in program.order() if slot.kind != "input"]
        at = {slot: i for i, slot in enumerate(stored)}
        self._takes = [
            [at[slot] for slot in one.program.order() if slot.kind != "input"]
            for one in (self._first, self._next)
        ]
        made_of = {node for one in program.held for node in behind(one.prefix)}
        self._reads = sorted(at[program.slots[n.name]] for n in made_of if n.op == "placeholder")
        self._wholes: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def forget(self) -> None:
        """Compute constants anew, and put the prefix anew in front of what caches hold."""
        self._wholes = WeakTensorKeyDictionary()
        self._first.forget()
        self._next.forget()

    def run(
        self, stored: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """The fields of the output."""
        prefix = [stored[i] for i in self._reads]
        known = [self._wholes.get(inputs[name]) for name in self._rows]  # type: ignore[no-untyped-call]
        seen: _Seen | None = known[0][1] if known[0] is not None else None
        held = seen is not None and all(one is not None and one[1] is seen for one in known)
        if held and seen is not None and seen.holds(prefix):
            given = dict(inputs) | {n: one[0] for n, one in zip(self._rows, known, strict=True)}
            fields = self._next.run([stored[i] for i in self._takes[1]], given)
        else:
            seen = _Seen.of(prefix) if _settled(prefix) else None
            fields = self._first.run([stored[i] for i in self._takes[0]], inputs)
        for name, rows in self._rows.items():
            whole = fields[name]
            fields[name] = tokens = whole[:, :, rows:]
            if seen is not None:
                self._wholes[tokens] = whole, seen
        return fields


def _rule(device: str) -> tuple[Any, ...]:
    """The types that results have now."""
    cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    return cast, torch.is_inference_mode_enabled()


def _settled(tensors: Sequence[torch.Tensor]) -> bool:
    """Whether what is computed of `tensors` may be kept: they are ordinary, and torch counts writes to them."""
    return readable(tensors) and not any(one.is_inference() for one in tensors)


def flat_fields(program: Program) -> list[str] | None:
    """The names of the output's fields where each is one tensor."""
    spec = program.out_spec
    leaves = spec.type is dict and all(child.is_leaf() for child in spec.children())
    return list(spec.context) if leaves else None
