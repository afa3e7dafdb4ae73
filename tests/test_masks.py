"""Masks: a graph has none where eager code makes none, and the graph used is the one for the masks of now."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import FAMILIES, GROUPED, attention_of, batch, logits, stir, tiny, wide
from methods import spec
from test_matrix import real
from toys import LORA, PREFIX, program
from transformers import (
    BertForSequenceClassification,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

import peftc
from passes import Insert, Masks, Normalize
from peftc.driver import plan as make
from peftc.graph.call import Call
from peftc.graph.masks import deciding
from peftc.graph.program import Program, aten
from peftc.language.reader import parse_spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check

FUSED = [family for family in FAMILIES if attention_of(family) == "sdpa"]


def graphs(model: PreTrainedModel, entry: str = "forward") -> dict[str, Program]:
    """The graphs that a model has, by what masks they are for."""
    held = [one.program for one in model._programs._runners.values()]
    return {one.masks: one for one in held if one.entry == entry}


def masked(one: Program) -> list[bool]:
    """Of each fused attention whether it is given a mask."""
    found = one.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    return [len(node.args) > 3 and node.args[3] is not None for node in found]


@pytest.mark.parametrize("family", FUSED)
@pytest.mark.sampled(2)
def test_padded_and_full_batches_take_turns(family: str) -> None:
    """Whatever came before, a batch gives what the backbone gives for it."""
    backbone = tiny(family)
    model = peftc.compile(backbone, "norm_tuning")
    for padding in ("none", "right", "none", "left", "right"):
        inputs = batch(backbone, padding)
        want = real(model, inputs, logits(backbone, inputs))
        got = real(model, inputs, logits(model, inputs))
        # float32, two layers; a graph may sum in another order
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


@pytest.mark.parametrize("family", ["bert", "bart", "gpt2", "llama"])
@pytest.mark.sampled(2)
def test_a_full_batch_has_no_masks(family: str) -> None:
    model = peftc.compile(tiny(family, "sdpa"), "lora")
    logits(model, batch(model))
    found = graphs(model)
    assert [*found] == ["dropped"] and masked(found["dropped"])
    assert not any(masked(found["dropped"]))
    logits(model, batch(model, "right"))
    found = graphs(model)
    assert [*found] == ["dropped", "explicit"] and any(masked(found["explicit"]))


@pytest.mark.parametrize("family", ["bert", "gpt2"])
def test_written_out_attention_has_one_graph(family: str) -> None:
    """Eager attention adds its mask whether there is padding or not."""
    model = peftc.compile(tiny(family, "eager"), "lora")
    for padding in ("none", "right"):
        logits(model, batch(model, padding))
    assert [*graphs(model)] == ["any"]


def test_a_window_is_a_mask() -> None:
    """A length may pass it, and a graph is one for all lengths."""
    torch.manual_seed(0)
    kinds = ["full_attention", "sliding_attention"]
    config = Qwen2Config(**GROUPED, use_sliding_window=True, sliding_window=4, layer_types=kinds)
    model = peftc.compile(wide(Qwen2ForCausalLM(config)), "norm_tuning")
    inputs = batch(model)
    want = logits(model.backbone, inputs)
    assert torch.allclose(logits(model, inputs), want, atol=1e-4)
    assert sorted(masked(graphs(model)["dropped"])) == [
        False,
        True,
    ]  # one layer sees all, one a window


@pytest.mark.parametrize("family", ["llama", "gpt2", "bart"])
def test_a_step_of_one_token_has_no_masks(family: str) -> None:
    model = stir(peftc.compile(tiny(family, "sdpa"), "mam"))
    prompt = {k: v for k, v in batch(model).items() if k != "decoder_input_ids"}
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    got = model.generate(**prompt, **settings)
    assert torch.equal(got, model.generate(**prompt, **settings, use_cache=False))
    found = graphs(model, "decode")
    assert [*found] == ["dropped"] and not any(masked(found["dropped"]))


def test_grouped_keys_are_left_to_the_kernel() -> None:
    model = peftc.compile(tiny("llama", "sdpa"), "lora")
    logits(model, batch(model))
    names = {str(node.target) for node in graphs(model)["dropped"].graph.nodes}
    assert "aten.expand.default" not in names


@pytest.mark.parametrize("family", ["llama", "mixtral"])
@pytest.mark.parametrize("method", ["multi_head_parallel_adapter", "prefix_direct"])
@pytest.mark.sampled(2)
def test_padded_steps_of_grouped_heads(family: str, method: str) -> None:
    """One query's heads are packed as tokens there: sites see them as heads."""
    model = stir(peftc.compile(tiny(family, "sdpa"), spec(method)))
    prompt = batch(model, "left")
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    got = model.generate(**prompt, **settings)
    assert torch.equal(got, model.generate(**prompt, **settings, use_cache=False))


