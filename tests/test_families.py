"""Models beside those of the matrix, for what each was the first to show: nothing knows one by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from conftest import GROUPED, SEQ2SEQ, T5, stir, wide
from transformers import PreTrainedModel

import peftc
from peftc.driver import outputs, survey
from peftc.errors import PeftcError
from peftc.graph.arguments import seeded_inputs
from peftc.merging import merge

SMALL = dict(vocab_size=120, hidden_size=32, num_hidden_layers=2, num_attention_heads=4)
HEAD = dict(num_labels=3, eos_token_id=2)
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    # `x @ W.T` written out, keys and values picked by an index
    "falcon": ("FalconConfig", "FalconForCausalLM", SMALL),
    # norms of queries and keys, two kinds of positions
    "gemma3": ("Gemma3TextConfig", "Gemma3ForCausalLM", dict(**GROUPED, head_dim=8)),
    # the decoder reads the input again, and the head the state of its last token
    "bart_head": ("BartConfig", "BartForSequenceClassification", dict(**SEQ2SEQ, **HEAD)),
    "t5_head": ("T5Config", "T5ForSequenceClassification", dict(**T5, **HEAD, d_kv=8)),
    # queries, keys and values interleaved in a way of their own
    "codegen": (
        "CodeGenConfig",
        "CodeGenForCausalLM",
        dict(vocab_size=120, n_embd=32, n_layer=2, n_head=4, n_positions=64, rotary_dim=4),
    ),
}
SPANS = {"bart_spans": ("BartConfig", "BartForQuestionAnswering", SEQ2SEQ)}
SPECS = {
    "lora": peftc.load_spec("lora", r=4, alpha=8),
    "mam": peftc.load_spec("mam", l=3, m=4, r=4),
    "prompt": peftc.load_spec("prompt_tuning", l=3),
}


def built(name: str) -> PreTrainedModel:
    config, model, sizes = (MODELS | SPANS)[name]
    torch.manual_seed(0)
    made: PreTrainedModel = getattr(transformers, model)(getattr(transformers, config)(**sizes))
    return made.eval()


@pytest.mark.parametrize("name", MODELS)
def test_a_family_has_its_sites(name: str) -> None:
    counts: dict[str, int] = {}
    for site in survey(built(name)):
        counts[site.at] = counts.get(site.at, 0) + 1
    attentions = 6 if name.endswith("_head") else 2
    for part in ("", ".q", ".k", ".v", ".o", ".heads"):
        assert counts[f"attention{part}"] == attentions
    assert counts["ffn"] == (4 if name.endswith("_head") else 2)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("method", SPECS)
@pytest.mark.parametrize("name", MODELS)
def test_a_family_takes_a_method(name: str, method: str) -> None:
    backbone = built(name)
    model, inputs = peftc.compile(backbone, SPECS[method]), seeded_inputs(backbone)
    before, bare = (outputs(one, inputs)["logits"] for one in (model, backbone))
    if method == "lora":
        assert (before - bare).abs().max() <= 1e-5 * bare.abs().max().clamp(min=1)
    got = outputs(stir(model), inputs)["logits"]
    assert (got - bare).abs().max() > 1e-3 * bare.abs().max()
    _, report = merge(model)
    assert report.error <= 1e-4 * max(1.0, report.scale)  # fp32 weights rounded once
    assert len(report.kept) == {"lora": 0, "prompt": 1}.get(method, len(model.plan.edits))
    if model.can_generate():
        prompt = {k: v[1:] for k, v in inputs.items()}  # the rows without padding
        settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, pad_token_id=0)
        cached = model.generate(**prompt, **settings)
        assert torch.equal(cached, model.generate(**prompt, **settings, use_cache=False))


@pytest.mark.parametrize("name", ["bart_head", "t5_head", *SPANS])
def test_a_prompt_is_the_encoders(name: str) -> None:
    """Where a decoder reads the encoder's tokens again: the decoder of the model as it is, on the states of an encoder
    that had the rows too."""
    backbone = wide(built(name))
    model, inputs = stir(peftc.compile(backbone, SPECS["prompt"])), seeded_inputs(backbone)
    rows = next(iter(model.deltas.values().values())).expand(len(inputs["input_ids"]), -1, -1)
    tokens = backbone.get_encoder().embed_tokens(inputs["input_ids"])
    mask = torch.nn.functional.pad(inputs["attention_mask"], (rows.shape[1], 0), value=1)
    states = backbone.get_encoder()(inputs_embeds=torch.cat([rows, tokens], 1), attention_mask=mask)
    want = backbone(**inputs | {"attention_mask": mask}, encoder_outputs=states)
    got, bare = outputs(model, inputs), outputs(backbone, inputs)
    for field in {"logits", "start_logits", "end_logits"} & want.keys():
        assert (got[field] - bare[field]).abs().max() > 1e-2 * bare[field].abs().max()
        # float32, two layers of each stack
        assert (got[field] - want[field]).abs().max() <= 1e-5 * want[field].abs().max().clamp(min=1)


def test_what_cannot_be_traced_says_where(capfd: pytest.CaptureFixture[str]) -> None:
    """Attention in chunks, whose number the code computes from a tensor."""
    config = transformers.LEDConfig(**SEQ2SEQ, attention_window=4)
    with pytest.raises(PeftcError) as error:
        peftc.plan(transformers.LEDForConditionalGeneration(config), SPECS["lora"])
    place = "in 'led.encoder.layers.0.self_attn.longformer_self_attn', modeling_led.py:"
    assert place in str(error.value) and "no branch on tensor values" in str(error.value)
    assert capfd.readouterr().err == ""


def test_a_head_on_an_encoder_decoder_trains_and_is_not_exported(tmp_path: Path) -> None:
    model = stir(peftc.compile(built("bart_head"), ["lora", "head"]))
    inputs = seeded_inputs(model)
    loss = model.train()(**inputs, labels=torch.tensor([0, 1, 2])).loss
    loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    with pytest.raises(PeftcError, match="picks a state by the tokens' values"):
        peftc.export(model, tmp_path / "bundle")
