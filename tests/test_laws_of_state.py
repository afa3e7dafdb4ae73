"""Laws of state: the graph used is the one for the model as it is now, from any thread, bounded in number."""

from __future__ import annotations

import contextlib
import copy
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import batch, logits, stir, tiny
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from torch import nn
from transformers import PreTrainedModel

import peftc

FAMILIES = ("bert", "gpt2", "llama", "bart")
WALKS, MANY = 2, 300

Action = tuple[str, Any]
DTYPES = (torch.float64, torch.float32, torch.bfloat16)


def modes(model: PreTrainedModel, way: str) -> None:
    """The mode of all, of the first half of the parts, or of the dropouts alone."""
    if way in ("train", "eval"):
        model.train(way == "train")
        return
    parts = [module for module in model.modules() if module is not model]
    if way == "half":
        parts = parts[: len(parts) // 2]
    else:
        parts = [module for module in parts if isinstance(module, nn.Dropout)]
    for module in parts:
        module.training = not module.training


def rates(model: PreTrainedModel, rate: float) -> None:
    """Dropout, where it is a module and where it is a number."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = rate
        elif isinstance(module.__dict__.get("dropout"), float):
            module.dropout = rate


def switch(model: PreTrainedModel, which: tuple[str, bool]) -> None:
    with contextlib.suppress(ValueError):  # SDPA gives no attentions, and a configuration says so
        setattr(model.config, *which)


ACTIONS: dict[str, tuple[Callable[[PreTrainedModel, Any], object], tuple[Any, ...]]] = {
    "modes": (modes, ("train", "eval", "half", "dropouts")),
    "rates": (rates, (0.0, 0.5)),
    "switch": (
        switch,
        tuple(
            (name, on)
            for name in ("output_hidden_states", "output_attentions")
            for on in (True, False)
        ),
    ),
    "attention": (lambda model, name: model.set_attn_implementation(name), ("eager", "sdpa")),
    "dtype": (lambda model, dtype: model.to(dtype), DTYPES),
}
CALLS = st.fixed_dictionaries(
    {
        "size": st.integers(1, 3),
        "length": st.integers(1, 12),
        "padding": st.sampled_from(("none", "left", "right")),
        "flags": st.sampled_from(({}, {"output_hidden_states": True}, {"use_cache": False})),
    }
)
STEPS = st.lists(
    st.sampled_from([(name, value) for name, (_, values) in ACTIONS.items() for value in values]),
    min_size=1,
    max_size=5,
)


def fields(value: Any) -> Iterator[torch.Tensor]:
    """Every tensor of an output, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, dict):
        for one in value.values():
            yield from fields(one)
    elif isinstance(value, list | tuple):
        for one in value:
            yield from fields(one)


def called(model: PreTrainedModel, call: dict[str, Any]) -> list[torch.Tensor]:
    length = max(call["length"], 5) if call["padding"] != "none" else call["length"]
    inputs = batch(model, call["padding"], call["size"], length)
    torch.manual_seed(3)  # for dropout
    with torch.no_grad():
        output = model(**{"use_cache": False, **inputs, **call["flags"]})
    return list(fields(dict(output)))


def walk(family: str, steps: list[Action], call: dict[str, Any]) -> None:
    """Whatever is changed, the compiled model does what its modules do: LoRA starts as nothing."""
    model = peftc.compile(tiny(family), "lora")
    called(model, call)
    for name, value in steps:
        ACTIONS[name][0](model, value)
        got, want = called(model, call), called(model.body, call)
        assert len(got) == len(want), f"{len(got)} tensors, not {len(want)}, after {name} {value}"
        for one, other in zip(got, want):
            assert one.dtype == other.dtype and one.shape == other.shape
            # Eager Llama gives no numbers where a row is padding alone, in float64: its mask is -inf in float32.
            assert torch.equal(one.isnan(), other.isnan())
            one, other = one.nan_to_num(), other.nan_to_num()
            gap = (one - other).abs().max() / other.abs().max().clamp(min=1)
            # half precision rounds after each op, and the trace may sum in another order
            assert gap <= (0.05 if one.dtype == torch.bfloat16 else 1e-5), f"after {name} {value}"


