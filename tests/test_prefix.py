"""Prefix tuning against the paper's gated form in plain torch (He et al. 2022, equations 7 to 10), fp64."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import pytest
import torch
from conftest import batch, logits, stir, tiny, wide
from torch.nn.functional import scaled_dot_product_attention
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.bert.modeling_bert import BertSelfOutput

import peftc
from peftc.language.reader import parse_spec


def gated_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    pk: torch.Tensor,
    pv: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """(1 - lam) h + lam dh, where lam is the prefix's share of the softmax mass.

    q, k, v [batch, heads, length, dim]; mask additive [batch, 1, queries, keys]; pk, pv [heads, l, dim].
    """
    context = q @ k.transpose(-1, -2) * scale + mask
    prefix = q @ pk.transpose(-1, -2) * scale
    h = torch.softmax(context, -1) @ v
    dh = torch.softmax(prefix, -1) @ pv
    lam = torch.sigmoid(torch.logsumexp(prefix, -1) - torch.logsumexp(context, -1))[..., None]
    return (1 - lam) * h + lam * dh


def prefixes(model: PreTrainedModel) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """[heads, l, dim] keys and values by attention module, from the MLP, written out as the paper has it."""
    values = model.deltas.values()
    found = {}
    for edit in model.plan.edits:
        p = {one.name: values[one.path] for one in edit.parameters}
        hidden = torch.tanh(p["tokens"] @ p["down"] + p["down_bias"])
        heads = edit.site.dims["kv_heads"]
        found[edit.site.scope] = tuple(
            (hidden @ p[f"up_{s}"] + p[f"up_{s}_bias"]).unflatten(-1, (heads, -1)).transpose(0, 1)
            for s in ("k", "v")
        )
    return found


@contextlib.contextmanager
def oracle(
    model: PreTrainedModel, found: dict[str, tuple[torch.Tensor, torch.Tensor]]
) -> Iterator[None]:
    """The eager model with its attention function replaced by the formula."""
    scopes = {id(module): name for name, module in model.named_modules()}

    def attention(module, q, k, v, attention_mask, scaling=None, dropout=0.0, **kwargs):  # type: ignore[no-untyped-def]
        mask = attention_mask
        if mask is None:
            mask = q.new_zeros(1, 1, q.shape[-2], k.shape[-2])
            if getattr(module, "is_causal", False) and q.shape[-2] > 1:
                future = torch.ones_like(mask[0, 0]).triu(1).bool()
                mask = mask.masked_fill(future, float("-inf"))
        elif mask.dtype == torch.bool:
            mask = torch.zeros_like(mask, dtype=q.dtype).masked_fill(
                ~mask, torch.finfo(q.dtype).min
            )
        scale = q.shape[-1] ** -0.5 if scaling is None else scaling
        pk, pv = found[scopes[id(module)]]
        groups = q.shape[1] // k.shape[1]  # grouped queries share keys, values and prefixes
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        pk, pv = pk.repeat_interleave(groups, 0), pv.repeat_interleave(groups, 0)
        return gated_attention(q, k, v, mask, pk, pv, scale).transpose(1, 2), None

    original = ALL_ATTENTION_FUNCTIONS["sdpa"]
    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    for module in model.modules():
        if hasattr(module, "config"):
            module.config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS["sdpa"] = original
        model.config._attn_implementation = before


def compiled(family: str, attention: str) -> tuple[PreTrainedModel, PreTrainedModel]:
    backbone = tiny(family, attention).double()
    return backbone, stir(peftc.compile(backbone, peftc.load_spec("prefix_tuning", l=5, m=6)), 0.6)


def bound(family: str, attention: str) -> float:
    """float64 through two layers; the eager code of some families takes its softmax in float32."""
    return 1e-6 if attention == "eager" and family in ("llama", "neox") else 1e-12


@pytest.mark.sampled(5)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("family", ["bart", "roberta", "gpt2", "mbart", "llama", "neox"])
def test_prefix_is_the_gated_form(family: str, attention: str, padding: str) -> None:
    backbone, model = compiled(family, attention)
    inputs = batch(model, padding)
    got = logits(model, inputs)
    with oracle(backbone, prefixes(model)):
        want = logits(backbone, inputs)
    real = (
        slice(None)
        if model.config.is_encoder_decoder or got.ndim == 2
        else inputs["attention_mask"].bool()
    )
    assert (got - want)[real].abs().max() < bound(family, attention)
    moved = (got - logits(backbone, inputs))[real].abs().max()
    # The prefix does something. Without it some eager code has nan where a row sees nothing (float64).
    assert not moved <= 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
@pytest.mark.sampled(2)
def test_without_a_mask(family: str, attention: str) -> None:
    """No mask at all: a causal model then relies on `is_causal`, which the prefix must replace."""
    backbone, model = compiled(family, attention)
    inputs = batch(model)
    del inputs["attention_mask"]
    with oracle(backbone, prefixes(model)):
        want = logits(backbone, inputs)
    assert (logits(model, inputs) - want).abs().max() < bound(family, attention)


@pytest.mark.sampled(4)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
def test_token_by_token_through_the_cache(family: str, attention: str) -> None:
    """The cache never holds the prefix: its length, and so the positions, do not move."""
    _, model = compiled(family, attention)
    seq2seq = model.config.is_encoder_decoder
    inputs = batch(model)
    name = "decoder_input_ids" if seq2seq else "input_ids"
    whole, cache, steps = logits(model, inputs), None, []
    tokens = inputs[name]
    for i in range(tokens.shape[1]):
        step = {name: tokens[:, i : i + 1], "past_key_values": cache, "use_cache": True}
        if seq2seq:
            step |= {k: inputs[k] for k in ("input_ids", "attention_mask")}
        with torch.no_grad():
            out = model(**step)
        cache = out.past_key_values
        assert cache.get_seq_length() == i + 1
        steps.append(out.logits)
    assert (torch.cat(steps, 1) - whole).abs().max() < bound(family, attention)


@pytest.mark.parametrize("family", ["bloom", "mpt"])
def test_no_token_sees_a_later_one(family: str) -> None:
    """Where keys have a bias by their places, counted from the first or from the last."""
    _, model = compiled(family, "eager")
    inputs = batch(model)
    less = {name: value[:, :-1] for name, value in inputs.items()}
    whole, part = logits(model, inputs), logits(model, less)
    assert (whole[:, :-1] - part).abs().max() < 1e-6 * whole.abs().max()  # its biases are float32


LATENT = dict(
    vocab_size=120,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=8,
    kv_lora_rank=8,
    qk_rope_head_dim=4,
    qk_nope_head_dim=8,
    v_head_dim=6,
    first_k_dense_replace=2,  # no experts
    max_position_embeddings=64,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
)


def test_values_narrower_than_keys() -> None:
    """Latent attention (DeepSeek): keys of 12 features a head, values of 6."""
    torch.manual_seed(0)
    config = DeepseekV3Config(**LATENT, attn_implementation="sdpa")
    backbone = wide(DeepseekV3ForCausalLM(config)).double()
    inputs = batch(backbone, "left")
    for name, n in (
        ("prefix_tuning", 5 * 32 + 33 * 6 + 2 * 7 * (48 + 24)),
        ("prefix_direct", 2 * 5 * (48 + 24)),
        ("prefix_ungated", 2 * 5 * (48 + 24)),
        ("multi_head_parallel_adapter", 2 * 5 * (48 + 24)),
    ):
        sizes = {"l": 5, "m": 6, "r": 5}
        known = peftc.load_spec(name).arguments
        spec = peftc.load_spec(name, **{k: v for k, v in sizes.items() if k in known})
        model = stir(peftc.compile(backbone, spec))
        assert model.plan.parameters.training == n
        got = logits(model, inputs)
        assert (got - logits(backbone, inputs)).abs().max() > 1e-2
        if name == "prefix_tuning":
            with oracle(backbone, prefixes(model)):
                want = logits(backbone, inputs)
            real = inputs["attention_mask"].bool()
            assert (got - want)[real].abs().max() < 1e-6  # its norms compute in float32
        peftc.detach(model)


def floored(module, q, k, v, mask, scaling=1.0, **_):  # type: ignore[no-untyped-def]
    """Attention whose scores are no less than the distance of the keys."""
    scores = torch.maximum(q @ k.transpose(-1, -2) * scaling, -torch.arange(k.shape[-2]).float())
    return (torch.softmax(scores, -1) @ v).transpose(1, 2).contiguous(), None


def test_scores_that_no_value_leaves_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ALL_ATTENTION_FUNCTIONS._global_mapping, "floored", floored)
    with pytest.raises(peftc.PeftcError) as error:
        peftc.compile(tiny("bert", "floored"), peftc.load_spec("prefix_direct", l=2))
    assert str(error.value) == (
        "'maximum' masks the scores in bert.encoder.layer.0.attention.self, and no value of its mask leaves one as it "
        "is: no rows can go in front of its keys"
    )


class Twice(BertSelfOutput):
    """An output projection that runs again on what it gave."""

    def forward(self, hidden_states: torch.Tensor, input_tensor: torch.Tensor) -> torch.Tensor:
        return self.LayerNorm(self.dense(self.dense(hidden_states)) + input_tensor)


def test_an_output_without_its_query() -> None:
    backbone = tiny("bert")
    for layer in backbone.bert.encoder.layer:
        layer.attention.output.__class__ = Twice
    with pytest.raises(peftc.PeftcError) as error:
        peftc.compile(backbone, parse_spec("deltas: [{at: attention, delta: h}]", "s"))
    name = "bert.encoder.layer.0.attention"
    assert str(error.value) == (
        f"entry 'forward': '{name}.self.query.weight' does not run before linear_4 of {name}.self:attention"
    )


def test_hand_example() -> None:
    """FACTS C: q = 1, context key 0 value 2, prefix key ln 3 value 10: lam = 0.75, h = 8."""
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    zero, key = torch.zeros_like(one), torch.log(3 * one)
    gated = gated_attention(one, zero, 2 * one, zero, key[0], 10 * one[0], 1.0)
    concat = scaled_dot_product_attention(
        one, torch.cat([key, zero], -2), torch.cat([10 * one, 2 * one], -2), scale=1.0
    )
    assert gated.item() == pytest.approx(8.0, abs=1e-15)
    assert concat.item() == pytest.approx(8.0, abs=1e-15)