class Counts(BertForSequenceClassification):
    """A model that masks by the tokens themselves."""

    def forward(self, input_ids: torch.Tensor, attention_mask: Any = None, **kwargs: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=input_ids.ne(7), **kwargs)


def test_a_mask_made_of_something_else_stays() -> None:
    backbone = tiny("bert", "sdpa")
    backbone.__class__ = Counts
    model = peftc.compile(backbone, "lora")
    inputs = batch(backbone)
    inputs["input_ids"][0, -5:] = 7
    assert Call("forward", inputs, False).unpadded
    assert torch.allclose(logits(model, inputs), logits(backbone, inputs), atol=1e-5)
    assert [*graphs(model)] == ["any"]


@pytest.mark.parametrize(
    ("mask", "whole"),
    [
        (torch.ones(2, 4), True),
        (torch.ones(2, 4, dtype=torch.long), True),
        (torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]), False),
        (torch.ones(2, 5), False),  # not as long as what it masks
        (torch.ones(2, 1, 4, 4), False),  # a mask of the user's own
        (torch.ones(2, 4, device="meta"), False),
    ],
)
def test_what_counts_as_unpadded(mask: torch.Tensor, whole: bool) -> None:
    inputs = {"input_ids": torch.ones(2, 4, dtype=torch.long), "attention_mask": mask}
    assert Call("forward", inputs, False).unpadded is whole


def test_other_threads_and_later_calls_decide_for_themselves() -> None:
    given = dict(batch_size=2, q_length=4, kv_length=4, attention_mask=torch.ones(2, 4).bool())
    own = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    found: list[Any] = []
    with deciding(drop=False) as decision:
        ours = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
        assert ours is not own
        thread = threading.Thread(target=lambda: found.append(ours(**given)))
        thread.start()
        thread.join()
        assert found == [None] and not decision.met
        ours(**given)
        assert decision.met
    assert ALL_MASK_ATTENTION_FUNCTIONS["sdpa"] is own


@pytest.mark.parametrize("name", ["lora", "prefix"])
def test_a_mask_becomes_numbers_once(name: str, golden: Callable[[str, str], None]) -> None:
    model = tiny("bert", num_hidden_layers=1)
    one = program()
    plan = make(model, parse_spec({"lora": LORA, "prefix": PREFIX}[name], f"{name}.yaml"))
    for step in (Normalize(), Insert(plan.edits)):
        step.run(one)
    before = program_text(one)
    assert Masks().run(one) == 1 and check(one) == ()
    golden(f"masks_{name}.diff", diff(before, program_text(one)))
    assert Masks().run(one) == 0


def test_all_layers_of_a_kind_share_their_numbers() -> None:
    model = peftc.compile(tiny("llama", "sdpa", num_hidden_layers=3), "lora")
    logits(model, batch(model, "left"))
    one = graphs(model)["explicit"]
    cores = one.graph.find_nodes(
        op="call_function", target=aten.scaled_dot_product_attention.default
    )
    assert len({node.args[3] for node in cores}) == 1 and len(cores) == 3
