"""Every shipped spec x every invariant, on a tiny model of each family."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.driver import Trace, merge

SMALL = {
    "lora": dict(r=4, alpha=8),
    "prefix_tuning": dict(l=5, m=6),
    "parallel_adapter": dict(r=4),
    "scaled_parallel_adapter": dict(r=4),
    "houlsby_adapter": dict(r=4),
    "bitfit": {},
    "mam": dict(l=5, m=6, r=4),
    "head": {},
}
IDENTITY = ("lora", "scaled_parallel_adapter", "bitfit", "head")
FAMILIES = ("bart", "roberta", "gpt2", "bert", "mbart")
CASES = [
    (method, family)
    for method in SMALL
    for family in FAMILIES
    if method != "head"
    or family in ("roberta", "bert")  # a tied language-model head is no task head
]


def compiled(method: str, family: str, **kwargs: object) -> tuple[PreTrainedModel, PreTrainedModel]:
    backbone = tiny(family, **kwargs)
    return backbone, peftc.compile(backbone, peftc.load_spec(method, **SMALL[method]))


@pytest.mark.parametrize(("method", "family"), CASES)
def test_identity_at_init(method: str, family: str) -> None:
    backbone, model = compiled(method, family)
    inputs = batch(model, "right")
    base = peftc.compile(tiny(family), "bitfit")  # the captured graph with nothing inserted
    got, eager = logits(model, inputs), logits(backbone, inputs)
    if method in IDENTITY:
        assert torch.equal(got, logits(base, inputs))
        assert (got - eager).abs().max() <= 1e-6 * eager.abs().max().clamp(min=1)  # fp32
    else:
        assert not torch.allclose(got, eager)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_only_deltas_train(method: str, family: str) -> None:
    backbone, model = compiled(method, family)
    frozen = {n: p.detach().clone() for n, p in backbone.named_parameters() if not p.requires_grad}
    stir(model, 0.1)
    model.train()
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-2)
    model(**batch(model)).logits.square().mean().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    free = {one.path for one in model.plan.unfrozen}
    assert got and all(n.startswith("deltas.") or n in free for n in got)
    optimizer.step()
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(optimizer.state)
    assert all(torch.equal(dict(backbone.named_parameters())[n], p) for n, p in frozen.items())


@pytest.mark.parametrize(("method", "family"), CASES)
@pytest.mark.parametrize("stored", [False, True])
def test_save_and_load(method: str, family: str, stored: bool, tmp_path: Path) -> None:
    _, model = compiled(method, family)
    stir(model, 0.1)
    with torch.no_grad():
        for one in model.plan.unfrozen:
            model.get_parameter(one.path).add_(0.1)
    model.save_pretrained(tmp_path / "d", stored=stored)
    again = peftc.load(tmp_path / "d", backbone=tiny(family))
    tolerance = 0 if not stored else 1e-5  # constants are evaluated in float64 and rounded once
    inputs = batch(model)
    want = logits(model, inputs)
    assert (logits(again, inputs) - want).abs().max() <= tolerance * want.abs().max()
    size = sum(p.numel() for p in again.parameters() if p.requires_grad)
    assert size == (model.plan.parameters.stored if stored else model.plan.parameters.training)


@pytest.mark.parametrize(("method", "family"), CASES)
def test_fold(method: str, family: str) -> None:
    _, model = compiled(method, family)
    stir(model, 0.1)
    merged, report = merge(model)
    assert len(report.outcomes) == len(model.plan.edits)
    assert report.error <= 1e-4 * max(report.scale, 1)  # fp32, weights rounded once, two layers
    if model.plan.edits:
        assert report.changed > 1e-3
    if method == "lora":
        assert not report.kept and type(merged) is type(model.backbone)
    if method == "mam":
        assert {one.note for one in report.kept} == {
            "'prepend' rewrites 'k, v', which is no linear's result",
            "'relu' is not affine",
        }
    if report.kept:
        twice, second = merge(merged)
        assert second.kept == report.kept and second.error == 0 and second.folded == ()
        assert {n: v.shape for n, v in twice.deltas.values().items()} == {
            n: v.shape for n, v in merged.deltas.values().items()
        }


@pytest.mark.parametrize("family", FAMILIES)
def test_detach_restores(family: str) -> None:
    backbone = tiny(family)
    flags = {n: p.requires_grad for n, p in backbone.named_parameters()}
    want = logits(backbone, batch(backbone))
    model = stir(peftc.compile(backbone, peftc.load_spec("mam", **SMALL["mam"])))
    logits(model, batch(model))
    restored = peftc.detach(model)
    assert (
        restored is backbone
        and {n: p.requires_grad for n, p in restored.named_parameters()} == flags
    )
    assert torch.equal(logits(restored, batch(backbone)), want)


def test_dropout_follows_the_mode() -> None:
    backbone = tiny("bart", dropout=0.0, attention_dropout=0.5)
    model = peftc.compile(backbone, "lora")
    inputs = batch(model)
    assert torch.equal(logits(model, inputs), logits(model, inputs))
    model.train()
    assert not torch.equal(logits(model, inputs), logits(model, inputs))
    model.eval()
    assert torch.equal(logits(model, inputs), logits(model, inputs))


def test_sizes_one_are_no_special_case() -> None:
    backbone, model = compiled("mam", "bart")
    one = batch(model, size=1, length=1)
    assert logits(model, one).shape == logits(backbone, one).shape


def test_folded_checkpoint_needs_no_peftc(tmp_path: Path) -> None:
    _, model = compiled("lora", "bart")
    stir(model)
    merged, _ = merge(model)
    merged.save_pretrained(tmp_path / "merged")
    inputs = batch(model)
    torch.save(inputs, tmp_path / "in.pt")
    script = (
        "import sys, torch; from transformers import BartForConditionalGeneration as B\n"
        f"m = B.from_pretrained({str(tmp_path / 'merged')!r}).eval()\n"
        f"torch.save(m(**torch.load({str(tmp_path / 'in.pt')!r})).logits, {str(tmp_path / 'out.pt')!r})\n"
        "assert not any(n.partition('.')[0] in ('peftc', 'passes') for n in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)
    want = logits(model, inputs)
    assert (torch.load(tmp_path / "out.pt") - want).abs().max() <= 1e-4 * want.abs().max()


def test_every_pass_is_timed_and_seen() -> None:
    seen: list[str] = []
    trace = Trace(after=lambda name, _: seen.append(name))
    model = peftc.compile(tiny("bert"), "mam", trace=trace)
    logits(model, batch(model))
    merge(model, trace=trace)
    assert seen[:3] == ["normalize", "normalize", "insert"]  # for planning, then for training
    assert {"fold_constants", "fold_affine"} <= set(seen)
    assert len(trace.results) == len(seen)


def test_modes_stay_together() -> None:
    """The backbone's modules are shared: what runs it alone must not leave them in another mode."""
    backbone = tiny("gpt2")
    model = stir(peftc.compile(backbone, "lora"), 0.1)
    model.train()
    model(**batch(model)).logits.sum().backward()
    model.eval()
    merge(model)
    assert not any(module.training for module in (*model.modules(), *backbone.modules()))
