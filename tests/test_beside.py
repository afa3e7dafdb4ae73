"""Beside: an adapter beside a feed-forward of another activation costs no product more than the model without it."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from test_tasks import nodes
from test_widen import SEQUENTIAL, adapter

import passes
import peftc
from peftc.driver import program_of
from peftc.graph.aten import LINEAR, MATMUL
from peftc.graph.program import Program
from peftc.model.running import run_program
from peftc.rewrite.constants import alone

FAMILIES = ("bart", "bert", "t5", "gpt2", "neox", "llama")
PRODUCTS = ("MatMul", "Gemm")


def products(program: Program) -> int:
    """Those of data; what is computed of parameters alone is not."""
    free = alone(program)
    found = (n for n in program.graph.nodes if n.op == "call_function" and n not in free)
    return sum(node.target in (*LINEAR, *MATMUL) for node in found)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.sampled(2)
def test_as_many_products_as_bare(family: str, biased: bool) -> None:
    """Gated feed-forwards and weights that are stored turned too."""
    backbone = tiny(family).double()
    bare, inputs = program_of(backbone, "forward", batch(backbone)), batch(backbone)
    model = stir(peftc.compile(backbone, [adapter("tanh", biased=biased)]))
    program = program_of(model, "forward", inputs)
    with torch.no_grad():
        want = run_program(model, program, inputs)["logits"]
        plain = logits(backbone, inputs)
    before, count = products(program), passes.Beside().run(program)
    assert count == before - products(bare) - count > 0
    assert products(program) == products(bare)
    with torch.no_grad():
        got = run_program(model, program, inputs)["logits"]
    assert not torch.allclose(want, plain)
    # float64: sums in another order over two layers
    assert torch.allclose(got, want, atol=1e-12 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("specs", "left"),
    [
        ([adapter("relu"), adapter("tanh", r=5, biased=False)], 0),
        ([adapter("relu"), "mam"], 0),
        ([adapter("relu"), SEQUENTIAL], 4),  # what follows stays behind
        ([SEQUENTIAL, adapter("relu")], 8),  # what it is added to is no linear any more
    ],
)
def test_with_another(specs: list[object], left: int) -> None:
    """Two products a layer, of two, are left of each edit that is not beside its feed-forward."""
    backbone = tiny("bert").double()
    inputs = batch(backbone)
    model = stir(peftc.compile(backbone, specs))
    program = program_of(model, "forward", inputs)
    with torch.no_grad():
        want = run_program(model, program, inputs)["logits"]
    passes.Beside().run(program)
    with torch.no_grad():
        got = run_program(model, program, inputs)["logits"]
    assert torch.allclose(got, want, atol=1e-12 * float(want.abs().max()))
    bare = products(program_of(backbone, "forward", inputs))
    assert products(program) == bare + left


@pytest.mark.sampled(12)
@pytest.mark.parametrize("family", ["bert", "bart", "llama"])
@pytest.mark.parametrize("method", ["lora", "ia3", "bitfit", "widened"])
def test_what_folded_is_as_light_as_bare(family: str, method: str, tmp_path: Path) -> None:
    """Op by op; a widened feed-forward too."""
    if method in ("bitfit", "widened") and family == "llama":
        pytest.skip("it has no bias, and a gate in its feed-forward")
    backbone = tiny(family)
    spec = adapter("gelu") if method == "widened" else method
    model = stir(peftc.compile(copy.deepcopy(backbone), spec))
    assert not peftc.merge(model)[1].kept
    for one, name in ((model, "with"), (backbone, "bare")):
        peftc.export(one, tmp_path / name)
    for file in sorted((tmp_path / "bare").glob("*.onnx")):
        assert nodes(tmp_path / "with" / file.name) == nodes(file)


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "bart"])
def test_in_a_bundle(family: str, tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny(family), [adapter("relu")]))
    peftc.export(model, tmp_path / "with")
    peftc.export(tiny(family), tmp_path / "bare")
    for file in sorted((tmp_path / "bare").glob("*.onnx")):
        ours, bare = (nodes(tmp_path / one / file.name) for one in ("with", "bare"))
        assert sum(map(ours.get, PRODUCTS, (0, 0))) == sum(map(bare.get, PRODUCTS, (0, 0)))
