"""The ONNX bundle: folded graphs, one weights file, config, tokenizer, and a certificate of parity."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import passes
from peftc.driver import merge
from peftc.export.graph import ExportError, Graph, require_onnx, to_onnx
from peftc.export.parity import Parity, check
from peftc.export.weights import write_models
from peftc.graph.arguments import forward_flags, reads_its_end, seeded_inputs
from peftc.graph.cache import flatten_cache
from peftc.graph.capture import capture
from peftc.graph.program import Program
from peftc.graph.rows import room_of
from peftc.language.resolved import digest
from peftc.model.compiled import CompiledModel
from peftc.rewrite.folding import Report
from peftc.rewrite.tolerance import tolerance
from peftc.store.directory import FORMAT, MANIFEST, read_manifest, require_ours, write_directory
from peftc.store.fingerprint import fingerprint

MIN_ORT = "1.28"
Progress = Callable[[str], None]


def export(
    model: PreTrainedModel,
    bundle_dir: str | Path,
    *,
    opset: int = 23,
    tokenizer: Any = None,
    progress: Progress | None = None,
) -> tuple[Parity, ...]:
    """Fold, export, check and write a bundle; what cannot fold is in the graph as ops.

    `model` is compiled or plain: a sequence classifier or an encoder-decoder. Every graph is compared
    with torch on a grid of batch sizes, lengths, paddings and past lengths. Raises ExportError, and then
    nothing is left at `bundle_dir`; DeltaError when that directory is not ours.
    """
    path = Path(bundle_dir)
    _require(model, path)
    say = progress or (lambda _: None)
    mode, folded, report = model.training, model, Report(())
    if isinstance(model, CompiledModel) and model.plan.edits:
        say("folding")
        folded, report = merge(model)
    folded.eval()
    certificate: list[Parity] = []

    def fill(directory: Path) -> Mapping[str, Any]:
        graphs = tuple(_graphs(folded))
        models = {}
        for graph in graphs:
            say(f"exporting {graph.role}")
            models[graph.role] = to_onnx(folded, graph, opset)
        say("writing weights")
        size = write_models(models, directory)
        del models
        for graph in graphs:
            say(f"checking {graph.role}")
            certificate.append(check(folded, graph, directory / f"{graph.role}.onnx"))
        _settings(folded, tokenizer, directory)
        return {
            **_about(model, folded, graphs),
            "opset": opset,
            "data_bytes": size,
            "fold": {"error": report.error, "tolerance": tolerance(report.scale)},
            "parity": [asdict(one) for one in certificate],
        }

    try:
        write_directory(path, fill)
    finally:
        model.train(mode)
    return tuple(certificate)


def _require(model: PreTrainedModel, path: Path) -> None:
    """Everything that can be refused before any work is done."""
    require_onnx()
    require_ours(path)
    if (path / MANIFEST).is_file() and "graphs" not in read_manifest(path, ()):
        raise ExportError(
            f"{path} holds deltas, which a bundle would replace; choose another directory"
        )
    if model.dtype != torch.float32 or model.device.type != "cpu":
        kind = f"{model.dtype} on {model.device}".removeprefix("torch.")
        raise ExportError(
            f"export takes float32 weights on the CPU, these are {kind}: model.float().cpu() first"
        )


def _program(model: PreTrainedModel, entry: str, inputs: Mapping[str, torch.Tensor]) -> Program:
    flags = forward_flags(model) if entry == "forward" else {}
    if isinstance(model, CompiledModel):
        return model.program(entry, inputs, flags)
    program = capture(model, entry, inputs, flags)
    passes.Normalize().run(program)
    program.finish()
    return program


def _graphs(model: PreTrainedModel) -> Iterator[Graph]:
    inputs = seeded_inputs(model)
    if reads_its_end(model):
        raise ExportError(
            f"{type(model).__name__} cannot be exported yet: it picks a state by the tokens' values"
        )
    if not model.config.is_encoder_decoder:
        if model.can_generate() or "input_ids" not in inputs:
            raise ExportError(
                f"{type(model).__name__} cannot be exported yet: sequence classifiers and encoder-decoders can"
            )
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        program = _program(model, "forward", inputs)
        names = {k: k for k in inputs}
        yield Graph("model", program, inputs, names, {"logits": "logits"}, dict.fromkeys(inputs, 0))
        return
    if "attention_mask" not in inputs:
        raise ExportError(
            f"{type(model).__name__} cannot be exported yet: its encoder reads {model.main_input_name}, "
            "and texts alone can be exported"
        )
    tokens = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        cache = model(**inputs, decoder_input_ids=tokens, use_cache=True).past_key_values
    past = {k: v.clone() for k, v in flatten_cache(cache).items()}
    cross = [k for k in past if ".cross." in k]
    encoder = {
        "last_hidden_state": "last_hidden_state",
        **{k: onnx_name(k, "present") for k in cross},
    }
    program, room = _program(model, "encode_cross", inputs), room_of(model)
    names, held = {k: k for k in inputs}, dict.fromkeys(inputs, 0)
    yield Graph("encoder", program, inputs, names, encoder, held)
    step = {"decoder_input_ids": tokens, "attention_mask": inputs["attention_mask"], **past}
    names = {"decoder_input_ids": "input_ids", "attention_mask": "encoder_attention_mask"}
    names |= {k: onnx_name(k, "past_key_values") for k in past}
    outputs = {k: onnx_name(k, "present") for k in past if k not in cross}
    program = _program(model, "decode", step)
    held = {name: room.held(name, seq2seq=True) for name in step}
    yield Graph("decoder", program, step, names, {"logits": "logits", **outputs}, held)


def onnx_name(name: str, prefix: str) -> str:
    """`past.self.0.key` as optimum and others name it: `present.0.decoder.key`."""
    _, part, layer, side = name.split(".")
    return f"{prefix}.{layer}.{'decoder' if part == 'self' else 'encoder'}.{side}"


def _settings(folded: PreTrainedModel, tokenizer: Any, directory: Path) -> None:
    """The files of Hugging Face that a runner needs beside the graphs."""
    config = folded.config.to_dict()
    config.pop("_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if folded.can_generate():
        # Its save_pretrained refuses what generate() accepts, such as a temperature without sampling.
        settings = folded.generation_config.to_json_string()
        (directory / "generation_config.json").write_text(settings)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        _forget_paths(directory / "tokenizer_config.json")


def _about(
    model: PreTrainedModel, folded: PreTrainedModel, graphs: tuple[Graph, ...]
) -> dict[str, Any]:
    """What the bundle is and what it was made of; the fingerprint is that of the backbone under the deltas."""
    plan = model.plan if isinstance(model, CompiledModel) else None
    learned = frozenset(one.path for one in plan.unfrozen) if plan else frozenset()
    return {
        "format": FORMAT,
        "kind": "seq2seq" if folded.config.is_encoder_decoder else "classifier",
        "graphs": {
            g.role: {
                "file": f"{g.role}.onnx",
                "inputs": [g.names[k] for k in g.inputs],
                "outputs": list(g.outputs.values()),
            }
            for g in graphs
        },
        "max_tokens": _max_tokens(folded),
        "dtype": str(folded.dtype).removeprefix("torch."),
        "min_onnxruntime": MIN_ORT,
        "spec": {"name": plan.spec.name, "digest": digest(plan.spec)} if plan else None,
        "backbone": {
            "class": type(folded).__name__,
            "fingerprint": fingerprint(model, learned),
        },
        "versions": {p: version(p) for p in ("peftc", "torch", "transformers", "onnx")},
    }


def _max_tokens(model: PreTrainedModel) -> int | None:
    """The longest text that there are positions for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    return None if positions is None else room_of(model).longest(int(positions))


def _forget_paths(file: Path) -> None:
    if file.is_file():
        data = json.loads(file.read_text())
        data.pop("name_or_path", None)
        file.write_text(json.dumps(data, indent=2) + "\n")
