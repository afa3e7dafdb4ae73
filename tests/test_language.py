"""What the language can say beyond sums and products: ops against torch, weights rewritten, penalties, budgets."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from hypothesis import given, settings
from hypothesis import strategies as st

import peftc
from peftc.cli import options
from peftc.driver import plans, within
from peftc.errors import PeftcError
from peftc.language.expr import ExprError, parse
from peftc.language.ops import infer
from peftc.language.reader import load_spec, parse_spec
from peftc.language.spec import combine, with_words
from peftc.rewrite.evaluate import evaluate


def value(text: str, **tensors: torch.Tensor) -> torch.Tensor:
    return evaluate(parse(text), tensors, {"r": 2})


def random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_ops_against_torch() -> None:
    a, b, w = random(3, 4), random(2, 5), random(6, 4)
    assert torch.equal(value("kron(a, b)", a=a, b=b), torch.kron(a, b))
    blocks = random(3, 2, 4)
    assert torch.equal(value("block_diag(x)", x=blocks), torch.block_diag(*blocks))
    assert torch.allclose(value("norm(a)", a=a), a.norm(dim=-1, keepdim=True))
    assert torch.equal(value("sum_first(x)", x=blocks), blocks.sum(0))
    ids = torch.tensor([[2, 0], [1, 1]])
    assert infer(parse("lookup(a, b)"), {"a": (3, 4), "b": ("...",)}) == ("...", 4)
    assert torch.equal(a[ids], torch.nn.functional.embedding(ids, a))
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    product = value("svd_in(w, r) @ svd_out(w, r)", w=w)
    assert torch.allclose(product.T, u[:, :2] * s[:2] @ vh[:2])  # the best of rank 2


def test_cayley_is_a_rotation() -> None:
    turn = value("cayley(x)", x=random(3, 4, 4))
    assert torch.allclose(turn @ turn.mT, torch.eye(4, dtype=torch.float64).expand(3, 4, 4))
    assert torch.allclose(torch.linalg.det(turn), torch.ones(3, dtype=torch.float64))
    assert torch.equal(value("cayley(x)", x=torch.zeros(2, 2)), torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("u", "alpha", "z"),
    [
        (0.5, 0.0, 0.0),
        (0.5, 5.0, 1.0),
        (0.01, 5.0, 0.2995788),
        (0.5, 1.0, 0.6931757),
        (0.25, -1.0, 0.0),
        (0.9, -1.0, 0.8040921),
    ],
)
def test_hard_concrete(u: float, alpha: float, z: float) -> None:
    """Diff pruning's gate (Guo et al. 2021) with l = -1.5, r = 1.5 on noise that is known."""
    noise = torch.tensor(math.log(u) - math.log(1 - u), dtype=torch.float64)
    gate = "clamp(sigmoid(noise + a) * 3 - 1.5, 0, 1)"
    got = value(gate, noise=noise, a=torch.tensor(alpha, dtype=torch.float64))
    assert got.item() == pytest.approx(z, abs=1e-6)
    shipped = dict(load_spec("diff_pruning").entries[0].let)["z"]
    assert shipped == parse(
        "clamp(sigmoid(logistic_noise(alpha) + alpha) * (high - low) + low, 0, 1)"
    )


def test_penalty_is_in_the_loss_of_training_alone() -> None:
    backbone = tiny("bert")
    text = (
        "deltas:\n  - at: ffn\n    params: {a: {shape: [in, out], init: zeros}}\n"
        "    delta: x @ a\n    penalty: 0.5 * sum(sum(a * a + 1))\n"
    )
    model = peftc.compile(backbone, parse_spec(text, "p"))
    inputs = batch(model) | {"labels": torch.tensor([0, 1, 2])}
    with torch.no_grad():
        plain = model(**inputs).loss
    assert torch.equal(plain, backbone(**inputs).loss)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model.train()
    out = model(**inputs)
    elements = sum(p.numel for edit in model.plan.edits for p in edit.parameters)
    # float32: a loss near 1 beside a penalty of thousands
    assert out.loss.item() - 0.5 * elements == pytest.approx(plain.item(), abs=1e-2)
    stir(model, 0.1)
    model(**inputs).loss.backward()
    a = model.deltas.get_parameter(model.plan.edits[0].parameters[0].path)
    assert a.grad is not None and (a.grad - a).abs().mean() < 0.1  # the penalty's own gradient is a


