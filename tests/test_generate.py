"""Generation through the rewritten graphs: against Hugging Face without deltas, and an eager rewrite with."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import Told, batch, stir, tiny
from methods import spec
from torch import nn
from transformers import BertTokenizer, PreTrainedModel, pipeline

import peftc
from peftc.errors import UncachedError
from peftc.model.compiled import CompiledModel

MODES = {
    "greedy": dict(do_sample=False),
    "beam": dict(num_beams=4, do_sample=False, length_penalty=2.0),
    "sample": dict(do_sample=True, top_k=20),
}


def generate(model: PreTrainedModel, mode: str) -> torch.Tensor:
    inputs = batch(model, "left")
    inputs.pop("decoder_input_ids", None)
    torch.manual_seed(7)
    out: torch.Tensor = model.generate(
        **inputs, max_new_tokens=12, min_new_tokens=8, pad_token_id=1, **MODES[mode]
    )
    return out


@pytest.mark.habit("generation: greedy, beams, sampling", "Hugging Face's tokens")
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("family", ["bart", "gpt2"])
@pytest.mark.parametrize("method", ["lora", "scaled_parallel_adapter"])
def test_zero_deltas_generate_as_the_backbone(family: str, mode: str, method: str) -> None:
    backbone = tiny(family)
    want = generate(backbone, mode)
    model = peftc.compile(backbone, peftc.load_spec(method, r=4))
    assert torch.equal(generate(model, mode), want)


class Lora(nn.Module):
    """Hu et al. 2021, equation 3, as a module: for the oracle only."""

    def __init__(
        self, linear: nn.Module, down: torch.Tensor, up: torch.Tensor, scale: float
    ) -> None:
        super().__init__()
        self.linear, self.down, self.up, self.scale = linear, down, up, scale

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.linear(x) + self.scale * (x @ self.down @ self.up)


class Adapted(nn.Module):
    """The last projection of a feed-forward plus a parallel adapter over the first one's input."""

    def __init__(
        self, first: nn.Module, last: nn.Module, p: dict[str, torch.Tensor], s: float
    ) -> None:
        super().__init__()
        self.last, self.p, self.s = last, p, s
        first.register_forward_pre_hook(self.remember)

    def remember(self, _: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        self.x = args[0]

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        p = self.p
        delta = torch.relu(self.x @ p["down"] + p["down_bias"]) @ p["up"] + p["up_bias"]
        return self.last(hidden) + self.s * delta


def eager(backbone: PreTrainedModel, model: PreTrainedModel) -> PreTrainedModel:
    """An independent rewrite of LoRA and scaled parallel adapters, by module replacement."""
    other = copy.deepcopy(backbone)
    values = model.deltas.values()
    for edit in model.plan.edits:
        p = {one.name: values[one.path] for one in edit.parameters}
        if edit.entry.method == "lora":
            owner, _, name = edit.site.weights["W"].path.removesuffix(".weight").rpartition(".")
            parent = other.get_submodule(owner)
            setattr(parent, name, Lora(getattr(parent, name), p["down"], p["up"], 2.0))
        else:
            first = other.get_submodule(edit.site.weights["up"].path.removesuffix(".weight"))
            owner, _, name = edit.site.weights["W"].path.removesuffix(".weight").rpartition(".")
            parent = other.get_submodule(owner)
            setattr(parent, name, Adapted(first, getattr(parent, name), p, 4.0))
    return other


@pytest.mark.habit(
    "generation: greedy, beams, sampling, deltas with values", "the formulas as plain modules"
)
@pytest.mark.parametrize("mode", sorted(MODES))
@pytest.mark.parametrize("method", ["lora", "scaled_parallel_adapter"])
def test_bart_generates_as_an_independent_rewrite(method: str, mode: str) -> None:
    backbone = tiny("bart")
    arguments = {"r": 4, "alpha": 8} if method == "lora" else {"r": 4}
    model = stir(peftc.compile(backbone, peftc.load_spec(method, **arguments)))
    other = eager(backbone, model)
    got = generate(model, mode)
    assert torch.equal(got, generate(other, mode))
    assert not torch.equal(got, generate(backbone, mode))


STATIC = [
    ("llama", "lora"),
    ("gpt2", "mam"),
    ("bart", "mam"),
    ("t5", "lora"),
    ("gemma2", "lora"),
    ("bloom", "dora"),
    ("llama", "prompt_tuning"),
    ("bart", "prompt_tuning"),
    ("whisper", "bitfit"),
]


@pytest.mark.habit("generation: a static cache", "the dynamic cache's tokens")
@pytest.mark.sampled(4)
@pytest.mark.parametrize(("family", "method"), STATIC)
def test_a_static_cache_holds_the_same(family: str, method: str) -> None:
    """Windows, rows in front, relative positions, beams that move, a cache that was used before."""
    model = stir(peftc.compile(tiny(family), spec(method)), 0.1)
    inputs, static = batch(model, "left"), {"cache_implementation": "static"}
    for beams in (1, 2):
        exact = dict(max_new_tokens=6, pad_token_id=1, do_sample=False, num_beams=beams)
        want = model.generate(**inputs, **exact)
        for _ in range(2):
            assert torch.equal(model.generate(**inputs, **exact, **static), want)


@pytest.mark.parametrize(
    ("kind", "found"),
    [("static", "StaticSlidingWindowLayer"), ("offloaded_static", "StaticCache that is offloaded")],
)
def test_a_cache_is_refused_that_no_graph_holds(kind: str, found: str) -> None:
    changes = {"sliding_window": 5} if kind == "static" else {}
    model = peftc.compile(tiny("mixtral", **changes), "lora")
    with pytest.raises(peftc.PeftcError, match=f"DynamicCache or StaticCache, not {found}; leave"):
        model.generate(**batch(model), max_new_tokens=3, cache_implementation=kind, pad_token_id=1)


def _after(_: int, ids: torch.Tensor) -> list[int]:
    return [4 + (int(ids[-1]) + k) % 100 for k in (1, 2, 3)]


@pytest.mark.habit(
    "generation: prompt lookup, assisted, constraints, streamers",
    "Hugging Face's tokens; greedy without a cache",
)
@pytest.mark.parametrize("way", ["lookup", "assisted", "constrained", "streamed"])
@pytest.mark.parametrize("family", ["bart", "llama"])
@pytest.mark.sampled(4)
def test_ways_of_generating(family: str, way: str) -> None:
    """Without values, the backbone's own tokens; with some, those that it gives greedily without a cache."""
    kept = tiny(family)
    told = Told()
    more = {
        "lookup": dict(prompt_lookup_num_tokens=2),
        "assisted": dict(assistant_model=tiny(family, seed=3)),
        "constrained": dict(prefix_allowed_tokens_fn=_after),
        "streamed": dict(streamer=told),
    }[way]
    limit = dict(prefix_allowed_tokens_fn=_after) if way == "constrained" else {}
    exact = dict(max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=1)
    ids = torch.tensor([[5, 6, 7, 5, 6, 7, 5, 6]])
    model = peftc.compile(tiny(family), "lora")
    assert torch.equal(model.generate(ids, **exact, **more), kept.generate(ids, **exact, **limit))
    told.tokens.clear()
    stir(model)
    got = model.generate(ids, **exact, **more)
    assert torch.equal(got, model.generate(ids, **exact, **limit, use_cache=False))
    assert not torch.equal(got, kept.generate(ids, **exact, **limit))
    if way == "streamed":
        assert told.ended and torch.equal(torch.cat(told.tokens, 1), got)


@pytest.mark.habit("generation: pipelines", "a pipeline over the backbone")
def test_pipelines(folder: Path) -> None:
    """A pipeline over a compiled model scores as one over the backbone, and with values as the model itself does."""
    tokenizer = BertTokenizer.from_pretrained(folder)
    texts = ["a b c", "d e f g h"]

    def scores(one: PreTrainedModel) -> torch.Tensor:
        answers = pipeline("text-classification", one, tokenizer=tokenizer, top_k=None)(texts)
        named = [{a["label"]: a["score"] for a in answer} for answer in answers]
        return torch.tensor([[one[k] for k in sorted(one)] for one in named])

    bare = tiny("bert")
    model = peftc.compile(tiny("bert"), "lora")
    assert torch.equal(scores(model), scores(bare))
    stir(model)
    each = [model(**tokenizer(text, return_tensors="pt")).logits.softmax(-1)[0] for text in texts]
    assert torch.allclose(scores(model), torch.stack(each), atol=1e-6)


def test_a_call_that_fails_is_not_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who cannot be cached goes without from then on, but not where going without fails as well."""
    backbone = tiny("gpt2")
    model, inputs = peftc.compile(backbone, "lora"), batch(backbone)

    def fails(*_: Any) -> Any:
        raise UncachedError("cannot be traced")

    with monkeypatch.context() as patch, pytest.raises(UncachedError):
        patch.setattr(CompiledModel, "_cached", fails)
        patch.setattr(CompiledModel, "_plain", fails)
        model.generate(**inputs, max_new_tokens=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = model.generate(**inputs, max_new_tokens=3, do_sample=False)
    assert torch.equal(found, backbone.generate(**inputs, max_new_tokens=3, do_sample=False))
    assert "decode" in {one.program.entry for one in model._programs._runners.values()}


def test_a_streamer_hears_the_prompt_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A first generation that begins with a cache, and begins anew without one."""
    model, told = peftc.compile(tiny("gpt2"), "lora"), Told()

    def fails(*_: Any) -> Any:
        raise UncachedError("cannot be traced")

    monkeypatch.setattr(CompiledModel, "_cached", fails)
    with pytest.warns(UserWarning, match="without a cache: cannot be traced"):
        got = model.generate(
            torch.tensor([[5, 6, 7]]), max_new_tokens=3, do_sample=False, streamer=told
        )
    assert told.ended and torch.equal(torch.cat(told.tokens, 1), got)


def test_a_step_gives_no_field_that_eager_code_does_not() -> None:
    """The encoder's states are not there when cross keys are cached."""
    model = peftc.compile(tiny("bart"), "lora")
    inputs = batch(model)
    ids = inputs.pop("decoder_input_ids")[:, :1]
    for one in (model, model.backbone):
        with torch.no_grad():
            first = one(**inputs, decoder_input_ids=ids, use_cache=True)
            step = one(
                encoder_outputs=(first.encoder_last_hidden_state,),
                attention_mask=inputs["attention_mask"],
                decoder_input_ids=ids,
                past_key_values=first.past_key_values,
                use_cache=True,
            )
        assert step.encoder_hidden_states is None
