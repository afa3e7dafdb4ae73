"""One Program as one ONNX graph: exported again with named axes, stripped of traces of this machine."""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim
from torch.fx.traceback import preserve_node_meta
from transformers import PreTrainedModel

import passes
from peftc.errors import PeftcError
from peftc.export import origins
from peftc.graph.arguments import axes, example
from peftc.graph.capture import exclusive
from peftc.graph.code import function_of
from peftc.graph.facts import ModelFacts
from peftc.graph.grid import Case
from peftc.graph.program import Program
from peftc.graph.rows import room_of
from peftc.model.compiled import run_program
from peftc.model.running import places, roots_of
from peftc.rewrite import verify
from peftc.rewrite.constants import split
from peftc.rewrite.pipeline import Pipeline

# The axis names of the ONNX graphs. A total length (past + query) stays free.
AXES = {"batch": "batch", "seq": "seq_len", "past": "past_len", "query": "q_len", "target": "q_len"}


class ExportError(PeftcError):
    """A model that cannot be exported, or an export that does not compute the same."""


Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Graph:
    """A Program with its real inputs and the names they have in ONNX. `outputs` maps ours to ONNX's.

    `rows` are put in front of an input by who runs the graph, [1, heads, rows, width] each; `held` says how many rows
    an input has besides, because an earlier graph gave them. `after` computes more fields of those of the Program and
    its inputs.

    For the certificate: `feeds` makes the inputs of a case, without `rows`; `cases` are (length, past, query);
    `padded` gives, by our names, the axis of an output along which padding is no one's business. `reference` is what
    the graph is compared with, one that takes the inputs without `rows`; without it, the Program itself.
    """

    role: str
    program: Program
    inputs: Tensors
    names: Mapping[str, str]
    outputs: Mapping[str, str]
    feeds: Callable[[Case, torch.Generator], dict[str, torch.Tensor]]
    cases: tuple[tuple[int, int, int], ...] = ((0, 0, 0),)
    padded: Mapping[str, int] = field(default_factory=dict)
    rows: Tensors = field(default_factory=dict)
    held: Mapping[str, int] = field(default_factory=dict)
    reference: Program | None = None
    after: Callable[[Tensors, Tensors], dict[str, torch.Tensor]] | None = None

    def fields(
        self, model: PreTrainedModel, program: Program, inputs: Tensors, by: Any = None
    ) -> dict[str, torch.Tensor]:
        """What the graph gives, by our names."""
        found = run_program(model, program, inputs, by)
        return found if self.after is None else self.after(found, inputs)

    def full(self, inputs: Tensors) -> dict[str, torch.Tensor]:
        """The inputs with the rows in front of them."""
        wide = dict(inputs)
        for name, rows in self.rows.items():
            first = rows.expand(inputs[name].shape[0], -1, -1, -1)
            wide[name] = torch.cat([first, inputs[name]], 2)
        return wide

    def count(self, name: str) -> int:
        """How many rows an input has in front of the tokens."""
        return self.held.get(name, 0) + (self.rows[name].shape[2] if name in self.rows else 0)


class _Export(nn.Module):
    """The graph as a module, rewritten for a runtime that keeps its weights: what is computed of weights alone is
    computed here, once."""

    def __init__(self, model: PreTrainedModel, graph: Graph) -> None:
        super().__init__()
        self.model = model
        program, _ = graph.program.copied()
        origins.address(program)
        Pipeline(verify.check).run(passes.EXPORT, program)
        parts = split(program, origins.telling)
        self.__dict__.update(graph=graph, program=program, parts=parts)
        stored = [registry[name] for registry, name in places(program, roots_of(model))]
        ready = parts.head(*(stored[i] for i in parts.reads)) if parts is not None else ()
        self.ready = nn.ParameterList(nn.Parameter(one, False) for one in ready)

    def forward(self, tensors: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, ...]:
        own = self.__dict__
        program = own["program"]
        by: Callable[..., Any] = self._rest
        if own["parts"] is None:
            by = function_of(program.root, program.graph, origins.telling)
        fields = own["graph"].fields(self.model, program, tensors, by)
        return tuple(fields[name] for name in own["graph"].outputs)

    def _rest(self, *arguments: torch.Tensor) -> Any:
        """The graph behind what is ready."""
        program, parts = self.__dict__["program"], self.__dict__["parts"]
        slots = [*zip(program.order(), arguments, strict=True)]
        stored = [one for slot, one in slots if slot.kind != "input"]
        given = {slot.name: one for slot, one in slots if slot.kind == "input"}
        rest = [*(stored[i] for i in parts.keeps), *(given[name] for name in parts.inputs)]
        return parts.rest(*rest, *self.ready)


