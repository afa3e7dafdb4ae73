"""Experts as sites: a formula of one expert, for the rows that were routed to it."""

from __future__ import annotations

import copy
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import batch, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.driver import program_of
from peftc.errors import PeftcError
from peftc.interchange.write import export_peft
from peftc.language import shelf
from peftc.language.reader import load_spec, parse_spec

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from registry import build, registered

LORA = """
deltas:
  - at: AT
    where: {WHERE}
    params:
      down: {shape: [in, 2], init: normal, per: PER}
      up: {shape: [2, out], init: normal, per: PER}
    delta: x @ down @ up
"""
ADAPTER = """
deltas:
  - at: experts.down
    where: {WHERE}
    params:
      down: {shape: [out, 3], init: normal, per: PER}
      bias: {shape: [3], init: normal, per: PER}
      up: {shape: [3, out], init: normal, per: PER}
      scale: {shape: [out], init: ones, per: PER}
    delta: scale * (relu(h @ down + bias) @ up)
"""


def mixtral() -> PreTrainedModel:
    """In float64, which transformers' grouped product does not take."""
    model = tiny("mixtral").double()
    model.set_experts_implementation("batched_mm")
    return model


def spec(text: str, at: str = "experts", per: str = "expert", where: str = "") -> Any:
    return parse_spec(text.replace("AT", at).replace("PER", per).replace("WHERE", where), "s")


def looped(model: PreTrainedModel, change: Any) -> PreTrainedModel:
    """The model with a plain loop over rows and their experts: `change(layer, part, expert, x, h)` of each product."""

    def forward(module: Any, layer: int, hidden: Any, index: Any, weights: Any) -> Any:
        rows = []
        for row, (experts, shares) in enumerate(zip(index.tolist(), weights)):
            found = torch.zeros_like(hidden[row])
            for expert, share in zip(experts, shares):
                x = hidden[row]
                gate, up = (module.gate_up_proj[expert] @ x).chunk(2)
                gate = change(layer, "gate", expert, x, gate)
                up = change(layer, "up", expert, x, up)
                inner = torch.nn.functional.silu(gate) * up
                out = change(layer, "down", expert, inner, module.down_proj[expert] @ inner)
                found = found + share * out
            rows.append(found)
        return torch.stack(rows)

    made = copy.deepcopy(model)
    for number, layer in enumerate(made.model.layers):
        module = layer.mlp.experts
        module.forward = lambda *args, m=module, n=number: forward(m, n, *args)
    return made


def tensors(model: Any, layer: int, part: str) -> dict[str, torch.Tensor]:
    start = f"model.layers.{layer}.mlp.experts.experts_{part}.s."
    return {
        k.removeprefix(start): v for k, v in model.deltas.values().items() if k.startswith(start)
    }


@pytest.mark.sampled(2)
@pytest.mark.parametrize("per", ["expert", "site"])
@pytest.mark.parametrize("where", ["", 'experts: "1-2"'])
@pytest.mark.parametrize("text", [LORA, ADAPTER])
def test_as_a_loop_over_experts(text: str, where: str, per: str) -> None:
    """Values and gradients in float64, of what is linear and what is not, of all experts and of some."""
    backbone = mixtral()
    compiled = stir(
        peftc.compile(copy.deepcopy(backbone), spec(text, "experts.down", per, where))
    ).eval()
    chosen = (1, 2) if where else (0, 1, 2, 3)

    def change(layer: int, part: str, expert: int, x: Any, h: Any) -> Any:
        if part != "down" or expert not in chosen:
            return h
        found = tensors(compiled, layer, "down")
        if per == "expert":
            found = {name: one[chosen.index(expert)] for name, one in found.items()}
        if text == LORA:
            return h + x @ found["down"] @ found["up"]
        inner = torch.relu(h @ found["down"] + found["bias"])
        return h + found["scale"] * (inner @ found["up"])

    inputs, grads = batch(backbone), []
    for one in (compiled, looped(backbone, change)):
        logits = one(**inputs).logits
        logits.square().mean().backward()
        grads.append({k: v.grad.clone() for k, v in compiled.deltas.named_parameters()})
        compiled.zero_grad()
        grads[-1]["logits"] = logits.detach()
    assert grads[0].keys() == grads[1].keys()
    for name, mine in grads[0].items():
        torch.testing.assert_close(mine, grads[1][name], rtol=0, atol=1e-10)


