"""Quantised backbones: torchao's int8 and int4 weights, and bitsandbytes' of four bits where that is installed, compute
under deltas, train, save and merge as what they stand for.

int8 multiplies by whole numbers and scales the sum, which moves the last bits of a float32.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Run, batch, logits, stir, tiny
from methods import spec
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_
from transformers import (
    LlamaForCausalLM,
    PreTrainedModel,
    TorchAoConfig,
    Trainer,
    TrainingArguments,
)

import peftc
from peftc.graph.layers import layers_of
from peftc.graph.quantized import (
    QuantizedError,
    backbone_bytes,
    dequantized,
    held_bytes,
    meant,
    open_up,
    quantized,
    readers,
    require_straight,
)
from peftc.rewrite.tolerance import tolerance

FORMATS = {"int8": Int8WeightOnlyConfig(), "int4": PrototypeInt4WeightOnlyConfig(group_size=32)}
# bitsandbytes is no dependency: test_bitsandbytes.py runs these where it is.
FOUR_BIT = {
    "nf4": dict(quant_type="nf4", compress_statistics=False),
    "nf4_twice": dict(quant_type="nf4", compress_statistics=True),
    "fp4": dict(quant_type="fp4", compress_statistics=False),
}
KINDS = [*FORMATS, *(FOUR_BIT if importlib.util.find_spec("bitsandbytes") else ())]
CELLS = [
    ("lora", "llama"),
    ("mam", "llama"),
    ("dora", "llama"),
    ("pissa", "bert"),
    ("bitfit", "bert"),
]
formats = pytest.mark.parametrize("kind", KINDS)


def small(family: str, kind: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """A model whose layers' linears are quantised."""
    model = tiny(family).to(dtype)
    inside = tuple(f"{path}." for path in layers_of(model))
    if kind in FOUR_BIT:
        return four_bit(model, inside, FOUR_BIT[kind])
    quantize_(
        model,
        FORMATS[kind],
        lambda one, path: isinstance(one, nn.Linear) and path.startswith(inside),
    )
    return model


