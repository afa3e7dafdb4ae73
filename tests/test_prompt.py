"""Rows in front of a sequence: prompt tuning against the model's own `inputs_embeds`, PEFT's prefix against its cache."""

from __future__ import annotations

import pytest
import torch
from conftest import EAGER, FAMILIES, batch, logits, stir, tiny
from torch.nn import functional
from transformers import PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.language.reader import parse_spec

ROWS = 4
SPEC = peftc.load_spec("prompt_tuning", l=ROWS)
TOKENS = [family for family in FAMILIES if family not in ("vit", "whisper")]


def by_hand(
    backbone: PreTrainedModel, prompt: torch.Tensor, inputs: dict[str, torch.Tensor]
) -> torch.Tensor:
    """The paper's form: [P; E(x)] as input embeddings, every token seeing P; without P's own outputs.

    P stands before the embedding's scale where a model has one.
    """
    given = dict(inputs)
    embedding = backbone.get_input_embeddings()
    scale = getattr(embedding, "embed_scale", 1.0)
    tokens = embedding(given.pop("input_ids"))
    rows = (prompt * scale).expand(len(tokens), -1, -1)
    given["inputs_embeds"] = torch.cat([rows, tokens], 1)
    if "attention_mask" in given:
        given["attention_mask"] = functional.pad(given["attention_mask"], (len(prompt), 0), value=1)
    if "position_ids" in given:
        positions = given["position_ids"]
        first = torch.arange(len(prompt)).expand(len(tokens), -1)
        given["position_ids"] = torch.cat([first, positions + len(prompt)], 1)
    with torch.no_grad():
        out: torch.Tensor = backbone(**given).logits
    seq2seq = backbone.config.is_encoder_decoder
    return out if seq2seq or out.ndim == 2 else out[:, len(prompt) :]


def pair(family: str, attention: str | None = None) -> tuple[PreTrainedModel, PreTrainedModel]:
    backbone = tiny(family, attention).requires_grad_(False)  # Mamba picks its kernel by that
    return backbone, stir(peftc.compile(backbone, SPEC), 0.6)


def rows(model: PreTrainedModel) -> torch.Tensor:
    (prompt,) = model.deltas.values().values()
    return prompt.detach()


@pytest.mark.sampled(12)
@pytest.mark.parametrize(
    ("family", "attention", "padding"),
    [(family, "eager", "right" if family in EAGER else "none") for family in TOKENS]
    + [(family, "sdpa", "right") for family in TOKENS if family not in EAGER],
)
def test_prompt_is_rows_of_input_embeddings(family: str, attention: str, padding: str) -> None:
    backbone, model = pair(family, attention)
    inputs = batch(backbone, padding)
    got, want = logits(model, inputs), by_hand(backbone, rows(model), inputs)
    real = (
        slice(None)
        if got.ndim == 2 or "decoder_input_ids" in inputs
        else inputs["attention_mask"] > 0
    )
    bound = 1e-5 * want.abs().max().clamp(min=1)  # fp32, two layers
    assert got.shape == logits(backbone, inputs).shape
    assert (got - want)[real].abs().max() <= bound
    assert (got - logits(backbone, inputs))[real].abs().max() > 1e-3


@pytest.mark.parametrize("family", ["gpt2", "llama", "neox"])
def test_left_padding_and_given_positions(family: str) -> None:
    backbone, model = pair(family)
    inputs = batch(backbone, "left")
    mask = inputs["attention_mask"]
    inputs["position_ids"] = (mask.cumsum(-1) - 1).clamp(min=0)
    got, want = logits(model, inputs), by_hand(backbone, rows(model), inputs)
    assert (got - want)[mask > 0].abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["bart", "t5", "gpt2", "llama", "bloom"])
