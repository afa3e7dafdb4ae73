"""Methods x families: every shipped spec on a tiny model of every family, with every invariant that applies.

`pytest tests/test_matrix.py --matrix FILE` writes the table of docs/verified.md.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, SAMPLE, Variant, batch, logits, stir
from methods import CLOSE, EXACT, FOLDS, lacks, spec
from transformers import PreTrainedModel

import peftc
from peftc.errors import PeftcError
from peftc.language.shelf import shipped
from peftc.merging import merge


# T5 is its own body, without a module that is the head.
def cell(method: str, family: str) -> object:
    """A cell of the matrix: in CI those of SAMPLE, and those that are refused; `-m slow` takes all."""
    marks = [pytest.mark.xdist_group(family)]
    if (method, family) not in SAMPLE and not lacks(method, family):
        marks.append(pytest.mark.slow)
    return pytest.param(method, family, id=f"{method}-{family}", marks=marks)


CELLS = [cell(method, family) for method in shipped() for family in FAMILIES]


@pytest.mark.parametrize(("method", "family"), CELLS)
def test_cell(method: str, family: str, tmp_path: Path) -> None:
    variant = Variant.of(method, family)
    backbone = variant.backbone()
    if lacks(method, family):
        with pytest.raises(PeftcError, match=r"no site of this model|reads no words"):
            peftc.compile(backbone, spec(method))
        pytest.skip(f"{family} has no place for it, and the error says so")
    inputs = batch(backbone, variant.padding)
    model = peftc.compile(backbone, spec(method))
    eager = logits(backbone, inputs)  # frozen, as inside: Mamba picks its kernel by requires_grad
    _starts_as_promised(method, model, variant, inputs, eager)
    _only_deltas_learn(model, inputs)
    _saves(model, variant, inputs, tmp_path)
    _folds(method, model, inputs)
    if model.can_generate():
        _generates(model, inputs, variant.beams)


@cache
def traced(variant: Variant) -> torch.Tensor:
    """What the captured graph gives with nothing inserted."""
    base = peftc.compile(variant.backbone(), "norm_tuning")
    return logits(base, batch(base, variant.padding))


def real(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], value: torch.Tensor
) -> torch.Tensor:
    """What stands at padding is no one's business."""
    if model.config.is_encoder_decoder or value.ndim == 2:
        return value
    return value[inputs["attention_mask"].bool()]


def apart(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], a: torch.Tensor, b: torch.Tensor
) -> float:
    """The largest difference, in units of the largest value or of 1."""
    a, b = real(model, inputs, a), real(model, inputs, b)
    return ((a - b).abs().max() / b.abs().max().clamp(min=1)).item()


def _starts_as_promised(
    method: str,
    model: PreTrainedModel,
    variant: Variant,
    inputs: dict[str, torch.Tensor],
    eager: torch.Tensor,
) -> None:
    got = logits(model, inputs)
    if method in EXACT:
        assert apart(model, inputs, got, eager) <= 1e-5  # fp32; the trace may sum in another order
        want = real(model, inputs, traced(variant))
        # fp32; a fused product that deltas cut may sum in another order (the pass `slices`), and that alone
        assert (real(model, inputs, got) - want).abs().max() <= 1e-6 * want.abs().max()
        whole = peftc.compile(variant.backbone(), spec(method), without=["slices"])
        assert torch.equal(real(model, inputs, logits(whole, inputs)), want)
    elif method in CLOSE:
        assert apart(model, inputs, got, eager) <= 1e-4  # fp32, two layers
    else:
        assert not torch.allclose(got, eager)


def _only_deltas_learn(
    model: PreTrainedModel, inputs: dict[str, torch.Tensor], rate: float = 1e-3
) -> None:
    stir(model, 0.1)
    free = {one.path for one in model.plan.unfrozen}
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], rate)
    model(**inputs).logits.square().mean().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got and all(n.startswith("deltas.") or n in free for n in got)
    optimizer.step()
    model.eval()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved and moved <= got


def _saves(
    model: PreTrainedModel, variant: Variant, inputs: dict[str, torch.Tensor], path: Path
) -> None:
    model.save_pretrained(path / "deltas")
    again = peftc.load(path / "deltas", backbone=variant.backbone())
    assert torch.equal(
        real(model, inputs, logits(again, inputs)), real(model, inputs, logits(model, inputs))
    )


def _folds(method: str, model: PreTrainedModel, inputs: dict[str, torch.Tensor]) -> None:
    merged, report = merge(model)
    merged.requires_grad_(False)  # as the model's: Mamba picks its kernel by requires_grad
    # fp32 weights rounded once; LoRA's bound of 1e-5 does not hold for stirred rotations and norms
    assert apart(model, inputs, logits(merged, inputs), logits(model, inputs)) <= 1e-4
    if method in FOLDS:
        tied = "is tied to another parameter" if model.config.model_type == "t5" else "nothing"
        assert all(tied in one.note for one in report.kept), report.kept
    if report.kept:
        twice, second = merge(merged)
        assert second.error == 0 and second.folded == () and twice.plan.edits == merged.plan.edits


def _generates(model: PreTrainedModel, inputs: dict[str, torch.Tensor], beams: int) -> None:
    """Token by token through the cache the deltas do what they do at once."""
    prompt = {k: v for k, v in inputs.items() if k != "decoder_input_ids"}
    if not model.config.is_encoder_decoder and not inputs["attention_mask"][:, -1].all():
        prompt = {k: v[1:] for k, v in prompt.items()}  # nothing goes on from padding on the right
    settings = dict(max_new_tokens=4, do_sample=False, pad_token_id=0, num_beams=beams)
    with_cache = model.generate(**prompt, **settings)
    without = model.generate(**prompt, **settings, use_cache=False)
    assert torch.equal(with_cache, without)


HALF = ("bart", "roberta", "gpt2", "llama")


def _half_cell(method: str) -> object:
    """Each method in one family, the families in turn."""
    turn = shipped().index(method) % len(HALF)
    order = (*HALF[turn:], *HALF[:turn], "vit", "mixtral")  # with convolutions, with experts
    family = next(one for one in order if not lacks(method, one))
    mark = pytest.mark.xdist_group(family)
    return pytest.param(method, family, id=f"{method}-{family}", marks=mark)


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("method", "family"), [_half_cell(method) for method in shipped()])
def test_bfloat16(method: str, family: str, tmp_path: Path) -> None:
    """In half precision: exact where exact, trains, comes back, and folds to what float64 says, rounded."""
    variant = Variant.of(method, family)
    backbone, bare = (variant.backbone().bfloat16() for _ in range(2))
    model, inputs = peftc.compile(backbone, spec(method)), batch(backbone, "left")
    assert {value.dtype for value in model.deltas.values().values()} <= {torch.bfloat16}
    if method in EXACT:
        want = logits(peftc.compile(bare, "norm_tuning"), inputs)
        assert torch.equal(real(model, inputs, logits(model, inputs)), real(model, inputs, want))
    _only_deltas_learn(model, inputs, 1.0)  # a smaller step is less than a rounding
    got = logits(model, inputs)
    model.save_pretrained(tmp_path)
    again = peftc.load(tmp_path, backbone=variant.backbone().bfloat16())
    assert torch.equal(real(model, inputs, logits(again, inputs)), real(model, inputs, got))
    merged, _ = merge(model)
    # 8 bits of mantissa: W + delta rounds once where W and delta round apart; two layers of weights of size 1
    assert apart(model, inputs, logits(merged, inputs).float(), got.float()) <= 0.1