def test_a_weight_in_one_slice_leaves_the_others() -> None:
    """GPT-2 fuses query, key and value, GPT-NeoX interleaves them by heads."""
    double = "deltas: [{at: attention.v, rewrite: {W: 2 * W, b: 2 * b}}]"
    for family in ("gpt2", "neox"):
        backbone = tiny(family)
        merged, report = peftc.merge(peftc.compile(backbone, parse_spec(double, "d")))
        assert len(report.folded) == 2 and not report.kept
        halved = parse_spec(double.replace("2 *", "0.5 *"), "h")
        again, _ = peftc.merge(peftc.compile(merged, halved))
        inputs = batch(backbone)
        assert torch.equal(logits(again, inputs), logits(backbone, inputs))  # powers of two
        changed = [
            (a != b).float().mean().item()
            for a, b in zip(merged.parameters(), backbone.parameters(), strict=True)
            if not torch.equal(a, b)
        ]
        assert changed == pytest.approx([1 / 3] * 4, abs=0.02)  # weight and bias, two layers


def test_the_input_of_a_slice_is_refused() -> None:
    shift = parse_spec("deltas: [{at: attention.q, rewrite: {x: 2 * x}}]", "s")
    with pytest.raises(PeftcError, match="is read by its other parts too"):
        peftc.compile(tiny("gpt2"), shift)
    tied = parse_spec("deltas: [{at: embedding, rewrite: {W: 2 * W}}]", "t")
    with pytest.raises(PeftcError, match="'linear' reads this weight too"):
        peftc.compile(tiny("gpt2"), tied)


def test_experts_are_missed_with_a_reason() -> None:
    everywhere = parse_spec('deltas: [{at: {op: linear, scope: "*"}, delta: 0 * h}]', "e")
    plan = peftc.plan(tiny("mixtral"), everywhere)
    assert {miss.site.rpartition(".")[2] for miss in plan.misses} == {"gate_up_proj", "down_proj"}
    assert all("no linear" in miss.reason for miss in plan.misses)
    with pytest.raises(PeftcError, match=r"experts\.gate_up_proj.* and it is no linear"):
        peftc.plan(tiny("mixtral"), "lora_ffn")


def test_residual_of_a_pre_norm_model() -> None:
    """Published code feeds the residual stream to the parallel adapter, the paper's words its norm."""
    text = "deltas: [{at: ffn, params: {a: {shape: [in, out], init: zeros}}, delta: PORT @ a}]"
    got = {}
    for port in ("x", "residual"):
        model = stir(peftc.compile(tiny("mbart"), parse_spec(text.replace("PORT", port), port)))
        got[port] = logits(model, batch(model))
    assert (got["x"] - got["residual"]).abs().max() > 1e-2
    post = {}
    for port in ("x", "residual"):
        model = stir(peftc.compile(tiny("bart"), parse_spec(text.replace("PORT", port), port)))
        post[port] = logits(model, batch(model))
    assert torch.equal(post["x"], post["residual"])  # post-norm: the two are one tensor


def test_budget() -> None:
    model = tiny("bart")
    (lora,) = within(model, [load_spec("lora")], "5%")
    weights, whole = lora.plan.parameters.weights, lora.plan.parameters.backbone
    assert (
        lora.argument == "r" and weights <= 0.05 * whole < weights * (lora.value + 1) / lora.value
    )
    shipped = load_spec("lora").text
    text = shipped.replace("{r: 8,", "{r: auto,")
    asked = parse_spec("budget: 5%\n" + text, "b")
    assert peftc.plan(model, asked).parameters == lora.plan.parameters
    with pytest.raises(PeftcError, match="'r' of lora is auto: set it, or give the spec a budget"):
        peftc.plan(model, parse_spec(text, "b"))
    with pytest.raises(PeftcError, match="'budget' decides one argument"):
        parse_spec("budget: 5%\n" + shipped, "b")
    with pytest.raises(PeftcError, match="'lots' is no budget"):
        within(model, [load_spec("lora")], "lots")
    with pytest.raises(PeftcError, match="more than 1 "):
        within(model, [load_spec("lora")], "1")
    with pytest.raises(PeftcError, match=r"^bitfit has no argument that sets its size$"):
        within(model, [load_spec("bitfit")], "5%")


def waiting(path: Path, name: str = "lora", argument: str = "r") -> Path:
    """A shipped spec whose size is left to a budget."""
    text = load_spec(name).text
    size = load_spec(name).arguments[argument]
    path.write_text("budget: 5%\n" + text.replace(f"{argument}: {size}", f"{argument}: auto", 1))
    return path


