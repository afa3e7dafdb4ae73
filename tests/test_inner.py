"""Inner models: what is below the head computes with the deltas when it is called by itself, as trl does."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from conftest import batch, stir, tiny

import peftc
from peftc.errors import PeftcError


def last(output: object) -> torch.Tensor:
    value: torch.Tensor = output[0]  # type: ignore[index]
    return value


@pytest.mark.habit("models: hidden states, inner models called by themselves", "the whole model's")
@pytest.mark.sampled(12)
@pytest.mark.parametrize("method", ["lora", "prefix_direct", "head"])
@pytest.mark.parametrize("family", ["bart", "bert", "gpt2", "llama", "gemma2", "distilbert"])
def test_its_states_are_those_that_the_head_reads(family: str, method: str) -> None:
    model = stir(peftc.compile(tiny(family), peftc.load_spec(method)), 0.1)
    inputs = batch(model, "right")
    with torch.no_grad():
        whole = model(**inputs, output_hidden_states=True)
        got = last(model.base_model(**inputs))
        bare = last(model.backbone.base_model(**inputs))
    states = whole.get("decoder_hidden_states") or whole.hidden_states
    assert torch.equal(got, states[-1])
    assert torch.equal(got, bare) is (method == "head")


def test_rows_in_front_are_not_among_its_states() -> None:
    model = stir(peftc.compile(tiny("llama"), peftc.load_spec("prompt_tuning", l=5)))
    inputs = batch(model, "left")
    with torch.no_grad():
        states = last(model.model(**inputs))
        logits = model.lm_head(states)
        assert states.shape[1] == inputs["input_ids"].shape[1]
        assert torch.equal(logits, model(**inputs).logits)


def test_gradients_reach_the_deltas() -> None:
    model = stir(peftc.compile(tiny("llama"), "lora")).train()
    inputs = batch(model)
    learned = [*model.deltas.parameters()]
    below = model.lm_head(last(model.model(**inputs))).square().mean()
    whole = model(**inputs).logits.square().mean()
    found = [torch.autograd.grad(one, learned) for one in (below, whole)]
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*found, strict=True))


def test_it_is_the_base_of_the_body() -> None:
    """One module in two places: tensors, modules, mode, hooks and attributes."""
    model = peftc.compile(tiny("bert"), "lora")
    base, inner = model.bert, model.body.bert
    assert type(base).__name__ == type(inner).__name__ and isinstance(base, type(inner))
    assert base.encoder is inner.encoder and base.config is model.config
    model.train()
    assert inner.training and base.training
    base.eval()
    assert not inner.training
    base.mark = 1
    inner.other = 2
    assert not hasattr(inner, "mark") and base.other == 2
    own = {f"deltas.{name}" for name in model.deltas.state_dict()}
    assert model.state_dict().keys() == model.body.state_dict().keys() | own


def test_bare_it_is_bare() -> None:
    model = stir(peftc.compile(tiny("llama"), "lora"))
    inputs = batch(model)
    with torch.no_grad():
        want = last(model.backbone.model(**inputs))
        with model.base():
            assert torch.equal(last(model.model(**inputs)), want)
        assert not torch.equal(last(model.model(**inputs)), want)
        as_tuple = model.model(inputs["input_ids"], inputs["attention_mask"], return_dict=False)
    assert isinstance(as_tuple, tuple) and not torch.equal(as_tuple[0], want)


def test_a_cache_is_refused_in_words() -> None:
    model = peftc.compile(tiny("llama"), "lora")
    with pytest.raises(
        PeftcError, match=r"LlamaForCausalLM keeps no cache .* call the whole model"
    ):
        model.model(**batch(model), use_cache=True)


def test_what_is_no_tensor_is_refused_by_name() -> None:
    model = peftc.compile(tiny("bert"), "lora")
    inputs = batch(model)
    for one in (model, model.bert):
        with pytest.raises(PeftcError) as error:
            one(**inputs, token_type_ids=inputs["input_ids"].tolist())
        assert str(error.value) == (
            "argument 'token_type_ids' is a list; a compiled model takes tensors, numbers and switches"
        )


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_a_copy_has_its_own(how: str) -> None:
    model = stir(peftc.compile(tiny("llama"), "lora"))
    inputs = batch(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    with torch.no_grad():
        want = last(model.model(**inputs))
        assert torch.equal(last(other.model(**inputs)), want)
        stir(other, seed=7)
        assert not torch.equal(last(other.model(**inputs)), want)
        assert torch.equal(last(model.model(**inputs)), want)


def test_it_holds_no_model() -> None:
    model = peftc.compile(tiny("llama"), "lora")
    gone = weakref.ref(model)
    gc.disable()
    try:
        del model
        assert gone() is None
    finally:
        gc.enable()
