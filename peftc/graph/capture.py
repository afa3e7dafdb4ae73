"""Capture: a Hugging Face model becomes a frozen Program, one entry at a time, by torch.export."""

from __future__ import annotations

import contextlib
import functools
import gc
import itertools
import linecache
import logging
import random
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import fx, nn
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _get_current_dispatch_mode
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis
from transformers import PreTrainedModel

from peftc.errors import CaptureError, UncachedError
from peftc.graph.arguments import SIZES, Labels, resized
from peftc.graph.cache import keys_of
from peftc.graph.call import Call
from peftc.graph.captures import CAPTURES
from peftc.graph.doubts import DOUBTS, Doubt
from peftc.graph.entries import ENTRIES, Tensors
from peftc.graph.functions import kept, write_calls
from peftc.graph.idle import Idle, undecided
from peftc.graph.masks import deciding, proven
from peftc.graph.program import Bound, Program, Slot, behind
from peftc.graph.quantized import readers, require_open
from peftc.graph.rows import NONE, Room
from peftc.graph.state import Fingerprint, fingerprint, note, noting, undisturbed

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}
# Tracing puts fake tensors into a model's registries and switches in torch that every thread sees: one thread
# traces at a time, and who reads parameters for a graph holds this too.
TRACING = threading.RLock()
# How often the collector may see what is new before it walks through all: more often than while a graph is made.
_NEVER = 1 << 30
P = ParamSpec("P")
R = TypeVar("R")


def exclusive(call: Callable[P, R]) -> Callable[P, R]:
    """The call, while no thread traces: what is computed with symbolic sizes, a trace of any thread records."""

    @functools.wraps(call)
    def alone(*args: P.args, **kwargs: P.kwargs) -> R:
        with TRACING:
            return call(*args, **kwargs)

    return alone


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """While graphs are made, Python's collector looks at what is new only: it would walk through all that is loaded
    several times, a seventh of the time. It makes up for it afterwards. Only for who holds TRACING: it is the
    process's."""
    young, middle, old = gc.get_threshold()
    gc.set_threshold(young, middle, max(old, _NEVER))
    try:
        yield
    finally:
        gc.set_threshold(young, middle, old)


