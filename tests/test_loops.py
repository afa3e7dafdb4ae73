"""Loops over chosen experts: a graph has all of them, of which those that nobody chose do nothing; what does more is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import tiny
from torch.nn import functional
from transformers import BertModel, PreTrainedModel, SwitchTransformersConfig
from transformers import SwitchTransformersForConditionalGeneration as Switch

import peftc
from peftc.errors import CaptureError
from peftc.language.reader import parse_spec

LORA = peftc.load_spec("lora", r=2)
EXPERTS = 4
SPEC = """
deltas:
  - at: {op: linear, scope: "encoder.*.experts.*"}
    params:
      down: {shape: [in, 2], init: kaiming_uniform}
      up: {shape: [2, out], init: zeros}
    delta: x @ down @ up
    compose: h + delta
"""
Tensor = torch.Tensor


def _mask(rows: Tensor) -> Tensor:
    """[experts, 1, rows]: which expert each row chooses."""
    chosen = rows[:, :EXPERTS].argmax(-1, keepdim=True)
    return functional.one_hot(chosen, EXPERTS).permute(2, 1, 0)


def adds(rows: Tensor) -> Tensor:
    mask, out = _mask(rows), torch.zeros_like(rows)
    for one in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        _, place = torch.where(mask[one].squeeze(0))
        out.index_add_(0, place, rows[place] * (2 + one))
    return out


def puts(rows: Tensor) -> Tensor:
    mask, out = _mask(rows), torch.zeros_like(rows)
    for one in torch.greater(mask.sum(dim=(1, 2)), 0).nonzero():
        expert = int(one.item())
        _, place = torch.where(mask[expert])
        if place.numel() == 0:
            continue
        out[place] = rows[place].tanh()
    return out


def scales(rows: Tensor) -> Tensor:
    mask = _mask(rows)
    for _ in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        rows = rows * 2
    return rows


def averages(rows: Tensor) -> Tensor:
    mask, out = _mask(rows), torch.zeros_like(rows)
    for one in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        _, place = torch.where(mask[one].squeeze(0))
        out = out + rows[place].sum(0)
        out.index_add_(0, place, rows[place])
    return out


def leaves_one(rows: Tensor) -> Tensor:
    mask, out = _mask(rows), torch.zeros_like(rows)
    for one in (mask.sum(dim=(-1, -2)) > 1).nonzero():
        _, place = torch.where(mask[one].squeeze(0))
        out.index_add_(0, place, rows[place])
    return out


def of_another(rows: Tensor) -> Tensor:
    mask, out = _mask(rows), torch.zeros_like(rows)
    for one in (mask.sum(dim=(-1, -2)) > 0).nonzero():
        _, place = torch.where(mask[0])
        out.index_add_(0, place, rows[place] * one)
    return out


class Looping(BertModel):
    """Gives what `loop` makes of its rows."""

    loop: Callable[[Tensor], Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        h = found.last_hidden_state
        found.last_hidden_state = type(self).loop(h.reshape(-1, h.shape[-1])).view_as(h)
        return found


def looping(loop: Callable[[Tensor], Tensor]) -> PreTrainedModel:
    kind = type("Looping", (Looping,), {"loop": staticmethod(loop)})
    model: PreTrainedModel = kind(tiny("bert", num_hidden_layers=1).config)
    return model.eval()


@pytest.mark.parametrize("loop", [adds, puts])
@pytest.mark.parametrize("shape", [(1, 1), (3, 7)])
def test_experts_that_nobody_chose_do_nothing(
    loop: Callable[[Tensor], Tensor], shape: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    bare = looping(loop)
    model = peftc.compile(copy.deepcopy(bare), LORA)
    ids = torch.randint(3, 100, shape)
    mine, theirs = model(input_ids=ids).last_hidden_state, bare(input_ids=ids).last_hidden_state
    torch.testing.assert_close(mine, theirs)
    (mine.square().sum()).backward()
    assert all(one.grad is not None for one in model.parameters() if one.requires_grad)


@pytest.mark.parametrize("loop", [scales, averages, leaves_one, of_another])
def test_what_a_loop_does_besides_is_refused(loop: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match="cannot be traced"):
        peftc.plan(looping(loop), LORA)


def test_lora_of_experts_that_are_modules() -> None:
    """Switch Transformers: the mixture is a feed-forward, each expert's linears are sites, and what is trained there
    folds."""
    torch.manual_seed(0)
    config = SwitchTransformersConfig(
        vocab_size=99,
        d_model=32,
        d_kv=8,
        d_ff=48,
        num_layers=2,
        num_decoder_layers=1,
        num_heads=4,
        num_experts=EXPERTS,
        num_sparse_encoder_layers=1,
        num_sparse_decoder_layers=0,
        decoder_start_token_id=0,
    )
    bare = Switch(config).eval()
    model = peftc.compile(copy.deepcopy(bare), parse_spec(SPEC, "experts"))
    assert "encoder.block.1.layer.1.mlp" in [s.scope for s in model.plan.sites if s.at == "ffn"]
    assert len([e for e in model.plan.edits if "block.1" in e.site.scope]) == 2 * EXPERTS
    ids = {
        "input_ids": torch.randint(3, 99, (2, 9)),
        "attention_mask": torch.ones(2, 9).long(),
        "decoder_input_ids": torch.ones(2, 4).long(),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**ids).logits, bare(**ids).logits)
        for one in model.parameters():
            if one.requires_grad:
                one.normal_(std=0.3)
        changed = model(**ids).logits
        assert (changed - bare(**ids).logits).abs().max() > 1e-3
        folded, report = peftc.merge(model)
        assert not report.kept
        torch.testing.assert_close(folded(**ids).logits, changed, atol=1e-5, rtol=1e-4)
