"""Idle: what code asks of values and computes nothing with stands in no graph; what it computes with is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import batch, tiny
from torch._library.opaque_object import OpaqueBase, register_opaque_type
from transformers import BertModel, PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.graph.program import aten

LORA = peftc.load_spec("lora", r=2)


class Asking(BertModel):
    """Asks of its result what `asks` does, and gives what that makes of it."""

    asks: Callable[[Any, torch.Tensor], torch.Tensor]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        found = super().forward(*args, **kwargs)
        found.last_hidden_state = type(self).asks(self, found.last_hidden_state)
        return found


def asserts(model: Any, h: torch.Tensor) -> torch.Tensor:
    if h.isnan().any() or not h.abs().max() < 1e6:
        raise ValueError("no numbers")
    return h


def watches(model: Any, h: torch.Tensor) -> torch.Tensor:
    if model.seen > 0:
        model.seen = torch.max(model.seen, h.data.max())
    else:
        model.seen = h.data.max()
    return h


def uses(model: Any, h: torch.Tensor) -> torch.Tensor:
    return h * 2 if h.mean() > 0 else h


def writes(model: Any, h: torch.Tensor) -> torch.Tensor:
    first = h[:, 0]
    if h.mean() > 0:
        first.mul_(2)
    return h


def fills(model: Any, h: torch.Tensor) -> torch.Tensor:
    """Its mask has a place in some calls."""
    mask = h[..., 0] > model.seen
    if not mask.any():
        mask = None
    return h if mask is None else h.masked_fill(mask.unsqueeze(-1), 0.5)


def fills_the_rest(model: Any, h: torch.Tensor) -> torch.Tensor:
    mask = h[..., 0] > model.seen
    return h.masked_fill(~mask.unsqueeze(-1), 0.5) if mask.any() else h


def waits(model: Any, h: torch.Tensor) -> torch.Tensor:
    while h.mean() > 0:
        h = h - 1
    return h


def raises_elsewhere(model: Any, h: torch.Tensor) -> torch.Tensor:
    """What is asked first is no assertion, though no there raises in the end."""
    many = bool(h.mean() > 0)
    if not many and h.max() > 0:
        raise ValueError("too few")
    return h * 2 if many else h


def asking(asks: Callable[[Any, torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    kind = type("Asking", (Asking,), {"asks": asks})
    model: PreTrainedModel = kind(tiny("bert", num_hidden_layers=1).config)
    model.register_buffer("seen", torch.zeros(()))
    return model.eval()


@pytest.mark.parametrize("asks", [asserts, watches])
def test_what_nothing_is_computed_with(asks: Any) -> None:
    """The same numbers and gradients, and a buffer of the frozen backbone stays as it is."""
    backbone = asking(asks).train()
    inputs = batch(backbone)
    model = peftc.compile(backbone, LORA).train()
    model.backbone.requires_grad_(True)
    results = []
    for one in (model, asking(lambda _, h: h).train()):
        one.load_state_dict(backbone.state_dict(), strict=False)
        torch.manual_seed(0)
        found = one(**inputs).last_hidden_state
        weight = one.get_parameter("encoder.layer.0.output.dense.weight")
        results.append((found, *torch.autograd.grad(found.square().sum(), weight.requires_grad_())))
    for ours, theirs in zip(*results, strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5 * float(theirs.abs().max()))
    assert model.backbone.seen == 0


@pytest.mark.parametrize(
    "asks",
    [
        uses,
        writes,
        fills_the_rest,
        pytest.param(waits, marks=pytest.mark.slow),
        pytest.param(raises_elsewhere, marks=pytest.mark.slow),
    ],
)
def test_what_something_is_computed_with(asks: Any) -> None:
    with pytest.raises(PeftcError, match=r"cannot be traced(?s:.*)no branch on tensor values"):
        peftc.plan(asking(asks), LORA)


def test_a_mask_that_is_left_out_where_it_is_empty() -> None:
    backbone = asking(fills)
    inputs = batch(backbone)
    model = peftc.compile(backbone, LORA)
    for least in (0.0, 1e6):
        backbone.seen.fill_(least)
        want, found = (one(**inputs).last_hidden_state for one in (backbone, model))
        assert torch.allclose(found, want, atol=1e-5 * float(want.abs().max()))
        assert bool((want == 0.5).any()) is (least == 0)


@pytest.mark.slow
def test_a_range_of_activations() -> None:
    """I-BERT asks of each activation in training whether it is a number, and keeps its range."""
    config = transformers.IBertConfig(
        vocab_size=120,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
    )
    torch.manual_seed(0)
    backbone = transformers.IBertForSequenceClassification(config)
    model = peftc.compile(copy.deepcopy(backbone), LORA).train()
    logits = []
    for one in (model, backbone.train()):
        torch.manual_seed(0)
        logits.append(one(**batch(backbone)).logits)
    assert torch.allclose(*logits, atol=1e-6)


def test_what_one_call_leaves_for_the_next_is_refused() -> None:
    def counts(model: Any, h: torch.Tensor) -> torch.Tensor:
        model.seen = model.seen + 1
        return h * model.seen

    with pytest.raises(PeftcError) as error:
        peftc.plan(asking(counts), LORA)
    assert str(error.value) == (
        "Asking cannot be traced (forward): it reads its buffer 'seen' and sets it to other values, which no graph keeps "
        "from call to call; pass it as an input"
    )

    def moves(model: Any, h: torch.Tensor) -> torch.Tensor:
        model.seen = model.seen.to(h)  # it is there already
        return h + model.seen

    assert peftc.plan(asking(moves), LORA).edits


class Half(OpaqueBase):
    """What an op may take and no graph does: an object."""


def test_an_object_that_is_no_tensor_is_refused() -> None:
    register_opaque_type(Half, typ="reference")

    @torch.library.custom_op("peftc_test::halved", mutates_args=())
    def halved(x: torch.Tensor, by: Half) -> torch.Tensor:
        return x / 2

    halved.register_fake(lambda x, by: torch.empty_like(x))
    backbone = asking(lambda model, h: halved(h, model.by))
    backbone.by = Half()
    with pytest.raises(PeftcError) as error:
        peftc.plan(backbone, LORA)
    assert str(error.value) == (
        "Asking cannot be traced (forward): it reads a Half, and a graph takes tensors alone; compute what it is for "
        "outside of forward"
    )


def test_data_is_recorded() -> None:
    """`h.data` is a value of the graph, without a gradient."""
    model = peftc.compile(asking(lambda _, h: h + h.data.mean()), LORA)
    inputs = batch(model)
    program = model.program("forward", inputs, {})
    assert any(node.target is aten.mean.default for node in program.graph.nodes)
    ours = model(**inputs).last_hidden_state
    assert torch.allclose(ours, model.backbone(**inputs).last_hidden_state, atol=1e-5)