@exclusive
def to_onnx(model: PreTrainedModel, graph: Graph, opset: int) -> Any:
    """The graph as an onnx_ir Model, weights inside. Raises ExportError."""
    seq2seq = ModelFacts.read(model).encoder_decoder
    entry = graph.program.entry
    inputs = {
        k: example(k, v, entry, seq2seq, graph.count(k)).clone()
        for k, v in graph.full(graph.inputs).items()
    }
    dims = {label: Dim(label, min=1, max=longest(model, label)) for label in set(AXES.values())}

    def dim(label: str, more: int) -> Any:
        if label not in AXES:
            return Dim.DYNAMIC
        one = dims[AXES[label]]
        return one + more if more and label != "batch" else one  # rows in front of the tokens

    shapes = {
        name: {
            i: dim(a, graph.count(name))
            for i, a in enumerate(axes(name, v.ndim, entry, seq2seq))
            if a
        }
        for name, v in inputs.items()
    }
    with quiet(), torch.no_grad(), preserve_node_meta():
        try:
            exported = torch.export.export(
                _Export(model, graph), (inputs,), dynamic_shapes=(shapes,), strict=False
            )
            origins.carry(exported)
            program = torch.onnx.export(
                exported,
                input_names=[graph.names[name] for name in inputs],
                output_names=list(graph.outputs.values()),
                dynamic_shapes=(shapes,),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            raise ExportError(f"{graph.role} cannot be exported: {str(error)[:400]}") from error
    assert program is not None
    origins.read(program.model)
    strip(program.model)
    check_ops(program.model, graph.role)
    return program.model


def ports_of(model: Any) -> dict[str, dict[str, Any]]:
    """The inputs and outputs of an onnx_ir Model by name: their types, and their axes, sizes or names."""

    def told(value: Any) -> dict[str, Any]:
        shape = [one if isinstance(one, int) else str(one.value) for one in value.shape]
        return {"dtype": value.dtype.name.lower(), "shape": shape}

    sides = {"inputs": model.graph.inputs, "outputs": model.graph.outputs}
    return {side: {one.name: told(one) for one in values} for side, values in sides.items()}


def longest(model: PreTrainedModel, label: str) -> int:
    """The most tokens that there are positions for, besides the rows in front of them."""
    limit = getattr(model.config, "max_position_embeddings", None)
    return 4096 if label == "batch" or limit is None else room_of(model).longest(int(limit))


def strip(model: Any) -> None:
    """Node metadata holds Python stack traces with local paths."""
    model.metadata_props.clear()
    model.doc_string = None
    for graph in model.graphs():
        graph.doc_string = None
        graph.metadata_props.clear()
        for node in graph:
            node.metadata_props.clear()
            node.doc_string = None
        for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
            value.metadata_props.clear()
            value.doc_string = None


def check_ops(model: Any, role: str) -> None:
    """Runtimes disagree on how `is_causal` aligns, and control flow stops fusion: neither may be there."""
    for node in model.graph:
        causal = node.op_type == "Attention" and "is_causal" in node.attributes
        if causal and node.attributes["is_causal"].as_int() == 1:
            raise ExportError(f"{role}: an Attention node relies on is_causal; pass a mask")
        if node.op_type in ("If", "Loop"):
            raise ExportError(f"{role}: the graph has control flow ({node.op_type})")


def require_onnx() -> None:
    try:
        import onnx
        import onnxruntime
        import onnxscript
    except ImportError as error:
        raise ExportError(
            'exporting needs ONNX: pip install "peftc[cpu]" or "peftc[gpu]"'
        ) from error
    del onnx, onnxruntime, onnxscript


@contextlib.contextmanager
def plain_experts(model: PreTrainedModel) -> Iterator[None]:
    """Let the experts of a mixture be computed by ops that ONNX has: transformers' grouped product is none."""
    before = model.get_experts_implementation()
    grouped = {k: v for k, v in before.items() if v == "grouped_mm"}
    if grouped:
        model.set_experts_implementation({**before, **dict.fromkeys(grouped, "batched_mm")})
    try:
        yield
    finally:
        if grouped:
            model.set_experts_implementation(before)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """The exporters print and warn about their own internals."""
    names: Sequence[str] = ("torch.onnx", "torch.export", "onnxscript", "onnx_ir", "torch._dynamo")
    levels = {name: logging.getLogger(name).level for name in names}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in names:
            logging.getLogger(name).setLevel(logging.CRITICAL)
        try:
            yield
        finally:
            for name, level in levels.items():
                logging.getLogger(name).setLevel(level)
