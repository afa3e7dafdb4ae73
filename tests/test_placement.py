"""Placement: a backbone whose weights accelerate keeps elsewhere is compiled, trained, saved and run as any other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import cpu_offload, dispatch_model
from conftest import batch, logits, stir, tiny
from methods import spec
from transformers import PreTrainedModel

import peftc
from peftc.graph.layers import layers_of
from peftc.graph.placement import is_placed

Place = Callable[[PreTrainedModel, Path], object]


def on_disk(model: PreTrainedModel, folder: Path) -> None:
    """Layers in files, each loaded while it runs; all else stays."""
    layers = layers_of(model)
    tops = [k for k in (n for n, _ in model.named_modules()) if k and not k.startswith((*layers,))]
    ends = [k for k in tops if not any(one.startswith(f"{k}.") for one in (*layers, *tops))]
    where = {k: "cpu" for k in ends if k not in {p.rpartition(".")[0] for p in layers}}
    where |= dict.fromkeys(layers, "disk") | dict.fromkeys(model._buffers, "cpu")
    dispatch_model(model, where, main_device="cpu", offload_dir=str(folder), force_hooks=True)


def whole_layers(model: PreTrainedModel, _: Path) -> None:
    """Weights in memory of their own, those of a layer brought all at once."""
    kinds = [type(one).__name__ for one in layers_of(model).values()]
    cpu_offload(model, torch.device("cpu"), preload_module_classes=kinds)


PLACES: dict[str, Place] = {
    "single linears": lambda model, _: cpu_offload(model, torch.device("cpu")),
    "whole layers": whole_layers,
    "on disk": on_disk,
}
CELLS = [("lora", "llama"), ("mam", "bart"), ("dora", "gpt2"), ("pissa", "bert")]


def step(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    torch.manual_seed(0)
    output = model.train()(**inputs).logits
    trained = [p for p in model.deltas.parameters() if p.requires_grad]
    return [output.detach(), *torch.autograd.grad(output.square().mean(), trained)]


@pytest.mark.habit(
    "processes: device_map and offloading (accelerate)", "the model in memory, to the bit"
)
@pytest.mark.sampled(12)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(("method", "family"), CELLS)
def test_the_same_from_elsewhere(method: str, family: str, place: str, tmp_path: Path) -> None:
    """Values, gradients, tokens and the file, to the bit; and the weights are away again after each call."""
    torch.manual_seed(0)
    here = stir(peftc.compile(tiny(family), spec(method)), 0.1)
    backbone = tiny(family)
    PLACES[place](backbone, tmp_path / "weights")
    torch.manual_seed(0)
    there = stir(peftc.compile(backbone, spec(method)), 0.1)
    assert is_placed(there.backbone) and not any(p.is_meta for p in there.deltas.parameters())
    inputs = batch(here, "left")
    for _ in range(2):
        assert torch.equal(logits(there, inputs), logits(here, inputs))
    for one, other in zip(step(there, inputs), step(here, inputs), strict=True):
        assert torch.equal(one, other)
    assert any(p.is_meta for p in backbone.parameters())
    if here.eval().can_generate():
        exact = dict(max_new_tokens=4, pad_token_id=1)
        tokens = [one.eval().generate(**inputs, **exact) for one in (there, here)]
        assert torch.equal(*tokens)
    for name, one in (("there", there), ("here", here)):
        one.save_pretrained(tmp_path / name)
    for file in ("peftc.json", "model.safetensors"):
        assert (tmp_path / "there" / file).read_bytes() == (tmp_path / "here" / file).read_bytes()
    again = peftc.load(tmp_path / "there", backbone=tiny(family))
    assert torch.equal(logits(again, inputs), logits(here, inputs))


def test_a_backbone_stays_placed() -> None:
    backbone = tiny("llama")
    cpu_offload(backbone, torch.device("cpu"))
    inputs = batch(backbone)
    want = logits(backbone, inputs)
    model = stir(peftc.compile(backbone, "lora"), 0.1)
    assert not torch.equal(logits(model, inputs), want)
    assert torch.equal(logits(model.backbone, inputs), want)
    assert torch.equal(logits(peftc.detach(model), inputs), want)


def test_torch_compile_fetches_the_weights() -> None:
    """In pieces: a graph of its own cannot wait for them."""
    backbone = tiny("llama")
    cpu_offload(backbone, torch.device("cpu"))
    model = stir(peftc.compile(backbone, "lora"), 0.1)
    inputs = batch(model, "left")
    want = logits(model, inputs)
    assert torch.equal(logits(torch.compile(model, backend="eager"), inputs), want)
    torch._dynamo.reset()


def test_a_merge_needs_the_weights() -> None:
    backbone = tiny("llama")
    cpu_offload(backbone, torch.device("cpu"))
    model = peftc.compile(backbone, "lora")
    with pytest.raises(peftc.PeftcError, match="its weights are elsewhere until a module runs"):
        peftc.merge(model)


def test_sets_that_train_weights_need_them() -> None:
    backbone = tiny("llama")
    cpu_offload(backbone, torch.device("cpu"))
    model = peftc.compile(backbone, "lora")
    model.add("norm_tuning", "more")
    with pytest.raises(peftc.PeftcError) as error:
        model.use("more")
    assert str(error.value) == (
        "LlamaForCausalLM: sets that train its weights cannot be switched while these are elsewhere "
        "until a module runs; load it without a device_map"
    )
    assert model.in_use == ("default",)
