"""Finite: values of half precision are bounded where not all of them are finite, as the model's own code does."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import batch, stir, tiny
from transformers import BertModel, PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.graph.program import aten
from peftc.model.running import run_program

LORA = peftc.load_spec("lora", r=2)


def halved(family: str, overflows: bool = False) -> PreTrainedModel:
    """In half precision; some of what the last encoder layer gives overflows, and attention takes it."""
    model = tiny(family).half()
    if overflows:
        with torch.no_grad():
            model.get_encoder().layers[-1].final_layer_norm.weight[:2] = 6e4
            for name, weight in model.named_parameters():
                if name.endswith("q_proj.weight"):
                    weight.mul_(1e-3)
    return model


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = batch(model)
    return {k: v.half() if v.is_floating_point() else v for k, v in found.items()}


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("family", ["bart", pytest.param("mbart", marks=pytest.mark.slow)])
def test_as_eager_code_does(family: str, overflows: bool) -> None:
    """Bit for bit, and the same gradients; the pre-norm encoder of mBART bounds its stream."""
    backbone = halved(family, overflows and family == "bart")
    inputs = inputs_of(backbone)
    model = peftc.compile(backbone, LORA)
    for one in (backbone, model):
        one.requires_grad_(True)
    labels = torch.ones_like(inputs["decoder_input_ids"])
    want, got = (one(**inputs, labels=labels) for one in (backbone, model))
    assert torch.isfinite(want.logits).all() and torch.equal(got.logits, want.logits)
    weight = backbone.get_encoder().layers[0].fc1.weight
    grads = [torch.autograd.grad(out.loss, weight)[0] for out in (want, got)]
    # Half precision: two ways to sum what comes back.
    assert torch.allclose(*grads, atol=2e-3 * float(grads[0].abs().max()))


def test_it_is_what_bounds_that_makes_the_difference() -> None:
    """Without it what overflows has no number behind it."""
    backbone = halved("bart", overflows=True)
    model = peftc.compile(backbone, LORA)
    program = model.program("forward", inputs_of(backbone), {})
    selects = [one for one in program.graph.nodes if one.target is aten.where.self]
    bounded = [one for one in selects if "isfinite" in str(one.args[0].args[0].target)]
    assert len(bounded) == 2  # the encoder's layers
    for one in bounded:
        one.replace_all_uses_with(one.args[1])
    assert not torch.isfinite(run_program(model, program, inputs_of(backbone))["logits"]).all()


def test_generates_and_merges_as_the_backbone() -> None:
    backbone = halved("bart", overflows=True)
    inputs = {k: v for k, v in inputs_of(backbone).items() if not k.startswith("decoder")}
    model = peftc.compile(backbone, LORA)
    one, other = (it.generate(**inputs, max_new_tokens=6, num_beams=2) for it in (backbone, model))
    assert torch.equal(one, other)
    merged, report = peftc.merge(stir(model, 0.01))
    assert not report.kept and type(merged) is type(backbone)


class Odd(BertModel):
    """Does more than bound where a value is not finite."""

    def forward(self, **kwargs: Any) -> Any:
        found = super().forward(**kwargs)
        hidden = found.last_hidden_state
        if torch.isinf(hidden).any():
            found.last_hidden_state = torch.clamp(hidden, -1, 1) + 1
        return found


def test_more_than_a_bound_is_refused() -> None:
    with pytest.raises(
        PeftcError, match="whether values are finite decides more than whether they"
    ):
        peftc.compile(Odd(tiny("bert").config).eval(), LORA)
