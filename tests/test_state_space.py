"""State spaces: caches whose layers keep states of a fixed size, alone or beside layers with keys and values."""

from __future__ import annotations

import copy
import inspect
import itertools
import sys
from typing import Any

import pytest
import torch
import transformers
from conftest import FAMILIES, GROUPED, Told, batch, logits, stir, wide
from methods import spec
from transformers import DynamicCache, PreTrainedModel, StaticCache

import peftc
from peftc.errors import UncachedError
from peftc.graph.cache import flatten_cache
from peftc.model.caches import prepared

STATE = dict(vocab_size=120, hidden_size=32, num_hidden_layers=2, state_size=4)
LINEAR = dict(
    linear_key_head_dim=8,
    linear_value_head_dim=8,
    linear_num_key_heads=2,
    linear_num_value_heads=4,
    layer_types=["linear_attention", "full_attention"],
)
CHUNK = 16  # longer than a trace's example: the graph is one for one chunk
MODELS: dict[str, tuple[str, str, dict[str, object]]] = {
    "mamba": FAMILIES["mamba"],
    "falcon_mamba": ("FalconMambaConfig", "FalconMambaForCausalLM", STATE),
    "bamba": (
        "BambaConfig",
        "BambaForCausalLM",
        dict(
            **GROUPED,
            attn_layer_indices=[1],
            mamba_n_heads=4,
            mamba_d_state=4,
            mamba_chunk_size=CHUNK,
        ),
    ),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", dict(**GROUPED, **LINEAR, head_dim=8)),
    # no recurrent states
    "lfm2": (
        "Lfm2Config",
        "Lfm2ForCausalLM",
        dict(**GROUPED, layer_types=["conv", "full_attention"]),
    ),
    # keys, values and states in one layer
    "falcon_h1": (
        "FalconH1Config",
        "FalconH1ForCausalLM",
        dict(**GROUPED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=4),
    ),
    # layers that keep nothing
    "nemotron_h": (
        "NemotronHConfig",
        "NemotronHForCausalLM",
        dict(
            **{k: v for k, v in GROUPED.items() if k != "num_hidden_layers"},
            layers_block_type=["mlp", "mamba", "attention"],
            mamba_num_heads=4,
            mamba_head_dim=8,
            ssm_state_size=4,
            n_groups=1,
            chunk_size=CHUNK,
            head_dim=8,
        ),
    ),
}
# What the cache of each holds, a layer a row.
HOLDS = {
    "mamba": ("conv recurrent", "conv recurrent"),
    "falcon_mamba": ("conv recurrent", "conv recurrent"),
    "bamba": ("conv recurrent", "key value"),
    "qwen3_5": ("conv recurrent", "key value"),
    "lfm2": ("conv", "key value"),
    "falcon_h1": ("key value conv recurrent", "key value conv recurrent"),
    "nemotron_h": ("", "conv recurrent", "key value"),
}
MODES: dict[str, dict[str, object]] = {
    "greedy": dict(do_sample=False),
    "beam": dict(num_beams=3, do_sample=False),
    "sample": dict(do_sample=True, top_k=20),
}
NEW = 6


def built(name: str) -> PreTrainedModel:
    config, model, sizes = MODELS[name]
    torch.manual_seed(0)
    return wide(getattr(transformers, model)(getattr(transformers, config)(**sizes)))


def compiled(name: str, method: str) -> PreTrainedModel:
    """With deltas, and weights that train in their own place, of some value."""
    model = stir(peftc.compile(built(name), spec(method)), 0.2)
    with torch.no_grad():
        for one in model.plan.unfrozen:
            weight = model.get_parameter(one.path)
            weight.add_(torch.randn_like(weight) * 0.2)
    return model


def generated(model: PreTrainedModel, mode: str = "greedy", size: int = 3, **more: Any) -> Any:
    torch.manual_seed(7)
    exact = dict(max_new_tokens=NEW, min_new_tokens=NEW, pad_token_id=1)
    return model.generate(**batch(model, "left", size=size), **exact, **MODES[mode], **more)


