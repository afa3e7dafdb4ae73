"""Code: what a graph's function calls by Python's names is what the graph says."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from conftest import FAMILIES, attention_of, batch, stir, tiny
from torch import fx
from torch.utils._python_dispatch import TorchDispatchMode

import peftc
from peftc.graph.code import NAMED
from peftc.model.running import Runner

aten = torch.ops.aten
X, SQUARE, HEADS = torch.randn(2, 3, 4), torch.randn(4, 4), torch.randn(2, 2, 3, 4)
ONES = torch.ones(4)
# For each row, arguments as graphs have them.
CALLS: dict[Any, Sequence[tuple[Sequence[Any], Mapping[str, Any]]]] = {
    aten.add.Tensor: [((X, ONES), {}), ((X, 2), {}), ((X, 0.5), {}), ((X, X), {"alpha": 2})],
    aten.addmm.default: [((ONES, SQUARE, SQUARE), {"alpha": 2.0}), ((SQUARE,) * 3, {"beta": 0})],
    aten.bmm.default: [((X, X.mT), {})],
    aten.cat.default: [(([X, X],), {}), (([X, X], -1), {})],
    aten.chunk.default: [((X, 2, -1), {})],
    aten.clone.default: [((X.mT,), {"memory_format": torch.contiguous_format})],
    aten.contiguous.default: [((X.mT,), {})],
    aten.cos.default: [((X,), {})],
    aten.div.Tensor: [((X, ONES), {}), ((X, 8.0), {})],
    aten.dropout.default: [((X, 0.5, False), {}), ((X, 0.5, True), {})],
    aten.embedding.default: [
        ((SQUARE, torch.tensor([[1, 2]])), {}),
        ((SQUARE, torch.tensor([1]), 0), {}),
    ],
    aten.expand.default: [((ONES, [3, -1]), {})],
    aten.flatten.using_ints: [((X, 0, -2), {}), ((X,), {})],
    aten.gelu.default: [((X,), {}), ((X,), {"approximate": "tanh"})],
    aten.layer_norm.default: [((X, [4], ONES, ONES, 1e-5, False), {}), ((X, [4]), {})],
    aten.linear.default: [((X, SQUARE), {}), ((X, SQUARE, ONES), {})],
    aten.matmul.default: [((X, SQUARE), {}), ((HEADS, HEADS.mT), {})],
    aten.mul.Tensor: [((X, ONES), {}), ((X, 2), {}), ((torch.ones(2).long(), 0.5), {})],
    aten.neg.default: [((X,), {})],
    aten.permute.default: [((X, [2, 0, 1]), {})],
    aten.pow.Tensor_Scalar: [((X, 3.0), {}), ((X, 2), {})],
    aten.relu.default: [((X,), {})],
    aten.reshape.default: [((X.mT, [2, -1]), {})],
    aten.rms_norm.default: [((X, [4], ONES, 1e-6), {}), ((X, [4]), {})],
    aten.scaled_dot_product_attention.default: [
        ((HEADS, HEADS, HEADS), {"scale": 0.5}),
        ((HEADS, HEADS, HEADS, None, 0.0, True), {}),
        ((HEADS, HEADS, HEADS, torch.zeros(3, 3)), {}),
        ((HEADS, HEADS[:, :1], HEADS[:, :1]), {"enable_gqa": True}),
    ],
    aten.select.int: [((X, 1, -1), {})],
    aten.silu.default: [((X,), {})],
    aten.sin.default: [((X,), {})],
    aten.softmax.int: [((X, -1), {}), ((X.half(), -1, torch.float32), {})],
    aten.split_with_sizes.default: [((X, [1, 3], -1), {})],
    aten.sub.Tensor: [((X, ONES), {}), ((X, 1), {"alpha": 2})],
    aten.sym_size.int: [((X, 1), {})],
    aten.tanh.default: [((X,), {})],
    aten.transpose.int: [((X, 1, 2), {})],
    aten.unsqueeze.default: [((X, 1), {})],
    aten.view.default: [((X, [-1, 4]), {})],
    aten.view_as.default: [((X, torch.ones(6, 4)), {})],
}


class Dispatched(TorchDispatchMode):
    """What is dispatched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(func)
        return func(*args, **(kwargs or {}))


def seen(call: Any, *args: Any, **kwargs: Any) -> tuple[list[Any], list[Any]]:
    """What a call dispatches, and what it gives, drawn from one seed."""
    torch.manual_seed(0)
    with Dispatched() as mode:
        results = call(*args, **kwargs)
    return mode.ops, torch.utils._pytree.tree_leaves(results)


def same(one: tuple[list[Any], list[Any]], other: tuple[list[Any], list[Any]]) -> bool:
    alike = (
        torch.equal(a, b) and a.dtype == b.dtype if isinstance(a, torch.Tensor) else a == b
        for a, b in zip(one[1], other[1], strict=True)
    )
    return one[0] == other[0] and all(alike)


@pytest.mark.parametrize("op", NAMED, ids=str)
def test_each_name_is_the_op(op: Any) -> None:
    """Of the arguments that graphs have, and with all that may stand by position written out."""
    for args, kwargs in CALLS[op]:
        positional = [one for one in op._schema.arguments if not one.kwarg_only]
        written = (*args, *(one.default_value for one in positional[len(args) :]))
        for given in (args, written):
            assert same(seen(NAMED[op], *given, **kwargs), seen(op, *given, **kwargs))


@pytest.mark.sampled(6)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_graph_is_what_it_says(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each graph that a model runs, step by step and by its function: the same ops, the same bits."""
    model = stir(peftc.compile(tiny(family, attention_of(family)), method(family)))
    ran: list[tuple[Runner, list[Any]]] = []
    own = Runner.run

    def run(runner: Runner, stored: Any, inputs: Any) -> Any:
        left = iter(stored)
        ran.append((runner, [next(left) if n is None else inputs[n] for n in runner._names]))
        return own(runner, stored, inputs)

    monkeypatch.setattr(Runner, "run", run)
    inputs = batch(model)
    with torch.no_grad():
        model(**inputs)
        if model.can_generate():
            model.generate(**inputs, max_new_tokens=3, min_new_tokens=3)
    model.train()(**inputs)
    assert ran
    for runner, arguments in ran:
        program = runner.program
        step_by_step = fx.Interpreter(fx.GraphModule(program.root, program.graph))
        assert same(seen(runner.whole, *arguments), seen(step_by_step.run, *arguments))


def method(family: str) -> str:
    return "lora_conv" if family == "mamba" else "lora"
