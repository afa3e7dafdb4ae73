"""Functions with a backward of their own: gradients are those of eager code, and sites are found around them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, logits, stir, tiny
from methods import spec
from torch import nn
from torch.autograd import Function
from transformers import PreTrainedModel

import peftc
from peftc.driver import survey


class Rounded(Function):
    """Rounds to quarters, and passes the gradient on as it is (a straight-through estimator)."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, parts: int) -> torch.Tensor:
        return torch.round(x * parts) / parts

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return gradients[0], None


class Clipped(Function):
    """Two values, of which the gradients are clipped; written the new way."""

    @staticmethod
    def forward(x: torch.Tensor) -> Any:
        return torch.tanh(x), x.mean(-1, keepdim=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        (x,) = ctx.saved_tensors
        return gradients[0].clamp(-1e-3, 1e-3) + gradients[1].expand_as(x) * 3


class Softened(Function):
    """A softmax as SEW-D has it."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        y = torch.softmax(x, -1)
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        (y,) = ctx.saved_tensors
        inner = (gradients[0] * y).sum(-1, keepdim=True)
        return y * (gradients[0] - inner)


class Again(Function):
    """Runs a module without gradients, and again on the way back, as Reformer does."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, module: nn.Module) -> torch.Tensor:
        ctx.save_for_backward(x.detach())
        ctx.module = module
        with torch.no_grad():
            return module(x)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        x = ctx.saved_tensors[0].requires_grad_()
        with torch.enable_grad():
            ctx.module(x).backward(gradients[0])
        return x.grad, None


class Act(nn.Module):
    def __init__(self, call: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.call = call

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.call(x)


CALLS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "a number": lambda x: Rounded.apply(x, 4),
    "two values": lambda x: sum(Clipped.apply(x)),  # type: ignore[arg-type, return-value]
    "a module": lambda x: Again.apply(x, nn.Tanh()),
    "a softmax": lambda x: torch.relu(Softened.apply(x)),
}


def model_with(call: Callable[[torch.Tensor], torch.Tensor]) -> PreTrainedModel:
    model = tiny("bert", hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).double()
    model.bert.encoder.layer[0].intermediate.intermediate_act_fn = Act(call)
    return model


def gradients(model: PreTrainedModel, run: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    learned = [value for _, value in sorted(model.named_parameters()) if value.requires_grad]
    loss = run(**inputs).logits.square().mean()
    found = torch.autograd.grad(loss, learned, allow_unused=True)
    return torch.cat([one.flatten() for one in found if one is not None])


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("case", CALLS)
@pytest.mark.sampled(2)
def test_gradients_are_those_of_eager_code(case: str, training: bool) -> None:
    """Of biases that a spec adds to those of the model, as of these themselves; whole, and by torch.compile."""
    backbone = model_with(CALLS[case])
    bare = copy.deepcopy(backbone).train(training)
    model = peftc.compile(backbone, spec("bitfit")).train(training)
    inputs = batch(backbone, "right")
    mine = {path for path, value in model.named_parameters() if value.requires_grad}
    for path, value in bare.named_parameters():
        value.requires_grad_(path in mine)
    want, got = gradients(bare, bare, inputs), gradients(model, model, inputs)
    assert torch.allclose(got, want, rtol=1e-9, atol=1e-15) and want.count_nonzero() > 100
    traced = torch.compile(model, backend="aot_eager")
    assert torch.allclose(gradients(model, traced, inputs), want, rtol=1e-9, atol=1e-15)
    torch._dynamo.reset()


def test_sites_are_found_around_them() -> None:
    plain, own = (survey(model) for model in (tiny("bert"), model_with(CALLS["a number"]).float()))
    assert [(one.at, one.scope) for one in own] == [(one.at, one.scope) for one in plain]


def test_it_is_stored_copied_and_exported(tmp_path: Path) -> None:
    model = stir(peftc.compile(model_with(CALLS["a number"]).float(), spec("lora")))
    inputs = batch(model, "right")
    want = logits(model, inputs)
    assert torch.equal(logits(copy.deepcopy(model), inputs), want)
    parity = peftc.export(model, tmp_path / "b")
    assert all(one.error <= one.tolerance for one in parity)
