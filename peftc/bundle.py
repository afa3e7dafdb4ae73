"""The ONNX bundle: folded graphs, one weights file, config, tokenizer, and a certificate of parity."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc import delta
from peftc.capture import capture, flatten_cache
from peftc.driver import merge, seeded_inputs
from peftc.inputs import forward_flags
from peftc.model import CompiledModel, run_program
from peftc.onnx_data import write_models
from peftc.onnx_graph import ExportError, Graph, to_onnx
from peftc.program import Program
from peftc.session import Session

MIN_ORT = "1.28"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Parity:
    """The largest difference of an output between ONNX Runtime and torch over `cases`, and its bound."""

    graph: str
    cases: int
    error: float
    tolerance: float


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
    delta.require_ours(path)
    say = progress or (lambda _: None)
    mode = model.training
    if isinstance(model, CompiledModel) and model.plan.edits:
        say("folding")
        folded, _ = merge(model)
    else:
        folded = model
    folded.eval()
    certificate: list[Parity] = []

    def fill(directory: Path) -> None:
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
            certificate.append(_check(folded, graph, directory))
        _describe(model, folded, graphs, certificate, opset, size, directory, tokenizer)

    try:
        delta.write_directory(path, fill)
    finally:
        model.train(mode)
    return tuple(certificate)


def _program(model: PreTrainedModel, entry: str, inputs: Mapping[str, torch.Tensor]) -> Program:
    flags = forward_flags(model) if entry == "forward" else {}
    if isinstance(model, CompiledModel):
        return model.program(entry, inputs, flags)
    import passes

    program = capture(model, entry, inputs, flags)
    passes.Normalize().run(program)
    program.finish()
    return program


def _graphs(model: PreTrainedModel) -> Iterator[Graph]:
    inputs = seeded_inputs(model)
    if not model.config.is_encoder_decoder:
        if model.can_generate() or "input_ids" not in inputs:
            raise ExportError(
                f"{type(model).__name__} cannot be exported yet: sequence classifiers and encoder-decoders can"
            )
        if getattr(model.config, "type_vocab_size", 0) > 1:
            inputs["token_type_ids"] = torch.zeros_like(inputs["input_ids"])
        program = _program(model, "forward", inputs)
        yield Graph("model", program, inputs, {k: k for k in inputs}, {"logits": "logits"})
        return
    tokens = inputs.pop("decoder_input_ids")
    with torch.no_grad():
        cache = model(**inputs, decoder_input_ids=tokens, use_cache=True).past_key_values
    past = {k: v.clone() for k, v in flatten_cache(cache).items()}
    cross = [k for k in past if ".cross." in k]
    encoder = {
        "last_hidden_state": "last_hidden_state",
        **{k: onnx_name(k, "present") for k in cross},
    }
    yield Graph(
        "encoder", _program(model, "encode_cross", inputs), inputs, {k: k for k in inputs}, encoder
    )
    step = {"decoder_input_ids": tokens, "attention_mask": inputs["attention_mask"], **past}
    names = {"decoder_input_ids": "input_ids", "attention_mask": "encoder_attention_mask"}
    names |= {k: onnx_name(k, "past_key_values") for k in past}
    outputs = {k: onnx_name(k, "present") for k in past if k not in cross}
    program = _program(model, "decode", step)
    yield Graph("decoder", program, step, names, {"logits": "logits", **outputs})


def onnx_name(name: str, prefix: str) -> str:
    """`past.self.0.key` as optimum and others name it: `present.0.decoder.key`."""
    _, part, layer, side = name.split(".")
    return f"{prefix}.{layer}.{'decoder' if part == 'self' else 'encoder'}.{side}"


def _cases(graph: Graph, longest: int) -> Iterator[dict[str, torch.Tensor]]:
    """Batch x length x padding x past, seeded; `past` only where the graph has one."""
    generator = torch.Generator().manual_seed(0)
    pasts = (0, 5) if any(k.startswith("past.self") for k in graph.inputs) else (0,)
    sizes = [n for n in (1, 7, 33) if n <= longest]
    for rows, length, side, past in itertools.product(
        (1, 3), sizes, ("none", "left", "right"), pasts
    ):
        mask = torch.ones(rows, length, dtype=torch.long)
        if side != "none" and length > 2:
            mask[0, slice(0, 2) if side == "left" else slice(-2, None)] = 0
        yield {
            name: _like(name, real, mask, past, generator) for name, real in graph.inputs.items()
        }


def _like(
    name: str, real: torch.Tensor, mask: torch.Tensor, past: int, generator: torch.Generator
) -> torch.Tensor:
    rows, length = mask.shape
    if name == "attention_mask":
        return mask
    if name == "token_type_ids":
        return torch.zeros_like(mask)
    if name.startswith("past."):
        size = (rows, real.shape[1], length if ".cross." in name else past, real.shape[3])
        return torch.randn(size, generator=generator, dtype=real.dtype)
    pool = real.reshape(-1)
    count = (rows, length if name == "input_ids" else 2)
    return pool[torch.randint(0, len(pool), count, generator=generator)]


def _check(model: PreTrainedModel, graph: Graph, directory: Path) -> Parity:
    """Every output of ONNX Runtime against torch; rows of padding are no one's business."""
    session = Session.open(directory / f"{graph.role}.onnx")
    error, scale, cases = 0.0, 1.0, 0
    longest = int(getattr(model.config, "max_position_embeddings", 64)) - 8
    for inputs in _cases(graph, longest):
        with torch.no_grad():
            want = run_program(model, graph.program, inputs)
        got = session.run({graph.names[k]: v for k, v in inputs.items()})
        for ours, theirs in graph.outputs.items():
            difference, size = _compare(want[ours], got[theirs], ours, inputs["attention_mask"])
            error, scale = max(error, difference), max(scale, size)
        cases += 1
    tolerance = 1e-4 * scale  # fp32: sums in another order, over the depth of the model
    if not error <= tolerance:
        raise ExportError(
            f"{graph.role}: ONNX Runtime differs from torch by {error:.1e}, more than {tolerance:.1e}"
        )
    return Parity(graph.role, cases, error, tolerance)


