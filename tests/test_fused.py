"""Fused: ONNX Runtime's own ops where they compute the same; elsewhere the graph as it was, and the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx_ir
import pytest
import torch
from conftest import Run, batch, logits, stir, tiny
from test_tasks import SMALL

import peftc
from peftc.export import fused
from peftc.rewrite.tolerance import tolerance

MODE = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False, num_beams=2)


def told(bundle: Path) -> dict[str, str]:
    found: dict[str, str] = json.loads((bundle / "peftc.json").read_text())["fused"]
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("family", "method"),
    [("bart", "lora"), ("llama", "mam"), ("gpt2", "mam"), ("t5", "lora"), ("whisper", "lora")],
)
def test_tokens_are_those_of_torch(family: str, method: str, tmp_path: Path) -> None:
    spec = peftc.load_spec(method, **SMALL.get(method, {}))
    model = stir(peftc.compile(tiny(family), spec))
    parity = peftc.export(model, tmp_path, fuse="cuda")
    assert all(one.error <= one.tolerance for one in parity)
    assert all("Attention" in told(tmp_path)[one.graph] for one in parity)
    assert json.loads((tmp_path / "peftc.json").read_text())["opset"] == 20
    inputs = batch(model, "right")
    inputs.pop("decoder_input_ids", None)
    runner = peftc.runtime.load(tmp_path, check=True)
    assert torch.equal(runner.generate(**inputs, **MODE), model.generate(**inputs, **MODE))


@pytest.mark.slow
def test_a_fusion_that_is_wrong_is_left_out(tmp_path: Path) -> None:
    """Met as it stands: transformers' fusion for BART's encoder computes something else once rows are in front."""
    spec = peftc.load_spec("mam", **SMALL["mam"])
    model = stir(peftc.compile(tiny("bart"), spec))
    peftc.export(model, tmp_path, fuse="cuda")
    said = told(tmp_path)
    assert said["for"] == "cuda" and "MultiHeadAttention" in said["decoder"]
    if said["encoder"].startswith("as it was"):
        assert "differs from torch" in said["encoder"]
        assert not fused.ops_of(onnx_ir.load(tmp_path / "encoder.onnx"))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("way", ["scales", "raises"])
def test_whatever_a_rewriter_does(
    way: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def breaks(model: Any, provider: str) -> None:
        if way == "raises":
            raise fused.ExportError("IndexError: of another form")
        real(model, provider)
        for value in model.graph.initializers.values():
            if len(value.shape) == 2 and value.dtype == onnx_ir.DataType.FLOAT:
                value.const_value = onnx_ir.tensor(value.const_value.numpy() * 1.01)

    real = fused._fuse
    monkeypatch.setattr(fused, "_fuse", breaks)
    model = stir(peftc.compile(tiny("roberta"), "lora"))
    peftc.export(model, tmp_path, fuse="cuda")
    assert told(tmp_path)["model"].startswith("as it was: ")
    inputs = batch(model)
    want = logits(model, inputs)
    runner = peftc.runtime.load(tmp_path)
    assert (runner(**inputs).logits - want).abs().max() <= tolerance(float(want.abs().max()))


def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    tiny("roberta").save_pretrained(tmp_path / "m")
    code, out, _ = run("export", tmp_path / "m", "-o", tmp_path / "b", "--fuse", "cpu")
    assert code == 0 and "model: fused 2 Attention" in out
    code, _, error = run("export", tmp_path / "m", "-o", tmp_path / "c", "--fuse", "tpu")
    assert code == 1 and "no fusions for 'tpu'; there are for cpu, cuda" in error
    assert not (tmp_path / "c").exists()