def test_greedy_tokens(family: str) -> None:
    """Through the cache, which holds the rows once, and step by step by hand."""
    backbone, model = pair(family)
    inputs = batch(backbone)
    seq2seq = "decoder_input_ids" in inputs
    inputs.pop("decoder_input_ids", None)
    length = dict(max_new_tokens=5, min_new_tokens=5, forced_eos_token_id=None)
    got = model.generate(**inputs, **length, do_sample=False, pad_token_id=0)
    tokens = got[:, :1] if seq2seq else inputs["input_ids"]
    for _ in range(5):
        if seq2seq:
            step = {**inputs, "decoder_input_ids": tokens}
        else:
            step = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        scores = by_hand(backbone, rows(model), step)[:, -1]
        end = model.generation_config.eos_token_id
        if end is not None:
            scores[:, end] = -torch.inf  # min_new_tokens
        tokens = torch.cat([tokens, scores.argmax(-1, keepdim=True)], 1)
    assert torch.equal(got, tokens)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
def test_beams_with_and_without_a_cache(family: str) -> None:
    _, model = pair(family)
    inputs = batch(model, "left")
    inputs.pop("decoder_input_ids", None)
    settings = dict(max_new_tokens=5, num_beams=3, do_sample=False, pad_token_id=0)
    cached, plain = (model.generate(**inputs, **settings, use_cache=one) for one in (True, False))
    assert torch.equal(cached, plain)


@pytest.mark.parametrize("family", ["bart", "gpt2"])
@pytest.mark.sampled(2)
def test_the_loss_counts_the_tokens_alone(family: str) -> None:
    backbone, model = pair(family)
    inputs = batch(backbone)
    name = "decoder_input_ids" if family == "bart" else "input_ids"
    labels = inputs[name].clone()
    labels[:, :2] = -100
    with torch.no_grad():
        loss = model(**inputs, labels=labels).loss
    scores = by_hand(backbone, rows(model), inputs)
    if family == "gpt2":  # shifted by one; no token of the prompt is a target
        scores, labels = scores[:, :-1], labels[:, 1:]
    assert (loss - functional.cross_entropy(scores.flatten(0, 1), labels.flatten())).abs() < 1e-5


def test_what_reads_the_decoder_alone() -> None:
    """The encoder's prompt does not touch what is tied to its table: the decoder's embeddings and the head."""
    model = peftc.compile(tiny("bart"), peftc.load_spec("lora_embedding", r=2))
    scopes = {edit.site.scope: [p.path for p in edit.parameters] for edit in model.plan.edits}
    inputs = batch(model)
    with torch.no_grad():
        for path in scopes["model.encoder.embed_tokens"]:
            model.deltas.values()[path].normal_()
    encoder = model.get_encoder()(input_ids=inputs["input_ids"])[0]
    bare = tiny("bart")
    assert not torch.allclose(encoder, bare.get_encoder()(input_ids=inputs["input_ids"])[0])
    with torch.no_grad():
        fixed = dict(encoder_outputs=(encoder,), decoder_input_ids=inputs["decoder_input_ids"])
        assert torch.allclose(model(**fixed).logits, bare(**fixed).logits, atol=1e-5)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (
            "deltas: [{at: ffn, params: {P: {shape: [2, d], init: zeros}}, rewrite: {h: 'prepend(P, h)'}}]",
            "before",
        ),
        ("deltas: [{use: prompt_tuning}, {use: prompt_tuning}]", "comes after the rows"),
        ("deltas: [{use: prompt_tuning}, {use: lora_embedding}]", "comes after the rows"),
        (
            "deltas: [{at: attention.heads, positions: shift, params: {s: {shape: [1], init: ones}},"
            " rewrite: {k: k * s}}]",
            "'positions: shift' goes with keys that are prepended",
        ),
    ],
)
def test_what_cannot_be_lengthened(spec: str, message: str) -> None:
    with pytest.raises(PeftcError, match=message):
        peftc.plan(tiny("gpt2"), parse_spec(spec))


def test_inputs_without_ids_are_refused() -> None:
    backbone, model = pair("gpt2")
    with pytest.raises(PeftcError, match="'inputs_embeds'"):
        model(inputs_embeds=backbone.get_input_embeddings()(batch(backbone)["input_ids"]))