def test_a_budget_in_a_sequence_is_kept(tmp_path: Path) -> None:
    """Each spec is solved before it is combined; it used to train at r = 1."""
    model = tiny("bert")
    path = waiting(tmp_path / "budgeted.yaml")
    alone, both = peftc.plan(model, path), peftc.plan(model, [path, "head"])
    rank = alone.spec.arguments["r"]
    assert isinstance(rank, int) and rank > 1
    assert both.spec.arguments == {"r": rank, "alpha": 16} and both.spec.auto is None
    assert both.parameters.weights == alone.parameters.weights
    twice = peftc.plan(model, [path, waiting(tmp_path / "other.yaml", "parallel_adapter")])
    assert twice.parameters.weights > 1.5 * alone.parameters.weights
    with pytest.raises(PeftcError, match="'r' of lora is auto: decide it before combining"):
        combine([load_spec(path), load_spec("head")])
    (one,) = plans(model, [path])
    assert one.parameters == alone.parameters
    compiled = peftc.compile(model, [path, "head"])
    assert compiled.plan.edits[0].parameters[0].shape == (32, rank)


def test_a_budget_on_the_command_line(tmp_path: Path) -> None:
    path = str(waiting(tmp_path / "budgeted.yaml"))
    assert [one.auto for one in options.specs([path, "head"], None)] == ["r", None]
    assert [one.auto for one in options.specs([path, "head"], ["r=3"])] == [None, None]


def test_a_size_keeps_the_words(tmp_path: Path) -> None:
    spec = with_words(load_spec(waiting(tmp_path / "w.yaml", "prefix_words", "l")), (7, 8))
    made = peftc.plan(tiny("bert"), spec)
    assert made.spec.entries[0].words == (7, 8) and made.spec.arguments["l"] > 1
    with pytest.raises(PeftcError, match=r"'lora\+head' is several specs, which have no one size"):
        within(tiny("bert"), [combine([load_spec("lora"), load_spec("head")])], "5%")


WORDS = st.sampled_from(
    [
        "deltas",
        "at",
        "ffn",
        "attention.q",
        "embedding",
        "attention.heads",
        "words",
        "positions",
        "shift",
        "prepend(P, k)",
        "first",
        "op: conv",
        "params",
        "a",
        "shape",
        "[in,out]",
        "init",
        "zeros",
        "norm(W)",
        "per",
        "delta",
        "x@a",
        "compose",
        "rewrite",
        "W",
        "h",
        "let",
        "penalty",
        "sum(a)",
        "use",
        "lora",
        "with",
        "r",
        "auto",
        "budget",
        "5%",
        "train",
        "bias",
        "where",
        "layers",
        "0-1",
        "{}",
        "[]",
        ":",
        "-",
        ",",
        "{",
        "}",
        "[",
        "]",
        "1e999",
        "99999999999999999999",
        "-1",
        "~",
        "&x",
        "*x",
        "!!python/object",
        "a+b",
        "relu(x)",
        "kron(a,a)",
        "\n",
        "\t",
    ]
)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.one_of(st.text(max_size=300), st.lists(WORDS, max_size=40).map(" ".join)))
def test_any_text_is_a_spec_or_a_clear_error(text: str) -> None:
    try:
        parse_spec(text, "f.yaml")
    except PeftcError as error:
        assert str(error)


@pytest.mark.slow
@settings(max_examples=10_000, deadline=None)
@given(st.text("abxWh0123456789.e+-*/@()[]{}, _'\n", max_size=80))
def test_any_text_is_an_expression_or_a_clear_error(text: str) -> None:
    try:
        infer(parse(text), {"a": (2, 2), "b": (), "x": ("...", 2), "W": (2, 2), "h": ("...", 2)})
    except ExprError as error:
        assert error.fact


def test_a_method_that_is_not_shipped() -> None:
    """`examples/lora_xs.yaml` is all there is of it, and it trains, folds and counts r * r a site."""
    spec = load_spec(Path(__file__).parents[1] / "examples" / "lora_xs.yaml", r=4, alpha=4)
    model = peftc.compile(tiny("bart"), spec)
    assert model.plan.parameters.training == 12 * 4 * 4  # six attentions, query and value
    inputs = batch(model)
    before = logits(model, inputs)
    model(**inputs).logits.square().mean().backward()
    assert {n.rpartition(".")[2] for n, p in model.named_parameters() if p.grad is not None} == {
        "core"
    }
    with torch.no_grad():
        for value_ in (p for p in model.parameters() if p.requires_grad):
            value_.normal_(0, 0.1)
    merged, report = peftc.merge(model)
    assert not report.kept and report.error <= 1e-5 * max(report.scale, 1)  # fp32, two layers
    assert (logits(merged, inputs) - before).abs().max() > 1e-3
