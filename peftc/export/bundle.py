"""The ONNX bundle: folded graphs, one weights file, config, tokenizer, and a certificate of parity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from peftc.driver import sample
from peftc.export.graph import ExportError, plain_experts, ports_of, require_onnx, to_onnx
from peftc.export.parity import Parity, check
from peftc.export.precision import on_the_cpu, precision_of, quantized
from peftc.export.source import Source
from peftc.export.tasks import task_of
from peftc.export.weights import write_models
from peftc.graph.placement import weights
from peftc.graph.quantized import quantized as held_small
from peftc.graph.rows import longest_of
from peftc.language.resolved import digest
from peftc.merging import merge
from peftc.model.compiled import CompiledModel
from peftc.rewrite.folding import Report
from peftc.rewrite.tolerance import tolerance
from peftc.runtime.writing import ROWS
from peftc.store.directory import FORMAT, MANIFEST, read_manifest, require_ours, write_directory
from peftc.store.fingerprint import fingerprint
from peftc.store.versions import versions

MIN_ORT = "1.28"
Progress = Callable[[str], None]


def export(
    model: PreTrainedModel,
    bundle_dir: str | Path,
    *,
    opset: int = 23,
    precision: str = "fp32",
    quantize: str | None = None,
    tokenizer: Any = None,
    processor: Any = None,
    example: Mapping[str, torch.Tensor] | None = None,
    progress: Progress | None = None,
) -> tuple[Parity, ...]:
    """Fold, export, check and write a bundle; what cannot fold is in the graph as ops.

    `model` is compiled or plain, and suits one of `peftc.export.tasks`. Every graph is compared with torch on
    a grid of batch sizes, lengths, paddings and past lengths; `example` is one batch by argument name, where the
    inputs cannot be guessed. `tokenizer`, and `processor` of images or sounds, go into the bundle.

    `precision` is a row of `peftc.export.precision.PRECISIONS`, whatever the model's own type and device are; `quantize`
    one of QUANTIZED. What a bundle computes is compared with the model in float32. Raises ExportError, and then nothing
    is left at `bundle_dir`; MergeError when folding changes the outputs; DeltaError when that directory is not ours.
    """
    path = Path(bundle_dir)
    _require(model, path)
    asked = precision_of(precision, quantize)
    given, model = model, on_the_cpu(model, torch.float32)
    inputs = sample(model, example)
    task = task_of(Source(model, inputs))
    say = progress or (lambda _: None)
    mode, folded, report = given.training, model, Report(())
    if isinstance(model, CompiledModel) and model.plan.edits:
        say("folding")
        folded, report = merge(model, example=example)
    folded.eval()
    certificate: list[Parity] = []

    def fill(directory: Path) -> Mapping[str, Any]:
        graphs = tuple(task.graphs(Source(folded, inputs)))
        made, low = on_the_cpu(folded, asked.dtype), graphs
        if made is not folded:
            low = tuple(task.graphs(Source(made, sample(made, inputs))))
        models = {}
        for graph in low:
            say(f"exporting {graph.role}")
            models[graph.role] = to_onnx(made, graph, opset)
            if asked.bits is not None:
                models[graph.role] = quantized(models[graph.role], asked.bits)
        ports = {role: ports_of(one) for role, one in models.items()}
        say("writing weights")
        size = write_models(models, directory)
        del models
        for graph in graphs:
            say(f"checking {graph.role}")
            certificate.append(check(folded, graph, directory / f"{graph.role}.onnx", asked))
        rows = {g.names[k]: v.contiguous() for g in low for k, v in g.rows.items()}
        if rows:
            save_file(rows, directory / ROWS)
        _settings(folded, (tokenizer, processor), directory)
        return {
            **_about(model, folded),
            "dtype": str(asked.dtype).removeprefix("torch."),
            "precision": asked.name,
            "graphs": {role: {"file": f"{role}.onnx", **one} for role, one in ports.items()},
            "kind": task.name,
            "opset": opset,
            "data_bytes": size,
            "fold": {"error": report.error, "tolerance": tolerance(report.scale)},
            "parity": [asdict(one) for one in certificate],
        }

    try:
        with plain_experts(folded):
            write_directory(path, fill)
    finally:
        given.train(mode)
    return tuple(certificate)


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
