"""The ONNX bundle: folded graphs, one weights file, config, tokenizer, and a certificate of parity."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peftc.driver import sample
from peftc.export import fused as fusions
from peftc.export import origins, record
from peftc.export.fused import provider_of
from peftc.export.graph import (
    ExportError,
    Graph,
    Tensors,
    plain_experts,
    ports_of,
    require_onnx,
    to_onnx,
)
from peftc.export.layouts import Layout, layout_of
from peftc.export.parity import Parity, check, compared
from peftc.export.precision import (
    PRECISIONS,
    QUANTIZED,
    Precision,
    on_the_cpu,
    precision_of,
    quantized,
)
from peftc.export.source import Source, plain
from peftc.export.tasks import Task, task_of
from peftc.export.weights import write_models
from peftc.graph.placement import weights
from peftc.graph.quantized import quantized as held_small
from peftc.graph.rows import longest_of
from peftc.language.resolved import digest
from peftc.merging import merge
from peftc.model.compiled import CompiledModel
from peftc.rewrite.folding import Report
from peftc.rewrite.tolerance import tolerance
from peftc.runtime import KEYS, kind_of
from peftc.runtime.writing import ROWS
from peftc.store.directory import FORMAT, MANIFEST, read_manifest, require_ours, write_directory
from peftc.store.fingerprint import fingerprint
from peftc.store.versions import versions

MIN_ORT = "1.28"
OPSET = 23  # has attention as one op
Progress = Callable[[str], None]


LARGE = 1 << 28  # bytes of weights; to look for less takes longer than it is worth


@dataclass(frozen=True)
class Subject:
    """A model as its bundle computes it, in float32 on the CPU: folded, with the `graphs` of its task."""

    task: Task
    model: PreTrainedModel
    report: Report
    inputs: Tensors

    @staticmethod
    def of(
        model: PreTrainedModel, example: Mapping[str, torch.Tensor] | None, say: Progress
    ) -> Subject:
        """Raises ExportError where there is no task for it, MergeError where folding changes the outputs."""
        model = on_the_cpu(model, torch.float32)
        inputs = sample(model, example)
        task, folded, report = task_of(Source(plain(model), inputs)), model, Report(())
        if isinstance(model, CompiledModel) and model.plan.edits:
            say("folding")
            folded, report = merge(model, example=example, shares=True)
        return Subject(task, folded.eval(), report, inputs)

    def graphs(self, layout: Layout) -> tuple[Graph, ...]:
        return tuple(layout.graphs(self.task, Source(self.model, self.inputs)))


def export(
    model: PreTrainedModel,
    bundle_dir: str | Path,
    *,
    opset: int | None = None,
    precision: str = "fp32",
    quantize: str | None = None,
    layout: str = "peftc",
    fuse: str | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    example: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Parity, ...]:
    """Fold, export, check and write a bundle; what cannot fold is in the graph as ops.

    `model` is compiled or plain, and suits one of `peftc.export.tasks`. Every graph is compared with torch on
    a grid of batch sizes, lengths, paddings and past lengths (`verified` takes all of it); `example` is one batch by
    argument name, where the inputs cannot be guessed. `tokenizer`, and `processor` of images or sounds, go into the
    bundle; `progress` is called with what is done. Gives a row for each graph: largest and mean difference, and its bound.

    `precision` is a row of `peftc.export.precision.PRECISIONS`, whatever the model's own type and device are; `quantize`
    one of QUANTIZED; `layout` one of `peftc.export.layouts.LAYOUTS`; `fuse` "cuda" or "cpu", whose provider's own ops
    are put where they compute the same. `opset` is 23, or 20 where ops are fused. What a bundle computes is compared
    with the model in float32. Raises ExportError, and then nothing is left at `bundle_dir`; MergeError when folding changes the
    outputs; DeltaError when that directory is not ours.
    """
    path = Path(bundle_dir)
    asked, files = precision_of(precision, quantize), layout_of(layout)
    provider = provider_of(fuse)
    opset = opset or (OPSET if provider is None else fusions.OPSET)
    _require(model, path)
    say = progress or (lambda _: None)
    certificate: list[Parity] = []
    mode = model.training
    try:
        one = Subject.of(model, example, say)
        folded = one.model

        def fill(directory: Path) -> Mapping[str, Any]:
            graphs = one.graphs(files)
            made, low = on_the_cpu(folded, asked.dtype), graphs
            if made is not folded:
                low = replace(one, model=made, inputs=sample(made, one.inputs)).graphs(files)
            models, ops = {}, {}
            for graph, exact in zip(low, graphs, strict=True):
                say(f"exporting {graph.role}")
                make = partial(_made, made, graph, opset, asked)
                if provider is None:
                    models[graph.role] = make()
                else:
                    tried = fusions.fused(make, provider, folded, exact, asked, directory)
                    models[graph.role], ops[graph.role] = tried
            ports = {role: ports_of(one) for role, one in models.items()}
            nodes = {role: [*origins.rows(one)] for role, one in models.items()}
            say("writing weights")
            size = write_models(models, directory)
            del models
            if size > LARGE:
                gc.collect()  # torch's exporters leave cycles around the weights that they were given
            for graph in graphs:
                say(f"checking {graph.role}")
                certificate.append(check(folded, graph, directory / f"{graph.role}.onnx", asked))
            rows = {g.names[k]: v.contiguous() for g in low for k, v in g.rows.items()}
            if rows:
                save_file(rows, directory / ROWS)
            _settings(folded, (tokenizer, processor), directory)
            if isinstance(model, CompiledModel):
                record.write(directory, model, one.report.outcomes, nodes)
            return {
                **_about(model, folded),
                "dtype": str(asked.dtype).removeprefix("torch."),
                "precision": asked.name,
                "graphs": {role: {"file": f"{role}.onnx", **one} for role, one in ports.items()},
                "kind": one.task.name,
                "layout": files.name,
                "opset": opset,
                **({} if provider is None else {"fused": {"for": provider, **ops}}),
                "data_bytes": size,
                "fold": {
                    "error": one.report.error,
                    "tolerance": tolerance(one.report.scale),
                    "seconds": one.report.seconds,
                },
                "parity": [asdict(one) for one in certificate],
            }

        with plain_experts(folded):
            write_directory(path, fill)
    finally:
        model.train(mode)
    return tuple(certificate)


def verified(
    model: PreTrainedModel,
    bundle_dir: str | Path,
    *,
    full: bool = False,
    example: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> Iterator[tuple[Parity, str]]:
    """What `export` certified, anew: each graph of a bundle against the model, folded as `export` does, on a part of the
    grid or the `full` one, and what is wrong with it, or nothing. Raises ExportError where the bundle is of another task
    or has other graphs."""
    path = Path(bundle_dir)
    manifest = read_manifest(path, KEYS)
    say, mode = progress or (lambda _: None), model.training
    kind, precision = kind_of(manifest), certified(manifest, path)
    files = layout_of(str(manifest.get("layout", "peftc")))
    try:
        one = Subject.of(model, example, say)
        if one.task.name != kind:
            raise ExportError(f"{path} is for {kind}, and this model for {one.task.name}")
        with plain_experts(one.model):
            for graph in one.graphs(files):
                say(f"checking {graph.role}")
                yield compared(one.model, graph, path / f"{graph.role}.onnx", precision, full)
    finally:
        model.train(mode)


def certified(manifest: Mapping[str, Any], path: Path) -> Precision:
    """The precision that the bundle at `path` was certified in. Raises ExportError for one that is not known here."""
    said = str(manifest.get("precision", "fp32"))
    known = {**PRECISIONS, **QUANTIZED}
    if said not in known:
        raise ExportError(
            f"{path / MANIFEST} has precision {said}; this peftc reads {', '.join(known)}"
        )
    return known[said]


def _made(model: PreTrainedModel, graph: Graph, opset: int, precision: Precision) -> Any:
    """A graph as an onnx_ir Model, its matrices in whole numbers where that was asked for."""
    made = to_onnx(model, graph, opset)
    return made if precision.bits is None else quantized(made, precision.bits)


def _require(model: PreTrainedModel, path: Path) -> None:
    """Everything that can be refused before any work is done."""
    require_onnx()
    require_ours(path)
    if (path / MANIFEST).is_file() and "graphs" not in read_manifest(path, ()):
        raise ExportError(
            f"{path} holds deltas, which a bundle would replace; choose another directory"
        )
    for name, one in held_small(model).items():
        raise ExportError(
            f"'{name}' of this {type(model).__name__} is quantised ({type(one).__name__}), and export writes ordinary "
            "weights: merge(dequantize=True) first, or quantise what was exported with ONNX Runtime"
        )


def _settings(folded: PreTrainedModel, makers: Iterable[Any], directory: Path) -> None:
    """The files of Hugging Face that a runner needs beside the graphs."""
    config = folded.config.to_dict()
    config.pop("_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if folded.can_generate():
        # Its save_pretrained refuses what generate() accepts, such as a temperature without sampling.
        settings = folded.generation_config.to_json_string()
        (directory / "generation_config.json").write_text(settings)
    for one in makers:
        if one is not None:
            one.save_pretrained(directory)
    _forget_paths(directory / "tokenizer_config.json")


def _about(model: PreTrainedModel, folded: PreTrainedModel) -> dict[str, Any]:
    """What the bundle is and what it was made of; the fingerprint is that of the backbone under the deltas."""
    plan = model.plan if isinstance(model, CompiledModel) else None
    learned = frozenset(one.path for one in plan.unfrozen) if plan else frozenset()
    return {
        "format": FORMAT,
        "max_tokens": longest_of(folded),
        "min_onnxruntime": MIN_ORT,
        "spec": {"name": plan.spec.name, "digest": digest(plan.spec)} if plan else None,
        "backbone": {
            "class": type(folded).__name__,
            "fingerprint": fingerprint(weights(model), learned),
        },
        "versions": versions(["onnx"]),
    }


def _forget_paths(file: Path) -> None:
    if file.is_file():
        data = json.loads(file.read_text())
        data.pop("name_or_path", None)
        file.write_text(json.dumps(data, indent=2) + "\n")
