"""Joined: in evaluation one value is multiplied once by all narrow matrices; the printed difference is the golden."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from conftest import batch, logits, stir, tiny
from measured import Kernels
from methods import spec
from toys import inserted
from transformers import PreTrainedModel

import peftc
from passes import Joined, Products
from peftc.driver import Trace
from peftc.graph.layers import layers_of
from peftc.language.reader import parse_spec
from peftc.language.spec import Spec
from peftc.rewrite.text import diff, program_text
from peftc.rewrite.verify import check

QKV = ("attention.q", "attention.k", "attention.v")


def lora(*sides: str, delta: str = "x @ down @ up", more: str = "", **ranks: int) -> Spec:
    """A rank-2 product at each side, or of another rank."""
    entries = (
        f"""
  - at: {side}
    params:
      down: {{shape: [in, {ranks.get(side[-1], 2)}], init: normal{more}}}
      up: {{shape: [{ranks.get(side[-1], 2)}, out], init: normal}}
    delta: {delta}"""
        for side in sides
    )
    return parse_spec("name: lora\ndeltas:" + "".join(entries))


def found(family: str, specs: Spec | list[Spec], train: bool = False) -> tuple[float, int]:
    """How far values and gradients are from those without the pass, and how many products were joined."""
    results, trace = [], Trace()
    for without in ((), ("joined",)):
        model = peftc.compile(tiny(family).double(), specs, without=without, trace=trace)
        stir(model).train(train)
        inputs = batch(model, "right")
        torch.manual_seed(0)
        value = model(**inputs).logits
        learned = [p for p in model.parameters() if p.requires_grad]
        slopes = torch.autograd.grad(value.square().mean(), learned)
        quiet = [] if train else [logits(model, inputs)]  # of constants that are kept
        results.append((value, *slopes, *quiet))
    worst = max(
        ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()
        for one, other in zip(*results, strict=True)
    )
    joined = [one.rewrites for one in trace.results if one.name == "joined"]
    return worst, joined[-1]


# A spec, and how many products of one of the two layers are joined.
JOINED = {
    "q and v": (lora("attention.q", "attention.v"), 2),
    "three, of three ranks": (lora(*QKV, q=1, k=2, v=3), 3),
    "two entries at one side": (lora("attention.q", "attention.q"), 2),
    "up and gate": (lora("ffn.up", "ffn.gate"), 2),
    "scaled, which reads a part": (lora(*QKV, delta="((x @ down) * 0.5) @ up"), 3),
    "activated": (lora(*QKV, delta="gelu(x @ down) @ up"), 3),
    "turned": (lora(*QKV, delta="x @ (2 * down) @ up"), 3),
    "one matrix for all": (
        lora("attention.q", "attention.v", "attention.v", more=", per: model"),
        3,
    ),
    "one": (lora("attention.q"), 0),
    "an x of its own each": (lora("attention.o", "ffn.down"), 0),
    "what moves x first": (lora(*QKV, delta="tanh(x) @ down @ up"), 0),
    "together wider than x": (lora(*QKV, q=12, k=12, v=12), 0),  # 36 of 32
}


@pytest.mark.parametrize("name", JOINED)
def test_every_product_is_what_it_was(name: str) -> None:
    """Values and gradients in evaluation, to the rounding of float64."""
    wanted, count = JOINED[name]
    worst, joined = found("llama", wanted)
    assert worst <= 1e-9 and joined == 2 * count


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", ["bart", "bert", "gpt2", "neox", "phi3", "t5"])
@pytest.mark.parametrize("seed", range(2))
def test_every_family(seed: int, family: str) -> None:
    """Random sides, ranks and formulas, beside another method; LoRA of fused projections reads one x too."""
    draw = random.Random(f"{family} {seed}")
    sides = draw.choices(QKV, k=draw.randint(2, 5))
    ranks = {side[-1]: draw.randint(1, 4) for side in QKV}
    delta = draw.choice(["x @ down @ up", "relu(x @ down) @ up", "0.3 * ((x @ down) * 2) @ up"])
    other = draw.choice(["parallel_adapter", "scaled_parallel_adapter", "vera", "prefix_direct"])
    worst, joined = found(family, [lora(*sides, delta=delta, **ranks), spec(other)])
    assert worst <= 1e-9 and joined >= 2 * 2


def test_the_types_of_matrices_stay_apart() -> None:
    """Those of one type are joined, their casts of x too; one of another type stays by itself."""
    results, trace = [], Trace()
    for without in ((), ("joined",)):
        model = peftc.compile(tiny("llama").bfloat16(), lora(*QKV), without=without, trace=trace)
        stir(model).deltas.float()
        results.append(logits(model, batch(model)))
        for name, module in model.deltas.named_modules():
            if name.endswith("attention_q"):
                module.double()
        results.append(logits(model, batch(model)))
    joined = [one.rewrites for one in trace.results if one.name == "joined"]
    assert joined[-2:] == [2 * 3, 2 * 2]
    for one, other in zip(results[:2], results[2:], strict=True):
        # sums in float32 that differ in their last bit may round to the next bfloat16, in two layers
        assert (one - other).abs().max() <= 4 * torch.finfo(one.dtype).eps * other.abs().max()


def test_training_is_left_alone() -> None:
    """What a step changes is no constant; and then there may be dropout before each matrix."""
    dropped = lora(*QKV, delta="dropout(x, 0.5) @ down @ up")
    worst, joined = found("llama", dropped, train=True)
    assert worst == 0 and joined == 0
    assert found("llama", dropped)[1] == 2 * 3  # there is none in evaluation


def test_joined(golden: Callable[[str, str], None]) -> None:
    one = inserted(lora(*QKV), Products())
    before = program_text(one)
    for left in (replace(one, training=True), replace(one, entry="decode")):
        assert Joined().run(left) == 0 and program_text(left) == before
    assert Joined().run(one) == 3 and check(one) == ()
    golden("joined.diff", diff(before, program_text(one)))
    assert Joined().run(one) == 0


def kernels(family: str, sides: tuple[str, ...], without: tuple[str, ...]) -> tuple[Kernels, int]:
    """What one evaluation dispatches whose constants are known; and how much one with gradients does."""
    model: PreTrainedModel = stir(peftc.compile(tiny(family), lora(*sides), without=without))
    inputs = batch(model)
    for _ in range(2):
        with Kernels() as quiet:
            logits(model, inputs)
        with Kernels() as learning:
            model(**inputs).logits.sum().backward()
    return quiet, learning.kernels.total()


@pytest.mark.parametrize("sides", [QKV[::2], QKV], ids=len)
@pytest.mark.parametrize("family", ["bart", "gpt2", "llama"])
def test_n_products_are_one(family: str, sides: tuple[str, ...]) -> None:
    """One kernel for n that read one x, and a view that cuts it; with gradients there are no more than before."""
    (one, more), (other, most) = (kernels(family, sides, out) for out in ((), ("joined",)))
    # BART has two encoder and two decoder layers; cross attention's query reads another x than its key and value.
    a_layer = len(sides) - 1 if family != "bart" else 2 * (len(sides) - 1) + len(sides) - 2
    assert other.kernels - one.kernels == {"aten.mm.default": 2 * a_layer}
    groups = 2 if family != "bart" else 2 * len(sides)
    assert one.kernels - other.kernels == {} and one.views <= other.views + groups and more <= most


def test_layer_by_layer() -> None:
    """The joined matrix is made in the layer whose sites read it."""
    model = stir(peftc.compile(tiny("llama"), lora(*QKV)))
    inputs = batch(model)
    want = logits(model, inputs)
    seen: list[object] = []
    for layer in layers_of(model).values():
        layer.register_forward_hook(lambda *taken: seen.append(taken[-1]))
    assert torch.equal(logits(model, inputs), want)
    # Hidden states alone leave a layer: a part that left it, too, would make a tuple of them.
    assert len(seen) == 2 and all(isinstance(one, torch.Tensor) for one in seen)
