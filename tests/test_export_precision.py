"""What a bundle computes with: stated, bounded against torch in float32, and the model as it was."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import onnx
import pytest
import torch
from conftest import Run, batch, logits, stir, tiny
from test_tasks import SMALL

import peftc
from peftc.errors import PeftcError
from peftc.export.precision import PRECISIONS, QUANTIZED, on_the_cpu
from peftc.model.compiled import CompiledModel


def compiled(family: str, method: str) -> CompiledModel:
    spec = peftc.load_spec(method, **SMALL.get(method, {}))
    return stir(peftc.compile(tiny(family), spec))


@pytest.mark.sampled(16)
@pytest.mark.parametrize("to", ["fp16", *QUANTIZED])
@pytest.mark.parametrize(
    ("family", "method"),
    [("bert", "lora"), ("llama", "mam"), ("bart", "mam"), ("neox", "prompt_tuning")],
)
def test_bounds(family: str, method: str, to: str, tmp_path: Path) -> None:
    model = compiled(family, method)
    wanted = {"quantize": to} if to in QUANTIZED else {"precision": to}
    row = QUANTIZED.get(to) or PRECISIONS[to]
    for one in peftc.export(model, tmp_path / "b", **wanted):
        assert one.error <= one.tolerance
        assert one.divergence <= row.divergence and one.agreement >= row.agreement
        assert one.error > 1e-6  # it is not float32 that was compared
    assert {one.dtype for one in model.parameters()} == {torch.float32}
    manifest = json.loads((tmp_path / "b" / "peftc.json").read_text())
    assert manifest["precision"] == to
    runner = peftc.runtime.load(tmp_path / "b")
    assert runner.dtype == row.dtype
    inputs = batch(model)
    if not runner.can_generate():
        want = logits(model, inputs)
        off = (runner(**inputs).logits.float() - want).abs().max()
        assert off <= row.share * want.abs().max()
        return
    inputs.pop("decoder_input_ids", None)
    tokens = runner.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert tokens.shape[0] == 3


@pytest.mark.parametrize("to", QUANTIZED)
@pytest.mark.parametrize("family", ["gpt2", "bart"])
def test_a_table_that_is_the_head_too(family: str, to: str, tmp_path: Path) -> None:
    """No product reads a matrix of floats: the head's is the table turned, which the quantizer by itself leaves alone."""
    model = tiny(family)
    assert model.get_input_embeddings().weight is model.lm_head.weight
    peftc.export(model, tmp_path / "b", quantize=to)
    for path in (tmp_path / "b").glob("*.onnx"):
        graph = onnx.load(path, load_external_data=False).graph
        floats = {one.name for one in graph.initializer if one.data_type == onnx.TensorProto.FLOAT}
        turned = {
            n.output[0] for n in graph.node if n.op_type == "Transpose" and n.input[0] in floats
        }
        read = {
            name for node in graph.node if node.op_type in ("MatMul", "Gemm") for name in node.input
        }
        assert not turned | (floats & read)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_from_a_model_in_any_type(dtype: torch.dtype, tmp_path: Path) -> None:
    """A bundle in float32 has the numbers of the model, which are halves, and computes in float32."""
    model = compiled("bert", "lora").to(dtype)
    peftc.export(model, tmp_path / "b")
    assert {one.dtype for one in model.parameters()} == {dtype}
    inputs, wide = batch(model), on_the_cpu(model, torch.float32)
    want = logits(wide, inputs)
    assert (peftc.runtime.load(tmp_path / "b")(**inputs).logits - want).abs().max() <= 1e-4


def test_frequencies_stay_in_float32() -> None:
    model = tiny("llama")
    low = on_the_cpu(model, torch.float16)
    assert low.dtype == torch.float16 and low.config.dtype == torch.float16
    frequencies = dict(low.named_buffers())["model.rotary_emb.inv_freq"]
    assert torch.equal(frequencies, dict(model.named_buffers())["model.rotary_emb.inv_freq"])
    assert on_the_cpu(model, torch.float32) is model


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"precision": "fp8"}, "no precision 'fp8'; there are fp32, fp16, bf16"),
        ({"quantize": "int2"}, "no quantisation 'int2'; there are int8, int4"),
        ({"precision": "fp16", "quantize": "int4"}, "int4 is of graphs in fp32"),
        ({"precision": "bf16"}, "bfloat16 on a GPU alone, and here is none"),
    ],
)
def test_what_is_refused(asked: dict[str, str], message: str, tmp_path: Path) -> None:
    if asked.get("precision") == "bf16" and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(PeftcError, match=message):
        peftc.export(tiny("bert"), tmp_path / "b", **asked)
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_what_is_too_far_off_is_not_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """T5 does not scale its attention: four bits of its weights turn into other numbers."""
    with pytest.raises(PeftcError, match=r"coder: .* (differs from torch by|choices are torch)"):
        peftc.export(tiny("t5"), tmp_path / "b", quantize="int4")
    strict = dataclasses.replace(QUANTIZED["int4"], agreement=0.999)
    monkeypatch.setitem(QUANTIZED, "int4", strict)  # type: ignore[arg-type]
    with pytest.raises(PeftcError, match=r"in int4 .*% of \d+ choices are torch's and the KL is"):
        peftc.export(tiny("llama"), tmp_path / "b", quantize="int4")
    assert not (tmp_path / "b").exists()


def test_the_command_says_what_changed(run: Run, tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "model")
    code, out, _ = run("export", tmp_path / "model", "-o", tmp_path / "b", "--quantize", "int4")
    assert code == 0
    assert "of choices are torch's, KL" in out
