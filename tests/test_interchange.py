"""PEFT's checkpoints: the same logits after reading, the same folded weights, and LoRA written back exactly."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from conftest import batch, logits, stir, tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.interchange.read import import_peft
from peftc.interchange.write import export_peft

Q, K, V, DOWN = (
    {"bart": "q_proj", "roberta": "query", "llama": "q_proj"},
    {"bart": "k_proj", "roberta": "key", "llama": "k_proj"},
    {"bart": "v_proj", "roberta": "value", "llama": "v_proj"},
    {"bart": "fc2", "roberta": "output.dense", "llama": "down_proj"},
)


def config(kind: str, family: str) -> peft.PeftConfig:
    q, v = Q[family], V[family]
    match kind:
        case "lora":
            return peft.LoraConfig(r=4, lora_alpha=8, target_modules=[q, v])
        case "patterns":
            first = {"bart": "layers.0.self_attn.q_proj", "roberta": "layer.0.attention.self.query"}
            name = first.get(family, "layers.0.self_attn.q_proj")
            return peft.LoraConfig(
                r=4, target_modules=[q, v], rank_pattern={name: 2}, alpha_pattern={name: 32}
            )
        case "rslora":
            return peft.LoraConfig(r=4, lora_alpha=8, use_rslora=True, target_modules=[q])
        case "dora":
            return peft.LoraConfig(r=4, lora_alpha=8, use_dora=True, target_modules=[q, v])
        case "ia3":
            down = DOWN[family]
            return peft.IA3Config(target_modules=[K[family], v, down], feedforward_modules=[down])
        case "vera":
            return peft.VeraConfig(r=4, target_modules=[q, DOWN[family]])
        case "loha":
            return peft.LoHaConfig(r=4, alpha=8, target_modules=[q, v])
        case "lokr":
            return peft.LoKrConfig(r=2, alpha=8, target_modules=[q, DOWN[family]])
    raise AssertionError(kind)


def adapter(kind: str, family: str, path: Path) -> PreTrainedModel:
    """PEFT's model with weights of some size, and its checkpoint at `path`."""
    torch.manual_seed(3)
    model = peft.get_peft_model(tiny(family), config(kind, family)).eval()
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize("family", ["bart", "roberta", "llama"])
@pytest.mark.parametrize(
    "kind", ["lora", "patterns", "rslora", "dora", "ia3", "vera", "loha", "lokr"]
)
def test_import(kind: str, family: str, tmp_path: Path) -> None:
    theirs = adapter(kind, family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine)
    want = logits(theirs, inputs)
    bound = 1e-5 * want.abs().max().clamp(min=1)  # fp32, two layers
    assert (logits(mine, inputs) - want).abs().max() <= bound
    assert (want - logits(tiny(family), inputs)).abs().max() > 1e-3
    merged, report = peftc.merge(mine)
    assert not report.kept
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, value in merged.named_parameters():
        assert (value - weights[name]).abs().max() <= 1e-5 * value.abs().max().clamp(min=1), name


