"""Saved: the bytes that a training step will keep for backward, by site and in all, before there is a weight."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
)
from transformers import PreTrainedModel

from peftc import driver
from peftc.errors import PeftcError
from peftc.graph.arguments import dummy_inputs, forward_flags
from peftc.graph.capture import exclusive
from peftc.graph.program import Program, scope_of
from peftc.graph.quantized import require_open
from peftc.graph.steps import step_inputs
from peftc.model.compiled import CompiledModel
from peftc.model.hollow import hollow
from peftc.model.packed import packed
from peftc.model.sharing import require_bare
from peftc.plan.edit import Edit
from peftc.sites.site import layer_of


class SavedError(PeftcError):
    """A step whose bytes cannot be counted ahead."""


@dataclass(frozen=True)
class Row:
    """What one place saves, in bytes: `method` at the site `scope`:`at`, where a delta computes; what its sites share
    has no site (`scope` and `at` are ""). The backbone's own code has no method, and its module is `scope`. `group` is
    the site's stack and kind of attention, as in "decoder_cross"."""

    method: str
    at: str
    scope: str
    group: str
    layer: int | None
    bytes: int


@dataclass(frozen=True)
class Saved:
    """What a training step saves for backward: `rows` in the order of the graph, each place once.

    `batch` counts rows of a batch, `length` the tokens of each (None for a model that reads none); `device` and
    `dtype` are those of the weights that were counted for.
    """

    batch: int
    length: int | None
    device: str
    dtype: str
    rows: tuple[Row, ...]

    @property
    def bytes(self) -> int:
        """All of it."""
        return sum(row.bytes for row in self.rows)


@exclusive
def saved(
    model: PreTrainedModel,
    spec: driver.SpecLike,
    batch: int,
    length: int | None = None,
    *,
    device: torch.device | str | None = None,
    example: driver.Batch | None = None,
) -> Saved:
    """The bytes that a forward of `peftc.compile(model, spec)` in training will save for backward: unique storages,
    without those of parameters, buffers and inputs, as `torch.autograd.graph.saved_tensors_hooks` counts them.

    One run of the graph that will run, on fake tensors: nothing is computed, and `model`, which may be on the meta
    device, stays as it is. The step reads `batch` rows of `length` tokens without padding (source and target alike),
    and labels where the model takes them. `device` is the one to count for: by default the model's, or the CPU for a
    meta model. No autocast, and no layer is computed twice. `example` is one batch by argument name, needed only where
    the inputs cannot be guessed.

    Raises PlanError, CaptureError, StepError for sizes that the model does not read, SavedError.
    """
    require_bare(model)
    require_open(model)
    target = device or ("cpu" if model.device.type == "meta" else model.device)
    meta = torch.device("meta")
    shown = None if example is None else {name: one.to(meta) for name, one in example.items()}
    compiled = driver.compile(hollow(model, meta), spec, example=shown)
    logits = _predicted(compiled, shown)
    compiled = _on(compiled, target).train()
    inputs = step_inputs(compiled.backbone, batch, length, logits, compiled.plan.room, example)
    program = compiled.lean_program(inputs)
    try:
        kept = packed(compiled, program, inputs)
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise SavedError(
            f"{type(model).__name__}: what it saves depends on the values of its inputs ({error.func}); count a "
            "real step with torch.autograd.graph.saved_tensors_hooks"
        ) from error
    places = _Places.of(program, compiled.plan.edits)
    sizes: dict[Row, int] = {}
    for one in kept:
        row = places.row(one.node)
        sizes[row] = sizes.get(row, 0) + one.size
    rows = tuple(replace(row, bytes=size) for row, size in sizes.items())
    return Saved(batch, length, str(target), str(model.dtype).removeprefix("torch."), rows)


def _predicted(model: CompiledModel, example: driver.Batch | None) -> tuple[int | None, ...]:
    """The sizes of what a model predicts, None where they follow its inputs; () where it names no logits."""
    inputs = example or dummy_inputs(model.backbone)
    output = model.program("forward", inputs, forward_flags(model.backbone)).output("logits")
    shape = () if output is None else output.node.meta["val"].shape
    return tuple(one if isinstance(one, int) else None for one in shape)


def _on(model: CompiledModel, device: torch.device | str) -> CompiledModel:
    try:
        return hollow(model, torch.device(device))
    except (RuntimeError, AssertionError) as error:  # the latter of torch built without CUDA
        raise SavedError(
            f"device '{device}' cannot be used here; count for one that can, such as 'cpu'"
        ) from error


@dataclass(frozen=True)
class _Places:
    """Finds the place of a node: the `edits` by name, and the names of those that read each delta tensor."""

    program: Program
    edits: Mapping[str, Edit]
    readers: Mapping[str, frozenset[str]]

    @staticmethod
    def of(program: Program, edits: Sequence[Edit]) -> _Places:
        readers: dict[str, frozenset[str]] = {}
        for edit in edits:
            for one in edit.parameters:
                readers[one.path] = readers.get(one.path, frozenset()) | {edit.name}
        return _Places(program, {edit.name: edit for edit in edits}, readers)

    def row(self, node: fx.Node) -> Row:
        """The place that a node is of, without its bytes."""
        tag = node.meta.get("delta", "")
        name = tag if tag in self.edits else self._reader(node)
        if name in self.edits:
            edit = self.edits[name]
            site = edit.site
            return Row(edit.entry.method, site.at, site.scope, site.group, site.layer, 0)
        if any(tag == edit.entry.method for edit in self.edits.values()):
            return Row(tag, "", "", "", None, 0)
        scope = scope_of(node)
        return Row("", "", scope, "", layer_of(scope), 0)

    def _reader(self, node: fx.Node) -> str:
        """The one edit whose tensors alone an inserted node that stands before all layers is computed of, or ""."""
        if "delta" not in node.meta or scope_of(node):
            return ""
        seen, queue = {node}, [node]
        while queue:
            fresh = [one for one in queue.pop().all_input_nodes if one not in seen]
            seen.update(fresh)
            queue += fresh
        slots = (self.program.slot(one) for one in seen)
        read = [self.readers[one.name] for one in slots if one is not None and one.kind == "delta"]
        names = frozenset.intersection(*read) if read else frozenset()
        return next(iter(names)) if len(names) == 1 else ""
