"""Capture: a Hugging Face model becomes a frozen Program, one entry at a time, by torch.export."""

from __future__ import annotations

import contextlib
import io
import linecache
import logging
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export.graph_signature import InputKind, OutputKind
from transformers import PreTrainedModel

from peftc.graph.arguments import CaptureError, Tensors, axes, example
from peftc.graph.entries import ENTRIES
from peftc.graph.program import Program, Slot
from peftc.graph.rows import NONE, Room

_KINDS = {
    InputKind.PARAMETER: "parameter",
    InputKind.BUFFER: "buffer",
    InputKind.CONSTANT_TENSOR: "constant",
    InputKind.USER_INPUT: "input",
}


class _Traced(nn.Module):
    def __init__(self, model: PreTrainedModel, call: Callable[[Tensors], dict[str, Any]]) -> None:
        super().__init__()
        self.model = model
        self.call = call

    def forward(self, tensors: Tensors) -> dict[str, Any]:
        return self.call(tensors)


def capture(
    model: PreTrainedModel,
    entry: str,
    inputs: Tensors,
    flags: Mapping[str, Any] | None = None,
    room: Room = NONE,
) -> Program:
    """Trace one entry of `model` in its current mode, with every batch and length axis dynamic.

    `inputs` are real or meta tensors by argument name; only their rank, dtype and device matter. The
    model runs on them with `room` for rows in front. Raises CaptureError when the model cannot be
    traced or an axis was specialised.
    """
    seq2seq = bool(model.config.is_encoder_decoder)
    tensors = {k: example(k, v, entry, seq2seq, room.held(k, seq2seq)) for k, v in inputs.items()}
    auto = torch.export.Dim.AUTO
    shapes = {
        k: {i: auto for i, a in enumerate(axes(k, v.ndim, entry, seq2seq)) if a}
        for k, v in tensors.items()
    }
    output_types: list[type] = []

    def call(arguments: Tensors) -> dict[str, Any]:
        wide = room.widened(model, entry, arguments)
        output_type, fields = ENTRIES[entry].call(model, wide, flags or {})
        output_types.append(output_type)
        return room.cut(model, entry, wide, fields)

    with _quiet():
        try:
            exported = torch.export.export(
                _Traced(model, call),
                (tensors,),
                dynamic_shapes=(shapes,),
                strict=False,
            )
        except CaptureError:
            raise
        except Exception as error:
            raise CaptureError(_explain(model, entry, error)) from error
    program = _program(exported, entry, model, list(tensors))
    program.wide = room.wide(entry, seq2seq)
    program.output_type = output_types[-1]
    _check_dynamic(program, model, shapes)
    return program


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
    names: list[str],
) -> Program:
    paths = canonical_paths(model)
    slots: dict[str, Slot] = {}
    constants: dict[str, torch.Tensor] = {}
    users = iter(names)
    for spec in exported.graph_signature.input_specs:
        kind = _KINDS.get(spec.kind)
        if kind is None:
            raise CaptureError(
                f"{type(model).__name__}.{entry}: {spec.kind} inputs are not supported"
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
    for out in exported.graph_signature.output_specs:
        if out.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(f"{type(model).__name__}.{entry} changes its state: '{out.target}'")
    return Program(
        entry=entry,
        module=exported.graph_module,
        slots=slots,
        constants=constants,
        out_spec=exported.call_spec.out_spec,
        training=model.training,
    )


def _check_dynamic(
    program: Program, model: PreTrainedModel, shapes: Mapping[str, Mapping[int, Any]]
) -> None:
    for node in program.graph.nodes:
        slot = program.slot(node)
        if slot is None or slot.kind != "input" or not node.users:
            continue
        fixed = [i for i in shapes[slot.name] if isinstance(node.meta["val"].shape[i], int)]
        if fixed:
            size = node.meta["val"].shape[fixed[0]]
            raise CaptureError(
                f"{type(model).__name__}.{program.entry}: axis {fixed[0]} of '{slot.name}' was fixed to "
                f"{size} while tracing; the model's code depends on that size"
            )


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


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """torch.export warns about its own internals, and prints the graph so far when it fails; only the error
    concerns the user."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch.fx", "torch._export")]
    levels = [logger.level for logger in loggers]
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for logger, level in zip(loggers, levels, strict=True):
                logger.setLevel(level)