def four_bit(
    model: PreTrainedModel, inside: tuple[str, ...], options: dict[str, Any]
) -> PreTrainedModel:
    """As transformers puts bitsandbytes' linears in the place of a model's."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for path, one in [*model.named_modules()]:
        if isinstance(one, nn.Linear) and path.startswith(inside):
            new = Linear4bit(
                one.in_features,
                one.out_features,
                one.bias is not None,
                compute_dtype=model.dtype,
                **options,
            )
            new.weight = Params4bit(one.weight.data, module=new, **options).to("cpu")
            new.bias = one.bias
            model.set_submodule(path, new.train(one.training))
    return model


def twin(model: PreTrainedModel) -> PreTrainedModel:
    """The same model with ordinary weights."""
    plain = copy.deepcopy(model)
    open_up(plain)
    assert not quantized(plain)
    return plain


# Of the largest value: sums of up to 64 float32 terms in another order, over two layers and back; 1.3e-6 was seen.
ROUNDING = 1e-5


def near(one: torch.Tensor, other: torch.Tensor, scale: torch.Tensor) -> bool:
    return bool((one - other).abs().max() <= ROUNDING * scale.abs().max())


def step(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, set[tuple[int, ...]]]:
    """The gradients of one step in one row, and the shapes of what it kept for the way back but for parameters."""
    own = {one.untyped_storage()._cdata for one in model.parameters() if type(one) is nn.Parameter}
    kept: set[tuple[int, ...]] = set()

    def pack(one: torch.Tensor) -> torch.Tensor:
        if one.untyped_storage()._cdata not in own:
            kept.add(tuple(one.shape))
        return one

    model.train()(**inputs)  # a trace keeps for itself what the hook would see
    torch.manual_seed(0)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda one: one):
        output = model(**inputs).logits
    trained = [one for one in model.parameters() if one.requires_grad]
    found = torch.autograd.grad(output.square().mean(), trained)
    model.eval()
    return torch.cat([one.flatten() for one in found]), kept


@pytest.mark.habit("models: torchao's int8 and int4", "the dequantised model, values and gradients")
@pytest.mark.sampled(8)
@formats
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_as_what_it_stands_for(method: str, family: str, kind: str) -> None:
    """Values, gradients, tokens. The kernels run, and no step keeps a matrix that they could not keep."""
    held = small(family, kind)
    plain = twin(held)
    torch.manual_seed(0)
    model = stir(peftc.compile(held, spec(method)), 0.1).eval()
    torch.manual_seed(0)
    other = stir(peftc.compile(plain, spec(method)), 0.1).eval()
    inputs = batch(model, "left")
    want = logits(other, inputs)
    assert near(logits(model, inputs), want, want)
    (ours, kept), (theirs, _) = step(model, inputs), step(other, inputs)
    assert near(ours, theirs, theirs)
    weights = {meant(one)[0] for one in quantized(model.backbone).values()}
    assert method == "dora" or not kept & {
        turned for n, m in weights for turned in ((n, m), (m, n))
    }
    rewritten = len(model.plan.edits) if method == "dora" else 0
    calls = [n.target for n in model.lean_program(inputs).graph.nodes]
    reader = next(iter(readers(model.backbone).values()))
    assert calls.count(reader.linear) == len(quantized(model.backbone)) - rewritten
    assert calls.count(reader.whole) == rewritten
    if method == "lora":
        more = dict(max_new_tokens=4, pad_token_id=1)
        tokens = [one.generate(**inputs, **more, num_beams=2) for one in (model, other)]
        assert torch.equal(*tokens)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@formats
def test_the_bytes_of_the_backbone(kind: str, dtype: torch.dtype) -> None:
    """int8: one for each number, and for each row a float32 scale and a zero point of one. int4: a half, and for 32 numbers
    of a row a scale and a zero point. nf4, fp4: a half, for 64 numbers a float32 scale, and the 16 values that numbers
    stand for; twice: for 64 numbers a byte, for 256 of these a float32, and the 256 values that those stand for. Nothing
    is copied by compiling, nor by a step."""
    backbone = small("llama", kind, dtype)
    scale = dtype.itemsize
    held = quantized(backbone)
    blocks, table = (lambda n: math.ceil(n / 64)), 16 * 4
    bytes_of = {
        "int8": lambda rows, columns: rows * columns + rows * (4 + 1),
        "int4": lambda rows, columns: rows * columns // 2 + rows * columns // 32 * 2 * scale,
        "nf4": lambda *n: math.prod(n) // 2 + blocks(math.prod(n)) * 4 + table,
        "nf4_twice": lambda *n: (
            math.prod(n) // 2
            + blocks(math.prod(n))
            + math.ceil(blocks(math.prod(n)) / 256) * 4
            + table
            + 256 * 4
        ),
        "fp4": lambda *n: math.prod(n) // 2 + blocks(math.prod(n)) * 4 + table,
    }[kind]
    want = sum(bytes_of(*meant(one)[0]) for one in held.values())
    rest = sum(p.numel() for k, p in backbone.named_parameters() if k not in held) * scale
    assert backbone_bytes(backbone) == want + rest
    model = peftc.compile(backbone, "lora")
    assert model.plan.quantized.bytes == want
    assert model.plan.quantized.numel == sum(meant(one)[0].numel() for one in held.values())
    step(model, batch(model))
    assert all(one is held[path] for path, one in quantized(model).items())
    trained = [path for path, one in model.named_parameters() if one.requires_grad]
    assert trained and all(path.startswith("deltas.") for path in trained)


@pytest.mark.parametrize("rows", [16, 48, 64, 208])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_numbers_are_read_as_the_kernel_reads_them(dtype: torch.dtype, rows: int) -> None:
    """A product with the unit matrix is the weight; of two roundings, of a product and a sum, the kernel may leave one out."""
    module = nn.Linear(128, rows, bias=False).to(dtype)
    quantize_(module, FORMATS["int4"])
    with torch.no_grad():
        want = module(torch.eye(128, dtype=dtype)).t()
    got = dequantized(module.weight)
    assert (got - want).abs().max() <= 2 * torch.finfo(dtype).eps * want.abs().max()


@formats
def test_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model = stir(peftc.compile(small("llama", kind), "lora"), 0.1)
    inputs = batch(model)
    model.save_pretrained(tmp_path / "d")
    again = peftc.load(tmp_path / "d", small("llama", kind))
    assert torch.equal(logits(again, inputs), logits(model, inputs))
    opened = peftc.load(tmp_path / "d", twin(small("llama", kind)))
    assert near(logits(opened, inputs), logits(model, inputs), logits(model, inputs))
    with pytest.raises(peftc.PeftcError, match=r"another backbone .*: its weights differ"):
        peftc.load(tmp_path / "d", tiny("llama"))


@formats
def test_a_merge_is_asked_for(kind: str) -> None:
    """What something folds into becomes an ordinary weight, and takes the bytes of one; the others stay."""
    model = stir(peftc.compile(small("llama", kind), "lora"), 0.1)
    reason = r"LlamaForCausalLM: '.*q_proj\.weight' \(4 in all\) is quantised \((Int.*Tensor|Params4bit)\).*dequantize=True"
    with pytest.raises(peftc.PeftcError, match=reason):
        peftc.merge(model)
    merged, report = peftc.merge(model, dequantize=True)
    assert not report.kept and report.changed > 0
    assert 0 < report.error <= tolerance(report.scale)
    assert report.held == (backbone_bytes(model.backbone), backbone_bytes(merged))
    before, after = quantized(model.backbone), quantized(merged)
    folded = before.keys() - after.keys()
    assert {path.split(".")[-2] for path in folded} == {"q_proj", "v_proj"}
    grown = sum(meant(before[path])[0].numel() * 4 for path in folded)
    assert report.held[1] - report.held[0] == grown - sum(held_bytes(before[p]) for p in folded)


@formats
def test_what_does_not_fold_is_not_refused(kind: str) -> None:
    model = stir(peftc.compile(small("bart", kind), spec("mam")), 0.1)
    rest, report = peftc.merge(model)
    assert report.kept and not report.folded
    assert quantized(rest.backbone).keys() == quantized(model.backbone).keys()


@formats
def test_pruned_over_whole_numbers(kind: str) -> None:
    model = stir(peftc.compile(small("llama", kind), "lora"), 0.1)
    pruned, cut = peftc.prune(model, 500)
    assert cut.kept == 500 and len(quantized(pruned.backbone)) == len(quantized(model.backbone))
    other, _ = peftc.prune(stir(peftc.compile(twin(small("llama", kind)), "lora"), 0.1), 500)
    inputs = batch(model)
    want = logits(other, inputs)
    assert near(logits(pruned, inputs), want, want)


WORDS = """
name: words
with: {l: 3}
deltas:
  - at: attention.heads
    words: [5, 6, 7]
    params:
      P_k: {shape: [kv_heads, l, head_dim], init: k}
      P_v: {shape: [kv_heads, l, head_dim], init: v}
    rewrite: {k: "prepend(P_k, k)", v: "prepend(P_v, v)"}
