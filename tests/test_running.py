"""Running graphs: tensors fetched where they live, what reads parameters alone computed once, under other people's
machinery: torch.compile, export, DDP and FSDP, inference mode."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

import passes
import peftc
from peftc.errors import PeftcError

METHODS = {
    "dora": peftc.load_spec("dora", r=2),
    "prefix": peftc.load_spec("prefix_tuning", l=3, m=4),
}
LABELS = torch.tensor([0, 1, 2])


@pytest.fixture(params=METHODS)
def model(request: pytest.FixtureRequest) -> PreTrainedModel:
    return stir(peftc.compile(tiny("bert"), METHODS[request.param]))


def counted(model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> list[int]:
    """A list that grows with each time that the constants of the evaluation graph are computed."""
    runner, _ = model._programs.ready("forward", inputs, {})
    calls: list[int] = []
    head = runner._split.head

    def counting(*tensors: torch.Tensor) -> object:
        calls.append(1)
        return head(*tensors)

    runner._split = dataclasses.replace(runner._split, head=counting)
    return calls


def test_constants_are_computed_once(model: PreTrainedModel) -> None:
    inputs = batch(model)
    calls = counted(model, inputs)
    want = logits(model, inputs)
    assert torch.equal(logits(model, inputs), want) and len(calls) == 1
    stir(model, seed=7)  # written to
    assert not torch.equal(logits(model, inputs), want) and len(calls) == 2
    first = next(iter(model.deltas.values().values()))
    first.data = first.data * 2  # another storage
    got = logits(model, inputs)
    assert len(calls) == 3
    assert torch.allclose(got, logits(copy.deepcopy(model), inputs), atol=1e-6)
    with torch.autocast("cpu", torch.bfloat16):  # another rule of precision
        half = logits(model, inputs)
    assert len(calls) == 4 and half.dtype == torch.bfloat16
    assert torch.equal(logits(model, inputs), got) and len(calls) == 5
    with torch.inference_mode():
        assert torch.equal(model(**inputs).logits, got)
    assert torch.equal(logits(model, inputs), got)
    before = len(calls)
    model.train()
    first.data.mul_(0.5)  # which torch does not count; the mode was switched
    model.eval()
    logits(model, inputs)
    assert len(calls) == before + 1


def fused(model: PreTrainedModel) -> None:
    """A step of Trainer's default optimizer, of whose writes torch counts none; the mode stays."""
    optimizer = torch.optim.AdamW(model.deltas.parameters(), lr=0.1, fused=True)
    for parameter in model.deltas.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = [parameter._version for parameter in model.deltas.parameters()]
    optimizer.step()
    assert before == [parameter._version for parameter in model.deltas.parameters()]


def unseen(model: PreTrainedModel) -> None:
    """As averages of weights are put in place."""
    for parameter in model.deltas.parameters():
        parameter.data.add_(0.1)
    model.eval()


@pytest.mark.parametrize("write", [fused, unseen])
@pytest.mark.parametrize("spec", ["dora", "lora", "mam"])
@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.sampled(2)
def test_what_was_learned_is_what_is_evaluated(
    family: str, spec: str, write: Callable[[PreTrainedModel], None]
) -> None:
    """Between two evaluations, one by one and token by token through a cache."""
    exact = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False, output_logits=True)
    ids = torch.tensor([[5, 6, 7, 8], [3, 9, 9, 11]])

    def values(one: PreTrainedModel) -> torch.Tensor:
        told = one.generate(ids, return_dict_in_generate=True, **exact)
        return torch.cat([*told.logits, *logits(one, batch(one)).unbind(1)])

    model = stir(peftc.compile(tiny(family), spec)).eval()
    before = values(model)
    write(model)
    after = values(model)
    assert torch.equal(after, values(copy.deepcopy(model))) and not torch.equal(after, before)


def test_gradients_flow_in_evaluation(model: PreTrainedModel) -> None:
    inputs = batch(model)
    calls = counted(model, inputs)
    logits(model, inputs)
    model(**inputs).logits.sum().backward()
    assert all(p.grad is not None for p in model.deltas.parameters()) and len(calls) == 1