def _compare(
    want: torch.Tensor, got: torch.Tensor, name: str, mask: torch.Tensor
) -> tuple[float, float]:
    if name == "last_hidden_state":
        want, got = want[mask.bool()], got[mask.bool()]
    elif ".cross." in name:
        keep = mask.bool()[:, None, :, None].expand_as(want)
        want, got = want[keep], got[keep]
    if want.numel() == 0:
        return 0.0, 0.0
    if not torch.isfinite(got).all():
        return float("nan"), 0.0
    return (want - got).abs().max().item(), want.abs().max().item()


def _describe(
    model: PreTrainedModel,
    folded: PreTrainedModel,
    graphs: tuple[Graph, ...],
    certificate: list[Parity],
    opset: int,
    size: int,
    directory: Path,
    tokenizer: Any,
) -> None:
    config = folded.config.to_dict()
    config.pop("_name_or_path", None)
    (directory / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
    if folded.can_generate():
        folded.generation_config.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
        _forget_paths(directory / "tokenizer_config.json")
    plan = getattr(model, "plan", None)
    manifest = {
        "format": delta.FORMAT,
        "kind": "seq2seq" if folded.config.is_encoder_decoder else "classifier",
        "graphs": {
            g.role: {
                "file": f"{g.role}.onnx",
                "inputs": [g.names[k] for k in g.inputs],
                "outputs": list(g.outputs.values()),
            }
            for g in graphs
        },
        "opset": opset,
        "dtype": str(folded.dtype).removeprefix("torch."),
        "data_bytes": size,
        "min_onnxruntime": MIN_ORT,
        "spec": {"name": plan.spec.name, "digest": plan.spec.digest()} if plan else None,
        "backbone": {"class": type(folded).__name__, "fingerprint": delta.fingerprint(folded)},
        "parity": [asdict(one) for one in certificate],
        "versions": {p: version(p) for p in ("peftc", "torch", "transformers", "onnx")},
    }
    (directory / delta.MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")


def _forget_paths(file: Path) -> None:
    if file.is_file():
        data = json.loads(file.read_text())
        data.pop("name_or_path", None)
        file.write_text(json.dumps(data, indent=2) + "\n")