@pytest.mark.parametrize("at", ["experts", "experts.up", "experts.gate", "experts.down"])
def test_folds(at: str) -> None:
    """Into the weights of each expert: the plain model computes the same, and what was saved loads."""
    compiled = stir(peftc.compile(tiny("mixtral"), spec(LORA, at))).eval()
    inputs = batch(compiled)
    folded, report = peftc.merge(compiled)
    assert not report.kept and type(folded) is type(tiny("mixtral"))
    torch.testing.assert_close(
        folded(**inputs).logits, compiled(**inputs).logits, rtol=0, atol=1e-5
    )


METHODS = ("dora", "loha", "pissa", "lokr", "rslora", "vera", "oft", "adalora")


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", METHODS)
def test_a_method_of_a_linear_is_one_of_an_expert(method: str) -> None:
    """Its formula as it stands, at another place, of each expert its own: reparametrised weights and factors of the
    weight too. It starts as it does at a linear, and folds."""
    backbone = tiny("mixtral")
    text = (shelf.directory() / f"{method}.yaml").read_text()
    text = re.sub(r"at: \[?attention[^\n]*", "at: experts", text)
    text = re.sub(r"(shape: \[[^\n\]]*\])", r"\1, per: expert", re.sub(r",\s*per: \w+", "", text))
    compiled = peftc.compile(copy.deepcopy(backbone), parse_spec(text, method)).eval()
    inputs = batch(compiled)
    torch.testing.assert_close(
        compiled(**inputs).logits, backbone(**inputs).logits, rtol=0, atol=1e-5
    )
    folded, report = peftc.merge(stir(compiled, 0.1))
    assert not report.kept
    torch.testing.assert_close(
        folded(**inputs).logits, compiled(**inputs).logits, rtol=0, atol=1e-5
    )


def test_a_penalty_is_of_each_expert() -> None:
    text = LORA + "    penalty: sum(sum(down * down)) * 0.01\n"
    compiled = stir(peftc.compile(tiny("mixtral"), spec(text))).train()
    inputs = batch(compiled)
    labels = inputs["input_ids"]
    downs = [v for k, v in compiled.deltas.named_parameters() if k.endswith("down")]
    wanted = sum(one.square().sum() * 0.01 for one in downs)
    torch.testing.assert_close(compiled.penalty(), wanted)
    torch.manual_seed(0)
    with_it = compiled(**inputs, labels=labels).loss
    plain = stir(peftc.compile(tiny("mixtral"), spec(LORA))).train()
    torch.manual_seed(0)
    torch.testing.assert_close(
        with_it - plain(**inputs, labels=labels).loss, wanted, rtol=1e-5, atol=1e-5
    )


def test_chosen_experts_are_others_apart() -> None:
    """Those that are not chosen stay as they were, to the bit; what does not fold is kept with the reason."""
    backbone = tiny("mixtral")
    compiled = stir(
        peftc.compile(copy.deepcopy(backbone), spec(LORA, "experts.down", where="experts: 3"))
    )
    assert {tuple(one.shape) for one in compiled.deltas.parameters()} == {(1, 64, 2), (1, 2, 32)}
    folded, _ = peftc.merge(compiled)
    for layer, was in zip(folded.model.layers, backbone.model.layers, strict=True):
        now, before = layer.mlp.experts.down_proj, was.mlp.experts.down_proj
        assert torch.equal(now[:3], before[:3]) and not torch.equal(now[3], before[3])
    kept = peftc.merge(stir(peftc.compile(tiny("mixtral"), spec(ADAPTER))))[1].kept
    assert {one.note for one in kept} == {"'relu' is not affine"}


def test_saved_and_loaded(tmp_path: Path) -> None:
    compiled = stir(peftc.compile(tiny("mixtral"), load_spec("lora_experts", r=2))).eval()
    compiled.save_pretrained(tmp_path)
    again = peftc.load(tmp_path, tiny("mixtral")).eval()
    inputs = batch(compiled)
    assert torch.equal(again(**inputs).logits, compiled(**inputs).logits)
    assert again.plan.parameters == compiled.plan.parameters


