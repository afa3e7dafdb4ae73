"""Programs: the rewritten graphs of one compiled model, each for one state of it and one kind of inputs."""

from __future__ import annotations

import itertools
import types
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from peftc.graph.arguments import SIZES, Labels, axes
from peftc.graph.call import Call
from peftc.graph.capture import TRACING, capture, settings, uncollected
from peftc.graph.captures import SERVES
from peftc.graph.facts import ModelFacts
from peftc.graph.layers import layers_of, outside
from peftc.graph.placement import is_placed
from peftc.graph.program import Bound, Program
from peftc.graph.state import Fingerprint, fingerprint
from peftc.graph.watch import Watch
from peftc.model.running import Runner
from peftc.model.traced import Kind, Traced, enrol
from peftc.plan.plan import Plan

# Rewrites a captured Program in place, for deltas of the given kinds by path; one that runs in torch is made lean.
Transform = Callable[[Program, Mapping[str, torch.dtype], bool], None]
BOUND = 32


@dataclass(frozen=True)
class State:
    """What a graph depends on beside its inputs: all that tracing sees of the backbone, the kinds of the deltas."""

    seen: Fingerprint
    dtypes: tuple[tuple[str, torch.dtype], ...]


class Programs:
    """The graph used is always the one for the state of now. At most `bound` graphs are kept, the latest used.

    A graph is captured when it is first asked for; threads take turns at that.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        deltas: nn.Module,
        plan: Plan,
        transform: Transform,
        bound: int = BOUND,
    ) -> None:
        self._backbone, self._deltas = backbone, deltas
        self._room, self._paths = plan.room, plan.tensors.keys()
        self._transform, self._bound = transform, bound
        self._watch = Watch(backbone, deltas)
        self._runners: OrderedDict[tuple[Hashable, ...], Runner] = OrderedDict()
        self._states: dict[State, int] = {}
        self._numbers = itertools.count()
        self._told: set[str] = set()
        self._count = -1
        # The stored tensors of graphs, until a dict of the model is written to.
        self._fetched: dict[Runner, list[torch.Tensor]] = {}
        self._writes = -1
        self.number = enrol(self)
        # What torch.compile sees, each an attribute, which it looks at alone; and their names.
        self.traced = types.SimpleNamespace()
        self._names: dict[tuple[int, Kind], str] = {}
        # The latest sizes of inputs, by name and rank: nothing else tells those of their fixed axes.
        self._sizes: dict[tuple[str, int], torch.Size] = {}
        with TRACING:
            self._look()

    def __len__(self) -> int:
        return len(self._runners)

    @property
    def facts(self) -> ModelFacts:
        """What the backbone said of itself when a graph was last asked for."""
        return self._facts

    @property
    def layers(self) -> Mapping[str, nn.Module]:
        """The backbone's layers by their paths."""
        return self._layers

    @property
    def followed(self) -> Mapping[str, nn.Module]:
        """The layers, and what is hooked outside of them, by their paths."""
        return self._layers | self._outside

    @property
    def hooked(self) -> bool:
        """Whether somebody follows these as they run."""
        return self._followed or self.placed

    def program(self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> Program:
        """The rewritten graph for an entry and this kind of inputs, to be read or exported: with explicit masks, and
        in the words of the spec."""
        with TRACING:
            self._look()
            return self._find(self._call(entry, inputs), flags, "plain").program

    def adopt(
        self,
        program: Program,
        inputs: Mapping[str, Any],
        flags: Mapping[str, Any],
        seen: Fingerprint,
    ) -> None:
        """Use a graph that was captured when the backbone was as `seen`, instead of capturing it again."""
        with TRACING:
            self._look()
            self._sizes |= {(k, v.ndim): v.shape for k, v in inputs.items()}
            call, state = self._call(program.entry, inputs), replace(self._state, seen=seen)
            self._keep((*self._key(call, flags, state), ()), program)

    def ready(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> tuple[Runner, list[torch.Tensor]]:
        """The graph with the stored tensors as they are now."""
        with TRACING:
            self._look()
            call = self._call(entry, inputs)
            runner = self._find(call, flags, "dropped" if call.unpadded else "explicit")
            return runner, self._stored(runner)

    def _stored(self, runner: Runner) -> list[torch.Tensor]:
        if self._writes != self._watch.writes:
            self._writes = self._watch.writes
            self._fetched.clear()
        if runner not in self._fetched:
            self._fetched[runner] = runner.fetch(self._count)
        return self._fetched[runner]

    def trace(self, kind: Kind) -> str | None:
        """The name of the graph, with explicit masks, for who traces a call of this kind; None where sizes of its
        inputs are not known yet, which a call tells."""
        with TRACING:
            self._look()
            key = self._number, kind
            if key not in self._names:
                inputs = self._of_kind(kind)
                if inputs is None:
                    return None
                entry, _, flags = kind
                call = self._call(entry, inputs)
                runner = self._find(call, dict(flags), "explicit")
                key = self._number, kind
                self._names[key] = name = f"graph_{next(self._numbers)}"
                vars(self.traced)[name] = Traced.of(runner, call, [*self._watch.readings()])
                while len(self._names) > self._bound:
                    oldest = next(iter(self._names))
                    del vars(self.traced)[self._names.pop(oldest)]
            return self._names[key]

    def _of_kind(self, kind: Kind) -> dict[str, torch.Tensor] | None:
        """Inputs of a kind of call, of any values."""
        entry, tensors, _ = kind
        found = {}
        for name, dtype, sizes in tensors:
            rank = len(sizes)
            known = self._sizes.get((name, rank), (None,) * rank)
            labels = axes(name, rank, entry, self._facts.encoder_decoder)
            shape = [
                given or (SIZES[label] if label else last) or 0
                for given, label, last in zip(sizes, labels, known, strict=True)
            ]
            if 0 in shape:
                return None
            found[name] = torch.ones(shape, dtype=dtype, device=self._backbone.device)
        return found

    def forget(self) -> None:
        """Compute constants anew: torch does not count every write to a parameter."""
        with TRACING:
            for runner in self._runners.values():
                runner.forget()

    def _call(self, entry: str, inputs: Mapping[str, Any]) -> Call:
        return Call(entry, inputs, self._facts.encoder_decoder)

    def _find(self, call: Call, flags: Mapping[str, Any], form: str) -> Runner:
        runner = self._kept(call, flags, form)
        outside = _outside(runner, call.inputs)
        if not outside:
            return runner
        key = self._key(call, flags, self._state)
        for (*kind, _, last), other in self._runners.items():
            if tuple(kind) == key and last in _FORMS[form] and not _outside(other, call.inputs):
                return other
        return self._kept(call, flags, form, _exact(outside, call.labels))

    def _kept(
        self, call: Call, flags: Mapping[str, Any], form: str, exact: frozenset[str] = frozenset()
    ) -> Runner:
        """A graph whose masks are "explicit" or "dropped", or one that serves both; or a "plain" one, as traced. It was
        traced with the sizes of now on axes in `exact`."""
        key = (*self._key(call, flags, self._state), call.sizes_of(exact))
        for one in ((*key, last) for last in _FORMS[form]):
            if one in self._runners:
                self._runners.move_to_end(one)
                return self._runners[one]
        self._sizes |= {(k, v.ndim): v.shape for k, v in call.inputs.items()}
        seen, drop = self._state.seen, form == "dropped"
        program = capture(self._backbone, call, flags, self._room, seen, drop, exact)
        if program.notes:
            self._look()
            key = (*self._key(call, flags, self._state), key[-1])
        return self._keep(key, program, form)

    def _keep(self, key: tuple[Hashable, ...], program: Program, form: str = "") -> Runner:
        plain = form == "plain"
        key = (*key, form if plain else program.masks)
        with uncollected():
            self._transform(program, dict(self._state.dtypes), not plain)
        roots: dict[str, nn.Module] = {
            "parameter": self._backbone,
            "buffer": self._backbone,
            "delta": self._deltas,
        }
        self._runners[key] = runner = Runner(program, roots)
        while len(self._runners) > self._bound:
            self._fetched.pop(self._runners.popitem(last=False)[1], None)
        used = {self._number, *(one[0] for one in self._runners)}
        self._states = {state: i for state, i in self._states.items() if i in used}
        return runner

    def _key(self, call: Call, flags: Mapping[str, Any], state: State) -> tuple[Hashable, ...]:
        number = self._number if state is self._state else self._numbered(state)
        return (number, call.entry, call.signature, settings(flags))

    def _numbered(self, state: State) -> int:
        if state not in self._states:
            self._states[state] = next(self._numbers)
        return self._states[state]

    def _look(self) -> None:
        """Take in what changed since the last call."""
        count = self._watch.look()
        if count == self._count:
            return
        self._facts = ModelFacts.read(self._backbone)
        slots = {**dict(self._deltas.named_parameters()), **dict(self._deltas.named_buffers())}
        dtypes = tuple((path, slots[path].dtype) for path in self._paths)
        self._state = State(fingerprint(self._backbone), dtypes)
        self._number = self._numbered(self._state)
        self._count = count
        self._layers = layers_of(self._backbone)
        hooked = set(self._watch.hooked)
        self._outside = outside(self._backbone, hooked)
        self._followed = bool(hooked & self.followed.keys())
        self.placed = is_placed(self._backbone)
        self._tell(hooked - self.followed.keys() - self._told)

    def _tell(self, hooked: set[str]) -> None:
        """A hook is Python that a graph does not hold."""
        if not hooked:
            return
        self._told |= hooked
        names = [f"'{path}'" if path else "the backbone itself" for path in sorted(hooked)]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        warnings.warn(
            f"hooks on {', '.join(names[:3])}{more} do not run: a compiled model runs graphs, layer by layer. Register "
            "hooks on the compiled model or on its layers, or read a module's values from its outputs",
            stacklevel=6,
        )


# The forms of masks that serve where one is asked for.
_FORMS = {"plain": ("plain",), **SERVES}
# Of a step's axes no one is as long as it is alone.
_OF_A_STEP = frozenset({"past", "query", "total"})


def _exact(outside: Sequence[Bound], labels: Labels) -> frozenset[str]:
    """What the axes that a graph does not hold for are named for."""
    named = {label for one in outside if (label := labels[one.name][one.axis]) is not None}
    return frozenset(named | _OF_A_STEP if named & _OF_A_STEP else named)


def _outside(runner: Runner, inputs: Mapping[str, Any]) -> list[Bound]:
    """The axes that a graph does not hold for."""
    return [one for one in runner.program.bounds if not _holds(one, inputs)]


def _holds(bound: Bound, inputs: Mapping[str, Any]) -> bool:
    size: int = inputs[bound.name].shape[bound.axis]
    return bool(bound.least <= size <= bound.most)