def entries(model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """The graphs that run from now on, and the tokens that each reads."""
    seen: list[tuple[str, int]] = []
    run = type(model).run

    def told(self: Any, entry: str, inputs: Any, flags: Any) -> Any:
        seen.append((entry, inputs["input_ids"].shape[1]))
        return run(self, entry, inputs, flags)

    monkeypatch.setattr(type(model), "run", told)
    return seen


def at_once(model: PreTrainedModel, tokens: torch.Tensor) -> torch.Tensor:
    """The logits of each new token of a sequence that is read without a cache."""
    mask = batch(model, "left")["attention_mask"]
    longer = torch.cat([mask, torch.ones_like(tokens[:, mask.shape[1] :])], 1)
    inputs = {"input_ids": tokens, "attention_mask": longer}
    if "position_ids" in inspect.signature(type(model).forward).parameters:  # as `generate` counts
        inputs["position_ids"] = (longer.cumsum(-1) - 1).clamp(min=0)
    return logits(model, inputs)[:, -NEW - 1 : -1]


def stepwise(model: PreTrainedModel) -> tuple[torch.Tensor, torch.Tensor]:
    """The logits of generation through a cache, and those without one of the same tokens."""
    out = generated(model, output_logits=True, return_dict_in_generate=True)
    return torch.stack(out.logits, 1), at_once(model, out.sequences)


def slow(*case: str) -> Any:
    return pytest.param(*case, marks=pytest.mark.slow)


@pytest.mark.habit(
    "generation: caches of states (Mamba, Falcon-Mamba, Bamba, Qwen 3.5, LFM2, ...)",
    "Hugging Face's tokens",
)
@pytest.mark.parametrize(
    "name",
    [
        *("falcon_mamba", "bamba"),
        *(slow(one) for one in ("mamba", "lfm2", "qwen3_5", "falcon_h1", "nemotron_h")),
    ],
)
def test_zero_deltas_generate_as_the_backbone(name: str) -> None:
    """Beams move the states as transformers moves them."""
    model = peftc.compile(built(name), spec("norm_tuning"))
    for mode in MODES:
        assert torch.equal(generated(model, mode), generated(model.backbone, mode))


# Every fourth is in CI.
CELLS = [
    *(("mamba", method) for method in ("prompt_tuning", "lora_conv", "norm_tuning", "bitfit")),
    *(("falcon_mamba", method) for method in ("lora_conv", "prompt_tuning")),
    *(("bamba", method) for method in ("prompt_tuning", "prefix_direct", "lora", "mam")),
    *(("qwen3_5", method) for method in ("lora", "prefix_direct")),
    ("bamba", "lora_conv"),
    ("qwen3_5", "lora_conv"),
]


@pytest.mark.sampled(8)
@pytest.mark.parametrize(("name", "method"), CELLS)
def test_a_step_reads_one_token_and_gives_what_all_at_once_give(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compiled(name, method)
    bare, bare_at_once = stepwise(built(name))
    seen = entries(model, monkeypatch)
    got, want = stepwise(model)
    assert seen[:NEW] == [("prefill", 11), *[("decode", 1)] * (NEW - 1)]
    # fp32, two layers: a recurrence sums in another order than a scan, in the bare model too
    bound = max(1e-5 * want.abs().max(), 4 * (bare - bare_at_once).abs().max())
    assert (got - want).abs().max() <= bound
    assert (got[:, 0] - bare[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("name", ["mamba", *(slow(one) for one in [*HOLDS][1:])])
def test_a_step_leaves_the_tensors_that_it_was_given(name: str) -> None:
    model = compiled(name, "norm_tuning")
    inputs = batch(model)
    cached = model._programs.facts.cache
    with torch.no_grad():
        cache = model(**inputs, use_cache=True)[cached]
        before = flatten_cache(cache)
        held = [
            [n.split(".")[3] for n in before if n.startswith(f"past.self.{i}.")]
            for i in range(model.config.num_hidden_layers)
        ]
        assert tuple(" ".join(one) for one in held) == HOLDS[name]
        copies = {k: v.clone() for k, v in before.items()}
        other = copy.deepcopy(cache)
        step = {"input_ids": inputs["input_ids"][:, :1], "use_cache": True}
        first = model(**step, **{cached: cache}).logits
    assert all(torch.equal(before[k], v) for k, v in copies.items())
    assert not any(
        torch.equal(v, copies[k])
        for k, v in flatten_cache(cache).items()
        if v.shape == copies[k].shape
    )
    with torch.no_grad():
        assert torch.equal(model(**step, **{cached: other}).logits, first)
        other.reset()
        again = model(**inputs, use_cache=True, **{cached: other})
        assert torch.equal(
            again.logits, model(**inputs, use_cache=True, **{cached: DynamicCache()}).logits
        )


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("mamba", "lora_conv"),
        ("bamba", "lora"),
        slow("bamba", "prompt_tuning"),
        slow("qwen3_5", "lora"),
    ],
)
def test_a_static_cache_holds_the_same(name: str, method: str) -> None:
    model = compiled(name, method)
    for mode in ("greedy", "beam"):
        static = generated(model, mode, cache_implementation="static")
        assert torch.equal(static, generated(model, mode))


def test_what_cannot_go_on_is_refused() -> None:
    model = compiled("bamba", "norm_tuning")
    for one in (model, model.backbone):
        with pytest.raises(ValueError, match="not supported with stateful models, such as Bamba"):
            generated(one, size=1, prompt_lookup_num_tokens=2)
    with pytest.raises(peftc.PeftcError, match="one token at a time behind the first call"):
        generated(model, cache_implementation="static", prefill_chunk_size=4)
    with pytest.raises(peftc.PeftcError, match="not LinearAttentionLayer that can be cropped"):
        generated(compiled("lfm2", "norm_tuning"), size=1, prompt_lookup_num_tokens=2)
    with pytest.raises(peftc.PeftcError, match="not LinearAttentionAndStaticFullAttentionLayer"):
        config = built("falcon_h1").config
        prepared(StaticCache(config, max_cache_len=8), config)


@pytest.mark.habit(
    "generation: constraints and streamers with a cache of states", "Hugging Face's tokens"
)
def test_constraints_and_streamers() -> None:
    """Of three tokens after each token, as `prefix_allowed_tokens_fn` says; and one by one, as a streamer is told."""

    def allowed(row: int, ids: torch.Tensor) -> list[int]:
        return [4 + (int(ids[-1]) + k) % 100 for k in (1, 2, 3 + row)]

    model, told = compiled("mamba", "lora_conv"), Told()
    for mode in MODES:
        out = generated(model, mode, prefix_allowed_tokens_fn=allowed)[:, -NEW - 1 :].tolist()
        for row, tokens in enumerate(out):
            for before, token in itertools.pairwise(tokens):
                assert token in allowed(row, torch.tensor([before]))
        zero = peftc.compile(built("mamba"), spec("norm_tuning"))
        want = generated(zero.backbone, mode, prefix_allowed_tokens_fn=allowed)
        assert torch.equal(generated(zero, mode, prefix_allowed_tokens_fn=allowed), want)
    tokens = generated(model, size=1, streamer=told)
    assert told.ended and torch.equal(torch.cat(told.tokens, 1), tokens)
    assert len(told.tokens) == NEW + 1


@pytest.mark.parametrize(
    ("name", "lengths"),
    [
        ("bamba", (11, CHUNK, CHUNK + 1, 3 * CHUNK)),
        pytest.param("qwen3_5", (11, 64, 65, 200), marks=pytest.mark.slow),
    ],
)
def test_as_many_chunks_as_a_sequence_has(name: str, lengths: tuple[int, ...]) -> None:
    model = peftc.compile(built(name), spec("norm_tuning"))
    for length in lengths:
        inputs = batch(model, length=length)
        want = logits(model.backbone, inputs)
        # fp32: sums in another order
        assert (logits(model, inputs) - want).abs().max() <= 1e-5 * want.abs().max()
    assert len(model._programs) == {"bamba": 2, "qwen3_5": 3}[name]


def test_triangular_systems_are_solved_by_the_op_of_eager_code() -> None:
    """Told that it is exported, Qwen 3.5 would write one out, row by row."""
    backbone = built("qwen3_5")
    code = sys.modules[type(backbone).__module__]
    truth = code.is_torchdynamo_exporting
    model = peftc.compile(backbone, "lora")
    assert code.is_torchdynamo_exporting is truth
    inputs = batch(model)
    assert (logits(model, inputs) - logits(backbone, inputs)).abs().max() == 0
    (program,) = (one.program for one in model._programs._runners.values())
    solved = program.graph.find_nodes(
        op="call_function", target=torch.ops.aten.linalg_solve_triangular.default
    )
    assert len(solved) == 2


def test_states_outside_of_a_cache() -> None:
    """What keeps its states in its modules is read whole at each step."""
    torch.manual_seed(0)
    sizes = {**GROUPED, "num_key_value_heads": 1, "block_types": ("recurrent", "attention")}
    config = transformers.RecurrentGemmaConfig(**sizes, lru_width=32, attention_window_size=16)
    backbone = wide(transformers.RecurrentGemmaForCausalLM(config))
    inputs = batch(backbone, size=2, length=4)
    settings = dict(max_new_tokens=2, do_sample=False)
    want = backbone.generate(**inputs, **settings)
    model = peftc.compile(backbone, spec("norm_tuning"))
    with pytest.warns(UserWarning, match="generated without a cache: RecurrentGemmaForCausalLM"):
        assert torch.equal(model.generate(**inputs, **settings), want)
    with pytest.raises(UncachedError, match="keeps its states elsewhere than in a cache"):
        model(**inputs, use_cache=True)