"""


def test_words_are_read_by_the_kernels(tmp_path: Path) -> None:
    path = tmp_path / "words.yaml"
    path.write_text(WORDS)
    held = small("llama", "int8")
    ours, theirs = (peftc.compile(one, path).deltas.values() for one in (held, twin(held)))
    for name, value in theirs.items():
        assert near(ours[name], value, value)


@pytest.mark.habit(
    "models: torchao's, loaded by transformers, trained, merged", "the merge, saved and loaded"
)
def test_loaded_by_transformers_and_trained_by_its_trainer(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path / "whole")
    backbone = LlamaForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=TorchAoConfig(FORMATS["int8"])
    )
    held = quantized(backbone)
    assert len(held) == 14 and backbone.is_quantized
    model = peftc.compile(backbone, "lora")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 120, (8, 6))]
    settings = TrainingArguments(
        tmp_path / "t",
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
    )
    trainer = Trainer(model, settings, train_dataset=rows)
    trainer.train()
    assert all(one.any() for one in model.deltas.parameters())
    inputs = batch(model)
    merged, _ = peftc.merge(model.eval(), dequantize=True)
    merged.save_pretrained(tmp_path / "merged")
    again = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    assert quantized(again).keys() == quantized(merged).keys() < held.keys()
    assert torch.equal(logits(again, inputs), logits(merged, inputs))


def test_the_commands(run: Run, tmp_path: Path) -> None:
    """A quantised checkpoint is a backbone like any other, and a merge of it is asked for."""
    tiny("llama").save_pretrained(tmp_path / "whole")
    LlamaForCausalLM.from_pretrained(
        tmp_path / "whole", quantization_config=TorchAoConfig(FORMATS["int8"])
    ).save_pretrained(tmp_path / "held")
    code, out, err = run("compile", "lora", "-m", tmp_path / "held", "-o", tmp_path / "d")
    assert code == 0, err
    assert re.search(r"of it +18,432 .*quantised, in 20,992 bytes: 9.11 bits each", out)
    assert run("verify", tmp_path / "d")[0] == 0
    code, _, err = run("merge", tmp_path / "d", "-o", tmp_path / "m")
    assert code == 1 and "--dequantize" in err
    code, out, _ = run("merge", tmp_path / "d", "-o", tmp_path / "m", "--dequantize")
    assert code == 0 and re.search(r"bytes of the backbone +[\d,]+ -> [\d,]+", out)
    assert len(quantized(LlamaForCausalLM.from_pretrained(tmp_path / "m"))) == 10


def test_the_graph_is_the_one_for_the_weights_of_now() -> None:
    """A backbone may be quantised, and made whole, after it was compiled."""
    model = stir(peftc.compile(tiny("llama"), "lora"), 0.1)
    inputs = batch(model)
    before = logits(model, inputs)
    other = tiny("llama")
    for one in (model.backbone, other):
        quantize_(one.model, FORMATS["int4"])
    there = stir(peftc.compile(other, "lora"), 0.1)
    assert torch.equal(logits(model, inputs), logits(there, inputs))
    assert not near(logits(model, inputs), before, before)
    open_up(model.backbone)
    assert near(logits(model, inputs), logits(there, inputs), before)


@pytest.mark.slow
@formats
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_torch_compile_and_layers_computed_twice(method: str, kind: str) -> None:
    """To the bit, with gradients: the kernel, and the product with what the weight stands for."""
    model = stir(peftc.compile(small("llama", kind), method), 0.1)
    inputs = batch(model, "left")
    want, (gradients, _) = logits(model, inputs), step(model, inputs)
    traced = torch.compile(model, backend="aot_eager")
    assert torch.equal(logits(traced, inputs), want)
    output = traced.train()(**inputs).logits
    learned = [one for one in model.parameters() if one.requires_grad]
    found = torch.autograd.grad(output.square().mean(), learned)
    assert torch.equal(torch.cat([one.flatten() for one in found]), gradients)
    torch._dynamo.reset()
    model.activation_checkpointing_enable()
    assert torch.equal(step(model, inputs)[0], gradients)


@formats
def test_autocast(kind: str) -> None:
    """Kernels compute in the type of their weight, and give that of their input, with gradients."""
    model = stir(peftc.compile(small("llama", kind), "lora"), 0.1)
    inputs = batch(model)
    want = step(model, inputs)[0]
    with torch.autocast("cpu", torch.bfloat16):
        got = step(model, inputs)[0]
    # The roundings of bfloat16, 2**-8 each, of a dozen products on the way to a gradient and back.
    assert (got - want).abs().max() <= 0.1 * want.abs().max()
    assert not torch.equal(got, want)


def test_a_weight_that_would_train_is_refused() -> None:
    backbone = tiny("bert")
    quantize_(backbone, FORMATS["int8"])
    with pytest.raises(
        peftc.PeftcError, match=r"head\.yaml:.*: head would train 'classifier\.weight' .* quantised"
    ):
        peftc.compile(backbone, "head")


def test_export_is_refused(tmp_path: Path) -> None:
    model = peftc.compile(small("bert", "int8"), "lora")
    with pytest.raises(peftc.PeftcError, match=r"quantised \(Int8Tensor\), and export writes"):
        peftc.export(model, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(
    ("name", "reason"), [("Params4bit", "not packed yet"), ("Int8Params", "rounded to 8 bits")]
)
def test_what_stands_for_no_matrix_is_refused(name: str, reason: str) -> None:
    kind = type(name, (nn.Parameter,), {})
    backbone = tiny("llama")
    owner = backbone.model.layers[1].mlp.up_proj
    owner.weight = kind(torch.zeros(1, 64, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(
        peftc.PeftcError, match=rf"up_proj\.weight' of .* by bitsandbytes \({name}\) .*{reason}"
    ):
        peftc.plan(backbone, "lora")


def test_what_was_turned_is_merged_into_no_checkpoint() -> None:
    """As bitsandbytes leaves a Conv1D, with the class that it was (tests/four_bits.py merges real ones)."""
    model, path = tiny("gpt2"), "transformer.h.0.attn.c_attn.weight"
    require_straight(model, [path])
    module = model.get_submodule(path.rpartition(".")[0])
    module.source_cls = type(module)
    with pytest.raises(QuantizedError, match=r"c_attn\.weight' .* is that of a Conv1D"):
        require_straight(model, [path])
