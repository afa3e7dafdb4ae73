"""torch.compile of a compiled model: in one piece, for all batches, and never for another state than the present one."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from conftest import SAMPLE, Variant, batch, stir, tiny
from methods import spec
from test_matrix import real
from torch import nn
from torch._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._dynamo.utils import counters
from transformers import CompileConfig, PreTrainedModel

import peftc
from peftc.graph.arguments import forward_flags


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def pieces(model: PreTrainedModel) -> tuple[int, int]:
    """How many graphs torch.compile has of a model, and how many breaks there are between them."""
    code = type(model).forward.__code__  # type: ignore[attr-defined]
    return len(_debug_get_cache_entry_list(code)), sum(counters["graph_break"].values())


@pytest.mark.habit("models: torch.compile in one graph", "the model as it is")
@pytest.mark.sampled(100)
@pytest.mark.parametrize(("method", "family"), SAMPLE)
def test_one_graph_for_all_batches(method: str, family: str) -> None:
    variant = Variant.of(method, family)
    model = stir(peftc.compile(variant.backbone(), spec(method)), 0.1)
    # Not 3 rows first: torch takes sizes that are equal then, as those of 3 channels, for one.
    batches = [some(model, *one) for one in (("none", 2, 11), ("right", 3, 9), ("none", 2, 14))]
    whole = torch.compile(model, backend="aot_eager", dynamic=True)
    graphs = 0
    for training in (False, True):
        model.train(training)
        model(**batches[0])
        # A model that loops over tokens has a graph for each length, here as bare.
        graphs += 3 if loops(model, batches[0]) else 1
        for inputs in batches:
            found = [step(one, model, inputs) for one in (model, whole)]
            for eager, traced in zip(*found, strict=True):
                # float32; gradients are summed in another order
                assert (eager - traced).abs().max() <= 1e-6 * eager.abs().max().clamp(min=1)
            stir(model, 0.01)
        assert pieces(model) == (graphs, 0)
    step(whole, model, some(model, "none", 1, 11))
    assert pieces(model) == (graphs + 1, 0)


def loops(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> bool:
    bounds = model.program("forward", inputs, forward_flags(model)).bounds
    return any(one.least == one.most for one in bounds if one.axis == 1)


def some(model: PreTrainedModel, padding: str, size: int, length: int) -> dict[str, torch.Tensor]:
    """A batch of so many rows, of what has no length too."""
    return {k: v[:size].clone() for k, v in batch(model, padding, size, length).items()}


CHANGES: dict[str, Callable[[PreTrainedModel], object]] = {
    "mode": lambda model: model.train(),
    "mode of one module": lambda model: dropout(model).train(),
    "rate": lambda model: setattr(dropout(model).train(), "p", 0.9),
    "configuration": lambda model: setattr(model.config, "attention_probs_dropout_prob", 0.9),
    "attention": lambda model: model.set_attn_implementation("eager"),
    "a layer norm's": lambda model: setattr(model.get_submodule(NORM), "eps", 0.5),
}
NORM = "bert.encoder.layer.0.output.LayerNorm"


def dropout(model: PreTrainedModel) -> nn.Module:
    return next(m for m in model.modules() if isinstance(m, nn.Dropout))


@pytest.mark.sampled(2)
@pytest.mark.parametrize("change", CHANGES)
def test_the_graph_of_now(change: str) -> None:
    """What was traced for one state does not answer for another, and answers again when the state is back."""
    model = stir(peftc.compile(tiny("bert"), spec("lora")), 0.1)
    inputs = batch(model)
    whole = torch.compile(model, backend="eager")
    before = step(whole, model, inputs)[0]
    CHANGES[change](model)
    for _ in range(2):
        now, want = (step(one, model, inputs)[0] for one in (whole, model))
        assert torch.equal(now, want)
    if change not in ("configuration", "attention"):  # which change no value of this model
        assert not torch.equal(now, before)
    assert pieces(model)[1] == 0


def test_cold() -> None:
    """A model that never ran is traced in one piece, where it reads tokens."""
    model = stir(peftc.compile(tiny("llama"), spec("mam")), 0.1).train()
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    inputs = batch(model, "left")
    one, other = (step(run, model, inputs) for run in (whole, model))
    assert torch.equal(one[0], other[0])


def test_another_image_size() -> None:
    model = stir(peftc.compile(tiny("vit"), spec("lora")), 0.1)
    inputs = batch(model)
    whole = torch.compile(model, backend="eager")
    step(whole, model, inputs)
    larger = {"pixel_values": torch.randn(3, 3, 32, 32), "interpolate_pos_encoding": True}
    one, other = (step(run, model, larger)[0] for run in (whole, model))
    assert torch.equal(one, other)


@pytest.mark.habit("models: torch.compile of decoding with a static cache", "the model as it is")
@pytest.mark.parametrize(("family", "method"), [("llama", "prompt_tuning"), ("bart", "mam")])
@pytest.mark.slow
def test_decoding_from_a_static_cache(family: str, method: str) -> None:
    """One graph for all steps of a generation and for the next one; `generate` compiles as on a GPU."""
    model = stir(peftc.compile(tiny(family), spec(method)), 0.1)
    exact = dict(min_new_tokens=6, max_new_tokens=6, pad_token_id=1, do_sample=False)
    static = {**exact, "cache_implementation": "static"}
    whole = CompileConfig(backend="aot_eager", mode=None, fullgraph=True)
    whole._compile_all_devices = True
    for padding in ("left", "none"):
        inputs = batch(model, padding)
        want = model.generate(**inputs, **exact)
        model.generate(**inputs, **static)
        assert torch.equal(model.generate(**inputs, **static, compile_config=whole), want)
    assert pieces(model) == (1, 0)


@pytest.mark.habit("models: torch.compile by Inductor", "the model as it is")
@pytest.mark.slow
def test_inductor() -> None:
    """The same numbers from kernels that torch writes itself, values and gradients."""
    model = stir(peftc.compile(tiny("llama"), spec("mam")), 0.1).train()
    whole = torch.compile(model)
    for inputs in (batch(model), batch(model, "right", 2, 9)):
        found = [step(run, model, inputs) for run in (whole, model)]
        for one, other in zip(*found, strict=True):
            # float32, two layers, sums in another order
            assert (one - other).abs().max() <= 1e-5 * other.abs().max().clamp(min=1)


def step(
    run: object, model: PreTrainedModel, inputs: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """What a model gives, and the gradients."""
    torch.manual_seed(0)
    value = real(model, inputs, run(**inputs).logits)  # type: ignore[operator]
    if not model.training:
        return [value.detach()]
    learned = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(value.square().mean(), learned, allow_unused=True)
    return [value.detach(), *(slope for slope in slopes if slope is not None)]
