"""Held: from the second step on a prefix is in the cache already; whoever looks into a cache sees tokens alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from conftest import stir, tiny
from measured import kernels
from transformers import DynamicCache, EncoderDecoderCache, PreTrainedModel

import peftc
from peftc.graph.cache import flatten_cache
from peftc.language.reader import parse_spec

IDS = torch.tensor([[5, 6, 7, 8], [3, 9, 9, 11]])
SHIFTED = """
name: shifted
deltas:
  - at: attention.heads
    positions: shift
    params:
      P_k: {shape: [kv_heads, 3, head_dim], init: normal}
      P_v: {shape: [kv_heads, 3, head_dim], init: normal}
    rewrite: {k: "prepend(P_k, k)", v: "prepend(P_v, v)"}
"""
KEYS = """
name: keys
deltas:
  - at: attention.heads
    where: {layers: 1}
    params: {P: {shape: [kv_heads, 2, head_dim], init: normal}}
    rewrite: {k: "prepend(P, k)", v: "prepend(0 * P, v)"}
"""


def compiled(family: str, specs: Any, without: tuple[str, ...] = ()) -> PreTrainedModel:
    return stir(peftc.compile(tiny(family), specs, without=without)).eval()


def generated(model: PreTrainedModel, tokens: int = 6, rows: int = 2, **more: Any) -> Any:
    exact = dict(max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False)
    return model.generate(IDS[:rows], **exact, **more)


def a_step(model: PreTrainedModel) -> int:
    """The kernels of one token more, long after the first."""
    runs = [lambda n=n: generated(model, n) for n in (6, 7)]
    few, more = (kernels(run)[0] for run in runs for _ in (run(),))
    return more - few


# Per family what decodes with a prefix: its layers' own keys and values, and those across.
HELD = {"gpt2": 4, "llama": 4, "neox": 4, "bloom": 4, "gemma2": 4, "bart": 8, "t5": 8}


CELLS = [(f, s) for f in HELD for s in ("prefix_direct", "mam", KEYS)]
CELLS += [(f, SHIFTED) for f in ("gpt2", "llama")]


@pytest.mark.sampled(10)
@pytest.mark.parametrize(("family", "spec"), CELLS, ids=lambda one: one.partition("\ndeltas")[0])
def test_a_step_has_a_kernel_less_for_each_and_the_same_logits(family: str, spec: str) -> None:
    one = parse_spec(spec) if "\n" in spec else spec
    counts, seen = [], []
    for without in ((), ("held",)):
        model = compiled(family, one, without)
        counts.append(a_step(model))
        out = generated(model, output_logits=True, return_dict_in_generate=True)
        seen.append((out.sequences, torch.stack(out.logits), generated(model, num_beams=3)))
    held = {KEYS: 4 if family in ("bart", "t5") else 2}.get(spec, HELD[family])
    assert counts[1] - counts[0] == held
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def tokens_of(model: PreTrainedModel, new: torch.Tensor) -> dict[str, torch.Tensor]:
    if model.config.is_encoder_decoder:
        return {"input_ids": IDS, "decoder_input_ids": new}
    return {"input_ids": new}


def steps(model: PreTrainedModel, tokens: int, change: Any = None, at: int = 3) -> list[Any]:
    """Logits of each step through one cache; before step `at`, `change` is called with it."""
    two = model.config.is_encoder_decoder
    cache: Any = EncoderDecoderCache(DynamicCache(), DynamicCache()) if two else DynamicCache()
    found = []
    with torch.no_grad():
        for i in range(tokens):
            if change is not None and i == at:
                cache = change(cache) or cache
            given = tokens_of(model, torch.full((2, 4 if i == 0 else 1), 7 + i))
            out = model(**given, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            found.append(out.logits[:, -1])
            for name, tensor in flatten_cache(cache).items():
                tokens_in = IDS.shape[1] if "cross" in name else cache.get_seq_length()
                assert tensor.shape[2] == tokens_in
    return found


def written(model: PreTrainedModel, cache: Any) -> None:
    stir(model, seed=5)


def switched(model: PreTrainedModel, cache: Any) -> None:
    model.use("second")


def away_and_back(model: PreTrainedModel, cache: Any) -> None:
    with model.base():
        model(**tokens_of(model, IDS[:, :1]), past_key_values=copy.deepcopy(cache), use_cache=True)


def cut(model: PreTrainedModel, cache: Any) -> None:
    cache.crop(-1)


def turned(model: PreTrainedModel, cache: Any) -> None:
    cache.reorder_cache(torch.tensor([1, 0]))


def copied(model: PreTrainedModel, cache: Any) -> Any:
    return copy.deepcopy(cache)


def in_place(model: PreTrainedModel, cache: Any) -> None:
    for tensor in flatten_cache(cache).values():
        tensor.mul_(0.5)


def trained(model: PreTrainedModel, cache: Any) -> None:
    model.train().eval()


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    "change", [written, switched, away_and_back, cut, turned, copied, in_place, trained]
)
@pytest.mark.parametrize("family", ["gpt2", "bart"])
@pytest.mark.sampled(3)
def test_whatever_happens_between_steps(family: str, change: Any) -> None:
    found = []
    for without in ((), ("held",)):
        model = compiled(family, "prefix_direct", without)
        model.add("prefix_direct", "second")
        stir(model)
        found.append(steps(model, 6, lambda cache, model=model: change(model, cache)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    assert not torch.equal(found[0][2], found[0][3])


def test_gradients_reach_the_prefix_of_a_later_step() -> None:
    model = compiled("gpt2", "prefix_direct")
    steps(model, 3)
    out = model(input_ids=IDS, use_cache=True)
    more = model(input_ids=IDS[:, :1], past_key_values=out.past_key_values, use_cache=True)
    more.logits.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.deltas.parameters())


def test_where_nothing_can_be_remembered_it_is_put_there_again() -> None:
    model = compiled("gpt2", "prefix_direct")
    reference = generated(compiled("gpt2", "prefix_direct", ("held",)))
    with torch.inference_mode():
        assert torch.equal(generated(model), reference)
    assert torch.equal(generated(model, rows=1, prompt_lookup_num_tokens=2), reference[:1])
    assert torch.equal(generated(model), reference)


def test_nothing_is_kept_when_a_cache_is_gone() -> None:
    model = compiled("gpt2", "prefix_direct")
    generated(model)
    found = [one._steps for one in model._programs._runners.values() if one.program.held]
    assert found and all(not one._wholes for one in found if one is not None)
