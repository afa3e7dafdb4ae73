"""bitsandbytes' models as transformers loads them: test_bitsandbytes.py runs this where bitsandbytes is.

What computes is its own kernel, so beside a model of its own modules every number is the same to the bit, in any type.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from bitsandbytes.nn import Embedding4bit, Linear4bit
from conftest import Run, batch, logits, stir, tiny
from test_quantized import step
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

import peftc
from peftc.graph.quantized import backbone_bytes, dequantized, keep_as_stored, quantized
from peftc.interchange.write import export_peft

NF4 = dict(load_in_4bit=True, bnb_4bit_quant_type="nf4")
TWICE = dict(NF4, bnb_4bit_use_double_quant=True)
BF16 = dict(bnb_4bit_compute_dtype=torch.bfloat16)


def loaded(
    folder: Path,
    options: dict[str, Any],
    dtype: torch.dtype = torch.float32,
    family: str = "llama",
) -> PreTrainedModel:
    tiny(family).save_pretrained(folder / "whole")
    return AutoModelForCausalLM.from_pretrained(
        folder / "whole", dtype=dtype, quantization_config=BitsAndBytesConfig(**options)
    )


def alone(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that runs bitsandbytes' own modules, and leaves its weights as they are."""
    bare = copy.deepcopy(model)
    keep_as_stored(bare)
    return bare.eval()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options",
    [
        NF4,
        NF4 | BF16,
        TWICE | BF16,
        dict(load_in_4bit=True),
        NF4 | dict(bnb_4bit_quant_storage=torch.bfloat16),
    ],
)
def test_as_peft(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    """PEFT's LoRA over bitsandbytes' modules: values, and gradients of one step."""
    backbone = loaded(tmp_path, options, dtype)
    bare = alone(backbone)
    inputs = batch(bare, "left")
    want = logits(bare, inputs)
    model = peftc.compile(backbone, "lora").eval()
    assert torch.equal(logits(model, inputs), want)
    assert torch.equal(logits(model.backbone.eval(), inputs), want)
    export_peft(stir(model, 0.1), tmp_path / "adapter")
    other = peft.PeftModel.from_pretrained(bare, tmp_path / "adapter", is_trainable=True)
    half = torch.bfloat16 in (dtype, options.get("bnb_4bit_compute_dtype"))
    # LoRA's terms are summed in another order; of float32, or of a dozen products rounded to 2**-8.
    rounding = 3e-2 if half else 1e-5
    theirs = logits(other.eval(), inputs)
    assert (logits(model, inputs) - theirs).abs().max() <= rounding * theirs.abs().max()
    ours, wanted = (norms(one, inputs) for one in (model, other))
    assert ours == pytest.approx(wanted, rel=rounding)


def norms(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[float]:
    """The norms of the gradients of one step, in their order."""
    trained = [one for one in model.parameters() if one.requires_grad]
    loss = model(**inputs).logits.float().square().mean()
    return sorted(float(one.norm()) for one in torch.autograd.grad(loss, trained))


def test_trained_saved_merged(tmp_path: Path) -> None:
    """As QLoRA is used."""
    backbone = loaded(tmp_path, NF4 | BF16)
    before = {path: dequantized(one) for path, one in quantized(backbone).items()}
    assert len(before) == 14 and backbone.is_quantized
    model = peftc.compile(backbone, "lora")
    rows = [{"input_ids": row, "labels": row} for row in torch.randint(4, 120, (8, 6))]
    settings = TrainingArguments(
        tmp_path / "t",
        max_steps=3,
        learning_rate=1e-2,
        use_cpu=True,
        save_steps=3,
        lr_scheduler_type="constant",
        report_to=[],
    )
    Trainer(model, settings, train_dataset=rows).train()
    assert all(one.any() for one in model.deltas.parameters())
    inputs = batch(model.eval())
    logits(model.backbone.eval(), inputs)
    assert all(torch.equal(dequantized(one), before[k]) for k, one in quantized(model).items())
    model.save_pretrained(tmp_path / "d", state_dict=model.state_dict())
    for saved in (tmp_path / "d", tmp_path / "t" / "checkpoint-3"):
        again = peftc.load(saved, loaded(tmp_path, NF4 | BF16))
        assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
    settings.max_steps = 4
    Trainer(again, settings, train_dataset=rows).train(resume_from_checkpoint=True)
    want = logits(model, inputs)
    model.load_state_dict(again.state_dict(), strict=False)  # bitsandbytes reads none of its own
    assert torch.equal(logits(again.eval(), inputs), logits(model, inputs))
    assert not torch.equal(logits(model, inputs), want)
    merged, report = peftc.merge(model, dequantize=True)
    assert report.held == (backbone_bytes(model.backbone), backbone_bytes(merged))
    merged.save_pretrained(tmp_path / "merged")
    other = alone(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"))
    assert quantized(other).keys() == quantized(merged).keys() < before.keys()
    assert torch.equal(logits(other, inputs), logits(merged, inputs))


def test_the_commands(run: Run, tmp_path: Path) -> None:
    """A checkpoint of packed weights is a backbone like any other."""
    loaded(tmp_path, NF4).save_pretrained(tmp_path / "held")
    code, _, err = run("compile", "lora", "-m", tmp_path / "held", "-o", tmp_path / "d")
    assert code == 0, err
    assert run("verify", tmp_path / "d")[0] == 0
    code, _, err = run("merge", tmp_path / "d", "-o", tmp_path / "m")
    assert code == 1 and "--dequantize" in err
    assert run("merge", tmp_path / "d", "-o", tmp_path / "m", "--dequantize")[0] == 0
    assert len(quantized(AutoModelForCausalLM.from_pretrained(tmp_path / "m"))) == 10


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_prepared_for_training(method: str, tmp_path: Path) -> None:
    """PEFT's preparation makes all but the packed weights float32."""
    backbone = loaded(tmp_path, NF4 | BF16, torch.bfloat16)
    peft.prepare_model_for_kbit_training(backbone, use_gradient_checkpointing=False)
    bare = alone(backbone)
    model = peftc.compile(backbone, method).eval()
    inputs = batch(model)
    assert {one.dtype for one in model.deltas.parameters()} == {torch.float32}
    if method == "lora":
        assert torch.equal(logits(model, inputs), logits(bare, inputs))
    assert all(one.isfinite().all() for one in step(model, inputs)[0])


def test_a_turned_weight_is_not_merged(tmp_path: Path) -> None:
    """GPT-2's, which transformers turns before it is packed."""
    backbone = loaded(tmp_path, NF4, family="gpt2")
    bare = alone(backbone)
    model = peftc.compile(backbone, "lora").eval()
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(bare, inputs))
    with pytest.raises(peftc.PeftcError, match=r"c_attn\.weight' .* is that of a Conv1D"):
        peftc.merge(stir(model, 0.1), dequantize=True)


def test_the_bytes_of_a_step_are_counted(tmp_path: Path) -> None:
    assert peftc.saved(loaded(tmp_path, NF4), "lora", batch=2, length=8) == peftc.saved(
        tiny("llama"), "lora", batch=2, length=8
    )


def test_what_is_refused(tmp_path: Path) -> None:
    """With the reason; nothing is packed anew by a compiled model, nor by its backbone."""
    for call in (peftc.plan, peftc.compile):
        with pytest.raises(peftc.PeftcError, match=r"\(Int8Params\) .*load_in_4bit=True"):
            call(loaded(tmp_path, dict(load_in_8bit=True)), "lora")
    packed = loaded(tmp_path, NF4)
    packed.model.layers[0].mlp.up_proj.weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(peftc.PeftcError, match=r"up_proj\.weight' .* scales in bfloat16"):
        peftc.compile(packed, "lora")
    early = tiny("llama")
    early.model.layers[0].mlp.up_proj = Linear4bit(32, 64, bias=False)
    with pytest.raises(peftc.PeftcError, match=r"not packed yet; move the model"):
        peftc.compile(early, "lora")
    table = tiny("llama")
    held = Embedding4bit(*table.model.embed_tokens.weight.shape, dtype=torch.float32)
    table.model.embed_tokens = nn.Module.to(held, "cpu")
    with pytest.raises(peftc.PeftcError, match=r"in a Embedding4bit"):
        peftc.compile(table, "lora")