def test_training_computes_them_each_time(model: PreTrainedModel) -> None:
    inputs = batch(model)
    runner, _ = model.train()._programs.ready("forward", inputs, {})
    assert runner._split is None
    for _ in range(2):  # a graph of gradients is freed by backward
        model(**inputs, labels=LABELS).loss.backward()


def test_lora_has_no_constants() -> None:
    model = peftc.compile(tiny("bert"), "lora", without=["joined"])
    runner, _ = model._programs.ready("forward", batch(model), {})
    assert runner._split is None


def test_random_numbers_are_no_constants() -> None:
    """The noise of diff pruning's gates in training, and its median in evaluation."""
    model = stir(peftc.compile(tiny("bert", hidden_dropout_prob=0.0), "diff_pruning"))
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))


def test_torch_compile_sees_one_graph(model: PreTrainedModel) -> None:
    inputs = batch(model)
    want = logits(model, inputs)
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    fast = torch.compile(model, backend=backend)
    assert torch.allclose(logits(fast, inputs), want, atol=1e-5)
    assert max(len(one.graph.nodes) for one in graphs) > 100
    stir(model, seed=7)
    assert torch.allclose(logits(fast, inputs), logits(model, inputs), atol=1e-5)
    loss = torch.compile(model.train(), backend="eager")(**inputs, labels=LABELS).loss
    loss.backward()
    torch._dynamo.reset()


def test_export_does_not_bake_constants(model: PreTrainedModel) -> None:
    inputs = batch(model, "right")  # a trace reads no masks: it takes the graph that has them
    want = logits(model, inputs)

    class Whole(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            return self.model(input_ids=ids, attention_mask=mask).logits

    with torch.no_grad():
        exported = torch.export.export(Whole(), tuple(inputs.values()), strict=False)
        assert torch.allclose(exported.module()(*inputs.values()), want, atol=1e-5)
        model.config.output_hidden_states = True  # which no graph is for yet
        with pytest.raises(PeftcError, match="run the model once on them before"):
            torch.export.export(Whole(), tuple(inputs.values()), strict=False)
    learned = {f"model.deltas.{path}" for path in model.deltas.values()}
    assert learned <= {*exported.state_dict}


@pytest.fixture
def process(tmp_path: Path) -> Iterator[None]:
    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.habit("processes: DDP and FSDP2 by hand", "the model as it is")
@pytest.mark.parametrize("wrap", [DistributedDataParallel, fully_shard])
def test_sharding_trains_alike(process: None, wrap: Callable[..., object]) -> None:
    def losses(wrapped: bool) -> list[float]:
        still = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
        torch.manual_seed(0)
        model = peftc.compile(tiny("bert", **still), METHODS["dora"]).train()
        inputs = batch(model)
        whole = (wrap(model) or model) if wrapped else model
        optimizer = torch.optim.SGD([p for p in whole.parameters() if p.requires_grad], 0.5)
        found = []
        for _ in range(3):
            loss = whole(**inputs, labels=LABELS).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            found.append(loss.item())
        return [*found, logits(whole.eval(), inputs).sum().item()]

    assert losses(True) == pytest.approx(losses(False), rel=1e-5)


def test_replicas_in_threads_are_refused() -> None:
    model = peftc.compile(tiny("bert"), "lora")
    with pytest.raises(PeftcError, match="use DistributedDataParallel"):
        model._replicate_for_data_parallel()


def test_the_kinds_of_deltas_are_the_rewriters_business(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs are made for the deltas as they are: in float32 on a backbone in bfloat16, say."""
    seen: list[dict[str, torch.dtype]] = []
    own = passes.train

    def train(edits: object, dtypes: dict[str, torch.dtype]) -> object:
        seen.append(dict(dtypes))
        return own(edits)

    monkeypatch.setattr(passes, "train", train)
    model = peftc.compile(tiny("bert"), "lora")
    inputs = batch(model)
    logits(model, inputs)
    assert dict.fromkeys(model.deltas.values(), torch.float32) == seen[-1]
    model.deltas.to(torch.bfloat16)
    held = len(model._programs)
    model.program("forward", inputs, {})
    assert set(seen[-1].values()) == {torch.bfloat16} and len(model._programs) == held + 1