def test_only_routed_rows_are_computed() -> None:
    """Two of four experts a token: each product of a delta has as many rows as the model's own."""
    compiled = peftc.compile(tiny("mixtral"), spec(LORA, "experts.down"))
    program = program_of(compiled, "forward", batch(compiled))
    grouped = [
        n for n in program.graph.nodes if n.op == "call_function" and "grouped_mm" in str(n.target)
    ]
    own = [n for n in grouped if "delta" not in n.meta]
    added = [n for n in grouped if "delta" in n.meta]
    assert len(own) == len(added) == 4
    assert {str(n.meta["val"].shape[0]) for n in added} == {
        str(n.meta["val"].shape[0]) for n in own
    }


def test_generates_and_exports(tmp_path: Path) -> None:
    """A formula that does not fold, with a cache and without, and in ONNX, which has no grouped product."""
    compiled = stir(peftc.compile(tiny("mixtral"), spec(ADAPTER, where='experts: "0,2"'))).eval()
    ids = batch(compiled)["input_ids"]
    options = dict(max_new_tokens=6, do_sample=False)
    tokens = [compiled.generate(ids, use_cache=cached, **options) for cached in (True, False)]
    assert torch.equal(*tokens)
    peftc.export(compiled, tmp_path / "bundle")
    runner = peftc.runtime.load(tmp_path / "bundle")
    assert torch.equal(runner.generate(ids, **options), tokens[0])


def test_peft_has_no_layout_of_ours(tmp_path: Path) -> None:
    compiled = peftc.compile(tiny("mixtral"), load_spec("lora_experts", r=2))
    with pytest.raises(PeftcError, match="is of experts, and PEFT's layout of such"):
        export_peft(compiled, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def test_what_is_kept_of_experts_has_no_place_of_its_own() -> None:
    compiled = stir(peftc.compile(tiny("mixtral"), load_spec("lora_experts", r=2))).eval()
    with pytest.raises(PeftcError) as error:
        peftc.prune(compiled)
    assert str(error.value) == (
        "'model.layers.0.mlp.experts.gate_up_proj' is the weight of no linear, convolution, norm or embedding alone; "
        "prune deltas that leave it as it is"
    )


FAMILIES = [
    "Qwen2MoeForTokenClassification",
    "OlmoeForCausalLM",
    "GptOssForTokenClassification",
    "Llama4ForCausalLM",
    "GraniteMoeForCausalLM",
    "Qwen3MoeForTokenClassification",
]


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str) -> None:
    """Grouped, with biases, turned, all rows for all experts: what folds is what eager code computes."""
    one = build(next(one for one in registered() if one.name == name))
    compiled = stir(peftc.compile(one.model, load_spec("lora_experts", r=2))).eval()
    folded, report = peftc.merge(compiled)
    ours, theirs = compiled(**one.inputs).logits, folded(**one.inputs).logits
    assert not report.kept
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4 * float(theirs.detach().abs().max()))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            LORA.replace("AT", "ffn").replace("where: {WHERE}", "").replace("PER", "expert"),
            "ffn has no experts (of experts are experts, experts.up, experts.gate, experts.down)",
        ),
        (
            LORA.replace("AT", "ffn").replace("WHERE", "experts: 1").replace("PER", "site"),
            "ffn has no experts to choose from",
        ),
        (
            LORA.replace("AT", "experts").replace("WHERE", "experts: 4").replace("PER", "expert"),
            "there is no expert 4: the first is 0, the last 3",
        ),
        (
            "deltas: [{at: experts, params: {a: {shape: [2, out], init: zeros, per: expert}}, delta: sum_first(a) * h}]",
            "'sum_first' does not go with parameters that are per: expert",
        ),
        (
            LORA.replace("AT", "experts").replace("WHERE", "experts: x").replace("PER", "expert"),
            "'experts' cannot be 'x' (write it as \"0-5,11\")",
        ),
    ],
)
def test_messages(text: str, message: str) -> None:
    with pytest.raises(PeftcError) as error:
        peftc.plan(tiny("mixtral"), parse_spec(text, "s"))
    assert message in str(error.value)
