"""Regions: a graph runs layer by layer, each as the forward of the backbone's own layer, where somebody follows."""

from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, logits, stir, tiny
from measured import saved_bytes
from methods import spec
from torch import nn
from transformers import PreTrainedModel

import peftc
from peftc.graph.layers import Forward, cut, layers_of
from peftc.graph.program import Program

FAMILIES = ("bart", "bert", "gpt2", "llama", "t5", "whisper")
METHODS = ("lora", "mam", "prompt_tuning")
CELLS = [
    (method, family)
    for method in METHODS
    for family in FAMILIES
    if (method, family) != ("prompt_tuning", "whisper")
]


def step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """The result and the gradients of one training step, dropout and all."""
    model.zero_grad()
    torch.manual_seed(3)
    output = model(**inputs, use_cache=False).logits
    output.square().mean().backward()
    return [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def equal(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))


@pytest.mark.sampled(5)
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_regions_are_the_graph(method: str, family: str) -> None:
    """With hooks on its layers, and with these computed twice, a step is the same to the bit, and as before after."""
    model = stir(peftc.compile(tiny(family), spec(method)), 0.1).train()
    inputs = batch(model, "right")
    want, seen = step(model, inputs), []
    layers = layers_of(model)
    hooks = [
        layer.register_forward_hook(lambda *_, name=name: seen.append(name))
        for name, layer in layers.items()
    ]
    assert equal(step(model, inputs), want) and seen == [*layers]  # each once, in order
    model.gradient_checkpointing_enable()
    assert equal(step(model, inputs), want)
    for one in hooks:
        one.remove()
    seen.clear()
    assert equal(step(model, inputs), want)
    model.gradient_checkpointing_disable()
    assert equal(step(model, inputs), want) and not seen
    assert not any(isinstance(m.forward, Forward) for m in peftc.detach(model).modules())


@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
def test_generation_in_regions(family: str) -> None:
    model = stir(peftc.compile(tiny(family), "mam"))
    prompt = {k: v for k, v in batch(model, "left").items() if k != "decoder_input_ids"}
    settings = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    want, seen = model.generate(**prompt, **settings), []
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(model.generate(**prompt, **settings), want) and seen


@pytest.mark.habit("models: forward hooks on layers", "the layer's values")
def test_a_hook_sees_and_changes_what_a_layer_gives() -> None:
    """The same values as in the backbone alone, states first; what a hook returns goes on."""
    backbone = tiny("llama")
    model = peftc.compile(backbone, "lora")
    inputs = batch(backbone)
    layers = [layers_of(one)["model.layers.0"] for one in (backbone, model)]
    seen: list[tuple[Any, Any]] = []
    hooks = [
        one.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
        for one in layers
    ]
    logits(backbone, inputs)
    logits(model, inputs)
    (mine, theirs) = seen
    assert all(torch.allclose(one, other, atol=1e-6) for one, other in zip(mine, theirs))
    for one, hook in zip(layers, hooks):
        hook.remove()
        one.register_forward_hook(lambda _, args, out: out * 2)
    assert torch.allclose(logits(model, inputs), logits(backbone, inputs), atol=1e-5)


@pytest.mark.habit("models: layers computed twice", "gradients without")
@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["lora", "mam", "prompt_tuning"])
def test_layers_computed_twice_save_memory(method: str) -> None:
    """At twelve layers at most a quarter, what checkpoints hold by themselves (the layers' inputs) added."""
    model = peftc.compile(tiny("llama", num_hidden_layers=12), spec(method)).train()
    inputs = batch(model, "right")

    whole = saved_bytes(model, inputs)
    model.gradient_checkpointing_enable()
    held: dict[int, int] = {}

    def note(_: nn.Module, args: tuple[Any, ...]) -> None:
        for one in args:
            if isinstance(one, torch.Tensor) and not isinstance(one, nn.Parameter):
                held[one.untyped_storage().data_ptr()] = one.untyped_storage().nbytes()

    for layer in layers_of(model).values():
        layer.register_forward_pre_hook(note)
    assert saved_bytes(model, inputs) + sum(held.values()) <= whole / 4


def test_every_other_layer_is_computed_twice() -> None:
    model = peftc.compile(tiny("llama", num_hidden_layers=4), "lora").train()
    inputs = batch(model)

    sizes = [saved_bytes(model, inputs)]
    for every in (2, 1):
        model.activation_checkpointing_enable(every_n_layers=every)
        sizes.append(saved_bytes(model, inputs))
    assert sizes[0] > 1.5 * sizes[1] > 2 * sizes[2]


def test_recomputing_is_switched_as_in_transformers() -> None:
    model = peftc.compile(tiny("bert"), "lora")
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert model.is_gradient_checkpointing and model.is_activation_checkpointing
    with pytest.raises(ValueError, match="without reentering"):
        model.gradient_checkpointing_enable({"use_reentrant": True})
    model.gradient_checkpointing_disable()
    assert not model.is_gradient_checkpointing


def test_a_backbone_that_recomputes_its_layers_is_compiled_alike() -> None:
    backbone = tiny("llama")
    inputs = batch(backbone)
    want = step(stir(peftc.compile(backbone, "lora")).train(), inputs)
    other = tiny("llama")
    other.gradient_checkpointing_enable()
    model = stir(peftc.compile(other, "lora")).train()
    assert model.is_gradient_checkpointing and equal(step(model, inputs), want)


def test_copies_have_layers_of_their_own() -> None:
    model = stir(peftc.compile(tiny("llama"), "lora"))
    inputs = batch(model)
    want = logits(model, inputs)
    hook = layers_of(model)["model.layers.0"].register_forward_hook(lambda *_: None)
    logits(model, inputs)
    hook.remove()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        seen: list[nn.Module] = []
        layer = layers_of(twin)["model.layers.0"]
        layer.register_forward_hook(lambda one, *_, seen=seen: seen.append(one))
        assert torch.allclose(logits(twin, inputs), want, atol=1e-6)  # sums follow alignment
        assert seen == [layer]


def test_hooks_deeper_than_layers_are_told_of() -> None:
    model = peftc.compile(tiny("llama"), "lora")
    model.model.layers[0].mlp.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=r"hooks on 'model.layers.0.mlp' do not run"):
        logits(model, batch(model))


def test_a_layer_is_one_region() -> None:
    """What a delta adds belongs to its site's layer; what stands between a layer's nodes goes with it."""
    model = peftc.compile(tiny("bart"), "mam")
    logits(model, batch(model))
    (one,) = (r.program for r in model._programs._runners.values())
    assert isinstance(one, Program)
    regions = [region.layer for region in cut(one, layers_of(model)).regions]
    assert [name for name in regions if name] == [*layers_of(model)]


@pytest.mark.habit("processes: fully_shard by layer", "one process, to the bit")
@pytest.mark.slow
@pytest.mark.parametrize("method", ["lora", "mam"])
def test_sharded_layer_by_layer(method: str, tmp_path: Path) -> None:
    """Two processes: the losses of one process to the bit, and never more of the layers whole than one."""
    script = Path(__file__).parent / "sharded.py"
    running = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", script, str(rank), tmp_path, method],
            stderr=subprocess.PIPE,
        )
        for rank in (0, 1)
    ]
    for one in running:
        _, errors = one.communicate(timeout=300)
        assert one.returncode == 0, errors.decode()[-2000:]
    for rank in (0, 1):
        (losses, _, layer), sharded = json.loads((tmp_path / f"{rank}.json").read_text())
        assert sharded == [losses, layer, layer]