@pytest.mark.parametrize("family", ["bart", "roberta", "gpt2", "neox"])
def test_export_and_back(family: str, tmp_path: Path) -> None:
    backbone = tiny(family)
    mine = stir(peftc.compile(backbone, peftc.load_spec("lora", r=4, alpha=8)), 0.1)
    modules = export_peft(mine, tmp_path / "adapter")
    theirs = peft.PeftModel.from_pretrained(tiny(family), tmp_path / "adapter").eval()
    inputs = batch(mine)
    want = logits(mine, inputs)
    assert (logits(theirs, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)
    again = import_peft(tmp_path / "adapter", tiny(family))
    assert len(again.plan.edits) == len(modules)
    export_peft(again, tmp_path / "again")
    first, second = (
        load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "again")
    )
    assert first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def test_a_head_that_was_saved_whole(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = peft.LoraConfig(task_type="SEQ_CLS", r=4, target_modules=["query"])
    theirs = peft.get_peft_model(tiny("roberta"), settings).eval()
    with torch.no_grad():
        for value in (p for p in theirs.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    theirs.save_pretrained(tmp_path / "a")
    mine = import_peft(tmp_path / "a", tiny("roberta"))
    inputs = batch(mine)
    assert (logits(mine, inputs) - logits(theirs, inputs)).abs().max() <= 1e-5
    mine.save_pretrained(tmp_path / "deltas")
    again = peftc.load(tmp_path / "deltas", backbone=tiny("roberta"))
    assert torch.equal(logits(again, inputs), logits(mine, inputs))


TASK = {
    "gpt2": "CAUSAL_LM",
    "llama": "CAUSAL_LM",
    "neox": "CAUSAL_LM",
    "gemma2": "CAUSAL_LM",
    "bert": "SEQ_CLS",
    "roberta": "SEQ_CLS",
    "bart": "SEQ_2_SEQ_LM",
    "t5": "SEQ_2_SEQ_LM",
}
ROWS = {
    "prompt": peft.PromptTuningConfig,
    "p-tuning": peft.PromptEncoderConfig,
    "prefix": peft.PrefixTuningConfig,
}


def rows(kind: str, family: str, path: Path) -> PreTrainedModel:
    """PEFT's model with five rows of some size in front, and its checkpoint at `path`."""
    torch.manual_seed(3)
    settings = ROWS[kind](task_type=TASK[family], num_virtual_tokens=5)
    model = peft.get_peft_model(tiny(family), settings).eval()
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.3)
    model.save_pretrained(path)
    return model


@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *(("prompt", family) for family in ("gpt2", "llama", "gemma2", "roberta", "bart", "t5")),
        *(("p-tuning", family) for family in ("gpt2", "neox", "bert")),
        *(("prefix", family) for family in ("gpt2", "llama", "neox", "roberta")),
    ],
)
def test_rows_in_front(kind: str, family: str, tmp_path: Path) -> None:
    """The cases in which PEFT is right: no prefix of an encoder-decoder."""
    theirs = rows(kind, family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine, "right")
    want, got, bare = (logits(one, inputs) for one in (theirs, mine, tiny(family)))
    if kind != "prefix" and TASK[family] == "CAUSAL_LM":
        want = want[:, 5:]  # PEFT returns the outputs of its rows too
    real = inputs["attention_mask"] > 0 if TASK[family] == "CAUSAL_LM" else slice(None)
    assert (got - want)[real].abs().max() <= 1e-5 * want[real].abs().max().clamp(min=1)
    assert (got - bare)[real].abs().max() > 1e-2


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_prefix_of_peft_token_by_token(family: str, tmp_path: Path) -> None:
    """The cache holds the tokens alone; their positions are behind the prefix all the same."""
    theirs = rows("prefix", family, tmp_path)
    mine = import_peft(tmp_path, tiny(family))
    inputs = batch(mine)
    settings = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, pad_token_id=0)
    got = mine.generate(**inputs, **settings)
    assert torch.equal(got, theirs.generate(**inputs, **settings))
    assert torch.equal(got, mine.generate(**inputs, **settings, use_cache=False))
    kept = peftc.spec.parse_spec(mine.plan.spec.text.replace("    positions: shift\n", ""), "kept")
    other = peftc.compile(tiny(family), kept)
    for name, value in mine.deltas.values().items():
        other.deltas.values()[name].data.copy_(value)
    assert (logits(other, inputs) - logits(mine, inputs)).abs().max() > 1e-3


def test_peft_prefixes_an_encoder_decoder_otherwise_than_the_paper(tmp_path: Path) -> None:
    """PEFT has one prefix, of the decoder's self-attention (FACTS 2.4); the paper has three."""
    theirs = rows("prefix", "bart", tmp_path)
    paper = peftc.plan(tiny("bart"), peftc.load_spec("prefix_direct", l=5)).parameters.stored
    assert sum(p.numel() for p in theirs.parameters() if p.requires_grad) < paper
    with pytest.raises(PeftcError, match="PEFT's prefix of an encoder-decoder"):
        import_peft(tmp_path, tiny("bart"))


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(PeftcError, match=r"has no adapter_config\.json"):
        import_peft(tmp_path, tiny("bert"))
    adapter("lora", "roberta", tmp_path / "a")
    with pytest.raises(PeftcError, match="the backbone has no linear"):
        import_peft(tmp_path / "a", tiny("bert"))
    file = tmp_path / "a" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(PeftcError, match="is damaged"):
        import_peft(tmp_path / "a", tiny("roberta"))
    file.rename(file.with_name("adapter_model.bin"))
    with pytest.raises(PeftcError, match="safe_serialization=True"):
        import_peft(tmp_path / "a", tiny("roberta"))
    settings = json.loads((tmp_path / "a" / "adapter_config.json").read_text())
    (tmp_path / "a" / "adapter_config.json").write_text(json.dumps(settings)[:-5])
    with pytest.raises(PeftcError, match="is not JSON"):
        import_peft(tmp_path / "a", tiny("roberta"))
    with pytest.raises(PeftcError, match="is not LoRA-like"):
        export_peft(peftc.compile(tiny("bert"), "ia3"), tmp_path / "out")
    assert not (tmp_path / "out").exists()