@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_of_now(family: str) -> None:
    many(family, WALKS, 0)


def test_no_numbers_where_eager_has_none() -> None:
    """Found at length: a query that only sees padding, in a type whose least number is -inf in the softmax's."""
    call = {"size": 1, "length": 1, "padding": "left", "flags": {}}
    walk("llama", [("attention", "eager"), ("dtype", torch.float64)], call)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_state_of_now_at_length(family: str, start: int) -> None:
    many(family, MANY, start)


def many(family: str, count: int, start: int) -> None:
    @seed(start)
    @settings(
        max_examples=count, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(STEPS, CALLS)
    def check(steps: list[Action], call: dict[str, Any]) -> None:
        walk(family, steps, call)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_another_device(family: str) -> None:
    """A model that moves runs where it is; the meta device is the one that every machine has."""
    model = peftc.compile(tiny(family), "lora")
    inputs = batch(model)
    want = logits(model, inputs)
    there = {name: value.to("meta") for name, value in inputs.items()}
    got = logits(model.to("meta"), there)
    assert got.is_meta and got.shape == want.shape and got.dtype == want.dtype


def test_another_size_of_image() -> None:
    """Sizes that tracing takes as fixed: another size is another graph."""
    backbone = tiny("vit")
    model = peftc.compile(backbone, "lora")
    for size in (16, 24, 16, 32):
        images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(size))
        inputs = dict(pixel_values=images, interpolate_pos_encoding=size != 16)
        with torch.no_grad():
            got, want = model(**inputs).logits, backbone(**inputs).logits
        assert (got - want).abs().max() <= 1e-5 * want.abs().max().clamp(min=1)


def together(*calls: Callable[[], Any]) -> list[Any]:
    """All calls at once, each in a thread: their results or errors, in order."""
    results: list[Any] = [None] * len(calls)
    gate = threading.Barrier(len(calls))

    def run(i: int) -> None:
        gate.wait()
        try:
            results[i] = calls[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def close(got: torch.Tensor, want: torch.Tensor) -> None:
    """Equal but for float32 rounding: weights of another copy are aligned otherwise, and sums follow that."""
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_first_calls_from_several_threads(family: str) -> None:
    """They agree with one thread, and leave the process as it was."""
    streams = sys.stdout, sys.stderr
    models = [stir(peftc.compile(tiny(family), "lora"), 0.1) for _ in range(2)]
    inputs = batch(models[0], "right")
    inputs["labels"] = inputs["input_ids"] if models[0].can_generate() else torch.tensor([0, 1, 2])
    if "decoder_input_ids" in inputs:
        inputs["labels"] = inputs["decoder_input_ids"]
    want = logits(models[0], inputs)
    for got in together(*[lambda: logits(models[1], inputs)] * 3):
        assert isinstance(got, torch.Tensor), repr(got)
        close(got, want)
    assert (sys.stdout, sys.stderr) == streams


def test_two_models_compile_in_two_threads() -> None:
    """Tracing is the process's: what one thread traces is not seen by another."""
    families = ("bert", "gpt2", "roberta")
    backbones = [tiny(family, vocab_size=121) for family in families]
    inputs = [batch(backbone) for backbone in backbones]

    def one(i: int) -> torch.Tensor:
        model = peftc.compile(copy.deepcopy(backbones[i]), "lora")
        with torch.no_grad():  # random numbers are the process's too: none are drawn here
            for value in model.deltas.values().values():
                value.copy_(torch.linspace(-0.1, 0.1, value.numel()).view_as(value))
        return logits(model, inputs[i])

    got = together(*[lambda i=i: one(i) for i in range(len(families))])
    for i, value in enumerate(got):
        assert isinstance(value, torch.Tensor), repr(value)
        close(value, one(i))