class _Traced(nn.Module):
    def __init__(self, model: PreTrainedModel, call: Callable[[Tensors], dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, tensors: Tensors) -> dict[str, Any]:
        try:
            return self.call(tensors)
        except Exception as error:
            raise _Stopped(error) from error

    def forget(self) -> None:
        """torch leaves cycles around what it traced, and a model in one lives until they are collected."""
        del self.call, self.model


class _Detached(TorchFunctionMode):
    """`h.data` is `h.detach()`, which a trace records."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func == _DATA:
            return args[0].detach()
        return func(*args, **(kwargs or {}))


_DATA: Any = torch.Tensor.data.__get__  # type: ignore[attr-defined]


class _Stopped(Exception):
    """What stopped a trace. torch prints to stderr the graph that it hangs on a RuntimeError."""


def capture(
    model: PreTrainedModel,
    call: Call,
    flags: Mapping[str, Any] | None = None,
    room: Room = NONE,
    seen: Fingerprint | None = None,
    drop: bool = False,
    exact: frozenset[str] = frozenset(),
) -> Program:
    """The entry of a call of `model` in its current mode as a graph, with every batch and length axis dynamic.

    Of the call's inputs, real or meta tensors, only dtype, device, rank and the sizes of fixed axes matter. The model
    runs on them with `room` for rows in front. `seen` is the model's fingerprint where it is known. With `drop` the
    graph is one for calls that are `unpadded`, and has no attention mask where eager code has none then. Axes in
    `exact` are traced as long as they are. A graph that was traced before of a model that is the same to tracing is
    used again.
    Where the model's code depends on a size, the graph's `bounds` say for which it holds. What it decides once and notes
    in its configuration stands there afterwards, and the graph holds for that too. Raises CaptureError when the model
    cannot be traced.
    """
    flags = flags or {}
    with TRACING, uncollected():
        seen = seen or fingerprint(model)

        def traced(idle: Idle | None = None) -> Program:
            return _traced(model, call, flags, room, drop, exact, idle)

        def trace() -> Program:
            with noting(model) as notes:
                try:
                    program = traced()
                except CaptureError as error:
                    asked = isinstance(error.__cause__, GuardOnDataDependentSymNode)
                    found = undecided(traced) if asked else None
                    if found is None:
                        raise
                    program = found
            return replace(program, notes=notes)

        if not seen.shared:
            return trace()
        given = call.entry, call.signature, call.sizes_of(exact)
        key = (seen.value, given, settings(flags), room.key)
        program = CAPTURES.get(key, "dropped" if drop else "explicit", trace)
        note(model, program.notes)
        return program


def settings(flags: Mapping[str, Any]) -> tuple[Hashable, ...]:
    return tuple((k, type(v), v) for k, v in sorted(flags.items()))


def _traced(
    model: PreTrainedModel,
    call: Call,
    flags: Mapping[str, Any],
    room: Room,
    drop: bool,
    exact: frozenset[str],
    idle: Idle | None = None,
    no: Doubt | None = None,
) -> Program:
    """The graph of a call. Of what its code asks of values, `no` is told no, and all else yes."""
    entry, inputs, labels = call.entry, call.inputs, call.labels
    if _get_current_dispatch_mode() is not None:
        raise CaptureError(
            f"{type(model).__name__}: its graph for such inputs ({entry}) would be captured while another trace is "
            "being made; run the model once on them before, with a mask that has a zero if it has a mask"
        )
    require_open(model)
    seq2seq = call.encoder_decoder
    new, now = _new_tokens(call), dict(call.sizes_of(exact))
    tensors = {
        k: resized(v, labels[k], _at(_sizes(inputs, flags, room.held(k, seq2seq), new), now))
        for k, v in inputs.items()
    }
    auto = torch.export.Dim.AUTO
    shapes = {k: {i: auto for i, a in enumerate(labels[k]) if a} for k in tensors}
    output_types: list[Callable[..., Any]] = []
    states: set[str] = set()
    answers = {doubt: doubt.answers(doubt is not no) for doubt in DOUBTS}

    def run(arguments: Tensors) -> dict[str, Any]:
        wide = room.widened(model, entry, arguments)
        before = dict(model.named_buffers(remove_duplicate=False))
        with contextlib.ExitStack() as stack:
            modes = (_Detached(), *([idle] if idle else []), *answers.values())
            for context in (*modes, room.kept_from_decoder(model, wide)):
                stack.enter_context(context)
            output_type, fields = ENTRIES[entry].call(model, wide, flags)
        states.update(_replaced(before, dict(model.named_buffers(remove_duplicate=False))))
        output_types.append(output_type)
        return room.cut(model, entry, wide, fields)

    traced = _Traced(model, run)
    with contextlib.ExitStack() as stack:
        for surrounds in (_alone(model), _told(model), _as_they_are(), _not_exported(model)):
            stack.enter_context(surrounds)
        decision, calls = stack.enter_context(deciding(drop)), stack.enter_context(kept())
        exported = _exported(traced, model, entry, tensors, shapes)
    wide = room.wide(entry, seq2seq)
    program = _program(exported, entry, model, labels, wide, output_types[-1])
    _require_stateless(program, model, states)
    write_calls(program, exported.graph_module, calls)
    if no is not None:
        return program
    for doubt, mode in reversed(answers.items()):
        if not mode.asked:
            continue
        other = _traced(model, call, flags, room, drop, exact, idle, doubt)
        if mode.odd or not doubt.settled(program, other):
            raise CaptureError(
                f"{type(model).__name__} cannot be traced ({entry}): {doubt.refusal}"
            )
    program.quantized = readers(model)
    if not proven(program):
        explicit = _traced(model, call, flags, room, False, exact, idle)
        return replace(explicit, masks="any")
    if decision.met:
        program.masks = "dropped" if drop else "explicit"
    return program


def _exported(
    traced: _Traced,
    model: PreTrainedModel,
    entry: str,
    tensors: Tensors,
    shapes: Mapping[str, Mapping[int, Any]],
) -> torch.export.ExportedProgram:
    """What torch.export makes of a call. Raises CaptureError, of one that starts a cache UncachedError."""
    try:
        return torch.export.export(traced, (tensors,), dynamic_shapes=(shapes,), strict=False)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, _Stopped) else error
        if isinstance(cause, CaptureError):
            raise cause from None
        assert isinstance(cause, Exception)
        kind = UncachedError if ENTRIES[entry].starts else CaptureError
        raise kind(_explain(model, entry, cause)) from cause
    finally:
        traced.forget()


def _sizes(inputs: Tensors, flags: Mapping[str, Any], held: int, new: int) -> dict[str, int]:
    """The sizes to trace with; a number among the settings may count tokens, so there are more than that."""
    longest = max((n for v in inputs.values() for n in v.shape), default=0)
    counts = [v for v in flags.values() if isinstance(v, int) and 1 < v <= longest]
    more = max(counts, default=0)
    sizes = {k: n if k == "batch" else n + more for k, n in SIZES.items()}
    past = sizes["past"] + more
    return {
        **sizes,
        "seq": sizes["seq"] + held,
        "past": past + held,
        "total": new + (0 if keys_of(inputs) is None else past),
    }


def _at(sizes: Mapping[str, int], now: Mapping[str, int]) -> dict[str, int]:
    """`sizes` with those of now, and no other that is one of these: axes of one size are taken for one."""
    taken, found = set(now.values()), dict(now)
    for label, size in sizes.items():
        if label not in now:
            found[label] = next(n for n in itertools.count(size) if n not in taken)
    return found


def _new_tokens(call: Call) -> int:
    """How many tokens a step is traced with: as many as it has, where the graph is one for their number."""
    for name, labels in call.named.items():
        for axis, label in enumerate(labels):
            if label == "query" and call.labels[name][axis] is None:
                return call.inputs[name].shape[axis]
    return SIZES["query"]


@contextlib.contextmanager
def _alone(model: PreTrainedModel) -> Iterator[None]:
    """What surrounds a trace, so that it is the same whenever it is made: gradients on, no autocast, no hooks,
    torch's loggers quiet; and the model afterwards as before. No node is told the stack that it was called from,
    which is a fifth of the time: it knows its module."""
    loggers = [logging.getLogger(name) for name in _LOGGERS]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    stacks = fx.config.do_not_emit_stack_traces
    fx.config.do_not_emit_stack_traces = True
    try:
        with contextlib.ExitStack() as stack:
            for one in (undisturbed(model), torch.inference_mode(False), torch.enable_grad()):
                stack.enter_context(one)
            for kind in sorted({"cpu", model.device.type} - {"meta"}):
                stack.enter_context(torch.autocast(kind, enabled=False))
            yield
    finally:
        fx.config.do_not_emit_stack_traces = stacks
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _as_they_are() -> Iterator[None]:
    """`module.to(...)` of one that is so already does nothing (Switch Transformers cast their routers in each forward):
    in a trace torch would give it other weights. It does for any thread what it did."""
    to = nn.Module.to

    def moved(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        device, dtype, _, _ = torch._C._nn._parse_to(*args, **kwargs)
        for one in itertools.chain(self.parameters(), self.buffers()):
            if device not in (None, one.device) or (
                one.is_floating_point() and dtype not in (None, one.dtype)
            ):
                return to(self, *args, **kwargs)
        return self

    nn.Module.to = moved  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.to = to  # type: ignore[method-assign]


@contextlib.contextmanager
def _not_exported(model: PreTrainedModel) -> Iterator[None]:
    """Code that asks whether it is exported, and nothing else, is told no: the graph runs in torch, as eager code does,
    and needs no loop over the rows of a triangular system (Qwen3-Next, OLMo-hybrid). Code that asks whether it is compiled
    too picks kernels by both, and hears the truth."""
    asked, other = "is_torchdynamo_exporting", "is_torchdynamo_compiling"
    modules = {sys.modules.get(type(one).__module__) for one in model.modules()} - {None}
    names = [vars(one) for one in modules if hasattr(one, asked) and not hasattr(one, other)]
    before = [own[asked] for own in names]
    for own in names:
        own[asked] = bool  # of no arguments, False
    try:
        yield
    finally:
        for own, truth in zip(names, before, strict=True):
            own[asked] = truth


@contextlib.contextmanager
def _told(model: PreTrainedModel) -> Iterator[None]:
    """Says once that a model draws numbers outside torch, as SpecAugment does: a graph holds those of its trace. The
    generators are afterwards as before."""
    own, numpy = random.getstate(), np.random.get_state(legacy=False)
    yield
    drawn = random.getstate() != own or str(np.random.get_state(legacy=False)) != str(numpy)
    random.setstate(own)
    np.random.set_state(numpy)
    if drawn:
        warnings.warn(
            f"{type(model).__name__} draws random numbers in training by Python's or NumPy's generator (SpecAugment "
            "does): a compiled model uses those of its trace in every step. Switch it off (apply_spec_augment=False), or "
            "give it its masks as inputs",
            stacklevel=2,
        )


_LOGGERS = ("torch.export", "torch.fx", "torch._export", "torch.fx.experimental.symbolic_shapes")


def canonical_paths(model: PreTrainedModel) -> dict[str, str]:
    """Every path of every parameter to its first path: tied parameters have several."""
    first: dict[int, str] = {}
    return {
        path: first.setdefault(id(parameter), path)
        for path, parameter in model.named_parameters(remove_duplicate=False)
    }


def _program(
    exported: Any,
    entry: str,
    model: PreTrainedModel,
    labels: Labels,
    wide: frozenset[str],
    output_type: Callable[..., Any],
) -> Program:
    paths = canonical_paths(model)
    slots: dict[str, Slot] = {}
    constants: dict[str, torch.Tensor] = {}
    users = iter(labels)
    for spec in exported.graph_signature.input_specs:
        kind = _KINDS.get(spec.kind)
        if kind is None:
            one = exported.constants.get(spec.target)
            raise CaptureError(
                f"{type(model).__name__} cannot be traced ({entry}): it reads a {type(getattr(one, 'real_obj', one)).__name__}, "
                "and a graph takes tensors alone; compute what it is for outside of forward"
            )
        name = next(users) if kind == "input" else spec.target
        if kind == "constant":
            constants[name] = exported.constants[name]
        elif kind != "input":
            name = name.removeprefix("model.")
            name = paths.get(name, name)
        slots[spec.arg.name] = Slot(kind, name)
    for node in exported.graph_module.graph.find_nodes(op="placeholder"):
        if slots[node.name].kind == "constant":
            node.meta["constant"] = constants[slots[node.name].name]
    return Program(
        entry=entry,
        graph=exported.graph_module.graph,
        root=_parts(exported.graph_module),
        slots=slots,
        constants=constants,
        out_spec=exported.call_spec.out_spec,
        training=model.training,
        output_type=output_type,
        wide=wide,
        bounds=tuple(_bounds(exported, slots, labels)),
    )


def _replaced(before: Tensors, after: Tensors) -> Iterator[str]:
    """The buffers that have other values now: not those that were moved or made another type."""
    for path, new in after.items():
        old = before.get(path)
        if old is None or old is new or old.dtype != new.dtype:
            continue
        if old.untyped_storage()._cdata != new.untyped_storage()._cdata:
            yield path


def _require_stateless(program: Program, model: PreTrainedModel, states: set[str]) -> None:
    """Raise CaptureError where what a call gives hangs on a buffer that the call before set: a graph sets none."""
    (output,) = program.graph.find_nodes(op="output")
    before = behind(output)
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.slots[node.name]
        if slot.kind == "buffer" and slot.name in states and node in before:
            raise CaptureError(
                f"{type(model).__name__} cannot be traced ({program.entry}): it reads its buffer '{slot.name}' and sets it to "
                "other values, which no graph keeps from call to call; pass it as an input"
            )


def _parts(traced: fx.GraphModule) -> nn.Module:
    """What a graph calls or gets, without the graph."""
    root = nn.Module()
    root._modules.update(traced._modules)
    root._buffers.update(traced._buffers)
    root._parameters.update(traced._parameters)
    return root


def _bounds(exported: Any, slots: Mapping[str, Slot], labels: Labels) -> Iterator[Bound]:
    """Axes that the graph holds for in a range, because the model's code compared their sizes, or for one size,
    because it counted by them. Export itself assumes 2 at least, and its graphs run with 0 and 1 all the same."""
    known: dict[Any, tuple[int, int]] = {}
    for node in exported.graph_module.graph.find_nodes(op="placeholder"):
        slot = slots[node.name]
        if slot.kind != "input" or not node.users:
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            if labels[slot.name][axis] is None:
                continue
            fixed = size if isinstance(size, int) else size.node.maybe_as_int()
            if fixed is not None:
                yield Bound(slot.name, axis, fixed, fixed)
                continue
            symbol = size.node.expr
            if symbol not in known:
                known[symbol] = _range(size.node, exported.range_constraints.get(symbol))
            least, most = known[symbol]
            if least > 0 or most < sys.maxsize:
                yield Bound(slot.name, axis, least, most)


def _range(size: Any, compared: Any) -> tuple[int, int]:
    """The sizes that a graph holds for, of an axis whose size is a symbol: where it was `compared`, and where as many
    are counted of it as of the traced one. A loop over the chunks of a sequence runs as often in a graph as it ran."""
    least = int(compared.lower) if compared is not None and compared.lower > 2 else 0
    most = sys.maxsize if compared is None else int(min(compared.upper, sys.maxsize))
    guards = dict.fromkeys(size.shape_env.replace(guard.expr) for guard in size.shape_env.guards)
    counts = [guard for guard in guards if size.expr in guard.free_symbols and _is_count(guard)]
    if not counts:
        return least, most
    low = high = int(size.hint)
    if any(len(guard.free_symbols) > 1 for guard in counts):
        return low, high
    while low > least and all(_holds(guard, size.expr, low - 1) for guard in counts):
        low -= 1
    while high < min(most, _FAR) and all(_holds(guard, size.expr, high + 1) for guard in counts):
        high += 1
    return low, high


_FAR = 4096  # tokens; longer sequences get graphs of their own


def _is_count(guard: Any) -> bool:
    """Whether code asked for a number. A 0 is a rest, which the op that asked for it sees itself."""
    return guard.is_Equality and any(side.is_Integer and side != 0 for side in guard.args)


def _holds(guard: Any, symbol: Any, size: int) -> bool:
    try:
        return bool(sympy_interp(PythonReferenceAnalysis, {symbol: size}, guard))
    except ZeroDivisionError:  # no size that the model takes
        return False


def _explain(model: PreTrainedModel, entry: str, error: Exception) -> str:
    reason = str(error).strip().splitlines() or [type(error).__name__]
    place = _place(model, error)
    return (
        f"{type(model).__name__} cannot be traced ({entry}): {type(error).__name__}: {reason[0][:300]}\n"
        + (f"  in {place}\n" if place else "")
        + "  the model's forward must be one graph: no branch on tensor values"
    )


def _place(model: PreTrainedModel, error: Exception) -> str:
    """The innermost module that was running and its line, from the traceback of the error or its cause."""
    names = {id(module): name for name, module in model.named_modules()}
    found = ""
    chain: BaseException | None = error
    while chain is not None:
        for frame, line in traceback.walk_tb(chain.__traceback__):
            name = names.get(id(frame.f_locals.get("self")))
            if (
                name
                and frame.f_code.co_name != "_call_impl"
                and "/torch/" not in frame.f_code.co_filename
            ):
                file = frame.f_code.co_filename
                code = linecache.getline(file, line).strip()
                found = f"'{name}', {Path(file).name}:{line}: {code[:100]}"
        chain = chain.__cause__ or chain.__context__
    return found
