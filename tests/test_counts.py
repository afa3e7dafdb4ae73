"""Every integer of the literature that we know, on published sizes: formulas of the papers, and two libraries.

Weights as the papers count (no biases, no reparametrising MLP) and, where they differ, with biases.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache

import pytest
import torch
import transformers
from conftest import tiny
from transformers import PreTrainedModel

from peftc.driver import plans
from peftc.errors import PeftcError
from peftc.language.reader import load_spec
from peftc.language.shelf import directory
from peftc.language.spec import Spec
from peftc.model import backbones
from peftc.plan.plan import Plan

BART_BASE = dict(
    d_model=768,
    encoder_layers=6,
    decoder_layers=6,
    encoder_ffn_dim=3072,
    decoder_ffn_dim=3072,
    encoder_attention_heads=12,
    decoder_attention_heads=12,
)
T5_SMALL = dict(d_model=512, d_kv=64, num_layers=6, vocab_size=32128)
CONFIGS: dict[str, tuple[str, str, dict[str, object]]] = {
    "bart-base": ("BartConfig", "BartForConditionalGeneration", BART_BASE),
    "gpt2": ("GPT2Config", "GPT2LMHeadModel", {}),
    "gpt2-medium": ("GPT2Config", "GPT2LMHeadModel", dict(n_embd=1024, n_layer=24, n_head=16)),
    "t5-small": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(**T5_SMALL, d_ff=2048, num_heads=8),
    ),
    "t5-v1_1-small": (
        "T5Config",
        "T5ForConditionalGeneration",
        dict(
            **{**T5_SMALL, "num_layers": 8},
            d_ff=1024,
            num_heads=6,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        ),
    ),
}
SHIPPED = {
    "bart-large": ("facebook/bart-large", None),
    "mbart-cc25": ("facebook/mbart-large-cc25", None),
    "roberta-base": ("roberta-base", "classification"),
}
MODELS = (
    "bart-large",
    "bart-base",
    "mbart-cc25",
    "roberta-base",
    "gpt2",
    "gpt2-medium",
    "t5-small",
    "t5-v1_1-small",
)
ADAPTER_ATTENTION = directory() / "paper" / "sa_attn_200.yaml"
# spec, arguments -> weights for each of MODELS; 0 is a model that the method finds nothing in.
WEIGHTS: dict[tuple[object, tuple[tuple[str, int], ...]], tuple[int, ...]] = {
    ("prompt_tuning", (("l", 100),)): (
        102400,
        76800,
        102400,
        76800,
        76800,
        102400,
        51200,
        51200,
    ),
    ("prefix_tuning", (("l", 30),)): (
        2211840,
        829440,
        2211840,
        552960,
        552960,
        1474560,
        552960,
        552960,
    ),
    ("prefix_tuning", (("l", 200),)): (
        14745600,
        5529600,
        14745600,
        3686400,
        3686400,
        9830400,
        3686400,
        3686400,
    ),
    ("lora", (("r", 8),)): (1179648, 442368, 1179648, 294912, 294912, 786432, 294912, 344064),
    ("lora", (("r", 16),)): (2359296, 884736, 2359296, 589824, 589824, 1572864, 589824, 688128),
    ("lora_ffn", (("r", 8),)): (1966080, 737280, 1966080, 737280, 737280, 1966080, 491520, 589824),
    ("lora_ffn", (("r", 102),)): (
        25067520,
        9400320,
        25067520,
        9400320,
        9400320,
        25067520,
        6266880,
        7520256,
    ),
    (ADAPTER_ATTENTION, (("r", 30),)): (
        2211840,
        829440,
        2211840,
        552960,
        552960,
        1474560,
        552960,
        737280,
    ),
    ("pfeiffer_adapter", (("r", 64),)): (
        3145728,
        1179648,
        3145728,
        1179648,
        1179648,
        3145728,
        786432,
        1048576,
    ),
    ("pfeiffer_adapter", (("r", 512),)): (
        25165824,
        9437184,
        25165824,
        9437184,
        9437184,
        25165824,
        6291456,
        8388608,
    ),
    ("mam", (("l", 30), ("r", 512))): (
        27377664,
        10266624,
        27377664,
        9990144,
        9990144,
        26640384,
        6844416,
        8941568,
    ),
    ("bitfit", ()): (333824, 125952, 335872, 102914, 102144, 271360, 0, 0),
}
# The same with biases.
STORED: dict[tuple[object, tuple[tuple[str, int], ...]], tuple[int, ...]] = {
    (ADAPTER_ATTENTION, (("r", 30),)): (
        2249784,
        843804,
        2249784,
        562536,
        562536,
        1499856,
        562716,
        750288,
    ),
    ("pfeiffer_adapter", (("r", 64),)): (
        3171840,
        1189632,
        3171840,
        1189632,
        1189632,
        3171840,
        793344,
        1057792,
    ),
    ("pfeiffer_adapter", (("r", 512),)): (
        25202688,
        9452544,
        25202688,
        9452544,
        9452544,
        25202688,
        6303744,
        8404992,
    ),
    ("mam", (("l", 30), ("r", 512))): (
        27414528,
        10281984,
        27414528,
        10005504,
        10005504,
        26677248,
        6856704,
        8957952,
    ),
}
# BART-large alone: spec, arguments -> (weights, stored, while training).
BART: dict[tuple[object, tuple[tuple[str, int], ...]], tuple[int, int, int]] = {
    ("prefix_tuning", (("l", 30),)): (2211840, 2211840, 61608288),
    ("prefix_tuning", (("l", 100),)): (7372800, 7372800, 61823328),
    ("prefix_tuning", (("l", 200),)): (14745600, 14745600, 62130528),
    ("mam", (("l", 30), ("r", 512))): (27377664, 27414528, 86810976),
    ("parallel_adapter", (("r", 200),)): (9830400, 9859776, 9859776),
    ("parallel_adapter", (("r", 600),)): (29491200, 29530176, 29530176),
    ("parallel_adapter", (("r", 1024),)): (50331648, 50380800, 50380800),
    ("learned_scale_adapter", (("r", 512),)): (25165824, 25202712, 25202712),
    ("houlsby_adapter", (("r", 200),)): (24576000, 24649440, 24649440),
    ("ia3", ()): (172032, 172032, 172032),
}


@cache
def backbone(name: str) -> PreTrainedModel:
    if name in SHIPPED:
        shipped, task = SHIPPED[name]
        labels = 2 if task else None
        return backbones.resolve(
            shipped, random_weights=True, meta=True, task=task, num_labels=labels
        )
    config, model, sizes = CONFIGS[name]
    with torch.device("meta"):
        built: PreTrainedModel = getattr(transformers, model)(
            getattr(transformers, config)(**sizes)
        )
    return built


def specs(table: object) -> list[Spec]:
    return [load_spec(source, **dict(arguments)) for source, arguments in table]  # type: ignore[attr-defined]


def planned(name: str, table: object) -> list[Plan]:
    return plans(backbone(name), specs(table))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", MODELS)
def test_weights(model: str) -> None:
    column = MODELS.index(model)
    some = {key: row[column] for key, row in WEIGHTS.items() if row[column]}
    got = [plan.parameters.weights for plan in planned(model, some)]
    assert dict(zip(some, got, strict=True)) == some
    for key, row in WEIGHTS.items():
        if not row[column]:
            with pytest.raises(PeftcError, match="no parameter's name ends so"):
                planned(model, [key])


@pytest.mark.sampled(4)
@pytest.mark.parametrize("model", MODELS)
def test_with_biases(model: str) -> None:
    want = {key: row[MODELS.index(model)] for key, row in STORED.items()}
    got = [plan.parameters.stored for plan in planned(model, want)]
    assert dict(zip(want, got, strict=True)) == want


@pytest.mark.xdist_group("bart-large")
def test_bart_large() -> None:
    counts = [plan.parameters for plan in planned("bart-large", BART)]
    got = [(one.weights, one.stored, one.training) for one in counts]
    assert dict(zip(BART, got, strict=True)) == BART


@dataclass(frozen=True)
class Sizes:
    """What the general formulas read (FACTS 2.3): attentions and their kinds, feed-forwards, the width, that
    of queries and that of keys."""

    attentions: int = 2
    kinds: int = 1
    ffns: int = 2
    d: int = 32
    q: int = 32
    kv: int = 32


SEQ2SEQ = Sizes(attentions=6, kinds=3, ffns=4)
GROUPED = Sizes(kv=16)
TINY = {
    **dict.fromkeys(("bart", "mbart", "t5", "whisper"), SEQ2SEQ),
    **dict.fromkeys(("roberta", "bert", "distilbert", "deberta", "vit", "modernbert"), Sizes()),
    **dict.fromkeys(("gpt2", "neox", "bloom", "mpt"), Sizes()),
    **dict.fromkeys(("llama", "phi3", "gemma2"), GROUPED),
    "mixtral": replace(GROUPED, ffns=0),
    "t5_gated": replace(SEQ2SEQ, q=24, kv=24),
}


def formulas(one: Sizes, rank: int, length: int, hidden: int) -> dict[str, int]:
    """Numbers that train, method by method."""
    adapter = 2 * rank * one.d + rank + one.d
    tokens = length * one.d + one.d * hidden + hidden
    mlp = one.kinds * tokens + one.attentions * 2 * one.kv * (hidden + 1)
    return {
        "lora": one.attentions * rank * (one.d + one.q + one.d + one.kv),
        "prefix_direct": 2 * length * one.kv * one.attentions,
        "prefix_tuning": mlp,
        "prompt_tuning": length * one.d,
        "scaled_parallel_adapter": one.ffns * adapter,
        "learned_scale_adapter": one.ffns * (adapter + 1),
        "houlsby_adapter": (one.attentions + one.ffns) * adapter,
        "pfeiffer_adapter": one.ffns * adapter,
        "mam": mlp + one.ffns * adapter,
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("family", TINY)
def test_every_family_by_the_formulas(family: str) -> None:
    one, given = TINY[family], {"r": 4, "l": 5, "m": 6}
    ffn = (
        "scaled_parallel_adapter",
        "learned_scale_adapter",
        "houlsby_adapter",
        "pfeiffer_adapter",
    )
    lacks = (*ffn, "mam") if not one.ffns else ()
    lacks += ("prompt_tuning",) if family in ("vit", "whisper") else ()
    want = {name: n for name, n in formulas(one, *given.values()).items() if name not in lacks}
    some = []
    for name in want:
        known = load_spec(name).arguments
        some.append(load_spec(name, **{k: v for k, v in given.items() if k in known}))
    got = [plan.parameters.training for plan in plans(tiny(family), some)]
    assert dict(zip(want, got, strict=True)) == want
