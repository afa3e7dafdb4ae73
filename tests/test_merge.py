"""A merge that changes what the model computes is refused: nothing is returned, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, batch, logits, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc import merging
from peftc.errors import PeftcError
from peftc.rewrite.tolerance import SHARES


@pytest.fixture
def doctored(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fold that spoils one weight by a thousandth."""
    real = merging.fold

    def fold(*args: object, **kwargs: object) -> object:
        backbone, folding = real(*args, **kwargs)  # type: ignore[arg-type]
        weight = backbone.get_parameter("classifier.weight")
        weight.data = weight.detach() * 1.001  # its memory may be the model's own
        return backbone, folding

    monkeypatch.setattr(merging, "fold", fold)


def test_merge_raises_on_a_wrong_fold(doctored: None, tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("bert"), "lora"))
    before = logits(model, batch(model))
    with pytest.raises(PeftcError, match=r"folding moved the outputs by .* of .*, more than"):
        peftc.merge(model)
    with pytest.raises(PeftcError, match="folding moved the outputs"):
        peftc.export(model, tmp_path / "bundle")
    assert list(tmp_path.iterdir()) == []
    assert torch.equal(logits(model, batch(model)), before)
    _, report = peftc.merge(model, tolerance=0.01)
    assert report.error > SHARES[torch.float32] * report.scale


@pytest.mark.parametrize("method", ["lora", "mam", "lora_embedding", "bitfit"])
@pytest.mark.parametrize("family", ["bert", "bart"])
def test_what_shares_weights_leaves_the_model_alone(family: str, method: str) -> None:
    """The same numbers and flags as a copy's, and of what nothing folds into the same memory."""
    model = stir(peftc.compile(tiny(family), method))
    state = {k: (v.detach().clone(), v.requires_grad) for k, v in model.named_parameters()}
    shared, apart = (peftc.merge(model, shares=one)[0] for one in (True, False))
    assert torch.equal(logits(shared, batch(model)), logits(apart, batch(model)))
    for k, v in model.named_parameters():
        assert torch.equal(v, state[k][0]) and v.requires_grad == state[k][1]
    theirs, others = dict(shared.named_parameters()), dict(apart.named_parameters())
    own = {v.data_ptr() for v in model.parameters()}
    assert {k: v.requires_grad for k, v in theirs.items()} == {
        k: v.requires_grad for k, v in others.items()
    }
    same = [k for k, v in theirs.items() if v.data_ptr() in own]
    assert len(same) > len(theirs) / 2
    assert not any(v.data_ptr() in own for k, v in others.items() if "deltas" not in k)


def test_the_commands_say_so(run: Run, lora: Path, doctored: None, tmp_path: Path) -> None:
    code, out, err = run("merge", lora, "-o", tmp_path / "out")
    assert code == 1 and "folding moved the outputs" in err and "wrote" not in out
    assert list(tmp_path.iterdir()) == []
    code, out, err = run("verify", lora)
    assert code == 1 and "FAILED" in out and "1 of 11 checks failed: folded" in err


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_other_types_merge_within_their_own_roundings(family: str, dtype: torch.dtype) -> None:
    model = stir(peftc.compile(tiny(family).to(dtype), "lora"), 0.1)
    merged, report = peftc.merge(model)
    assert merged.dtype == dtype
    assert report.changed > 0 and report.error <= SHARES[dtype] * report.scale


def rough(model: PreTrainedModel) -> PreTrainedModel:
    """The model with a last step that makes one rounding of its input, 1e-7, a tenth."""
    model.classifier.register_forward_hook(lambda module, args, result: (1e6 * result).sin())
    return model


@pytest.mark.parametrize("wrong", [False, True])
def test_a_fold_moves_outputs_by_what_float32_does_to_the_model(
    wrong: bool, request: pytest.FixtureRequest
) -> None:
    model = stir(peftc.compile(rough(tiny("bert")), peftc.load_spec("lora", r=4)), 0.1)
    if wrong:
        request.getfixturevalue("doctored")
        with pytest.raises(merging.MergeError, match="folding moved the outputs by"):
            peftc.merge(model)
        return
    _, report = peftc.merge(model)
    assert SHARES[torch.float32] * report.scale < report.error < 0.1 * report.changed


def test_deltas_that_are_no_numbers_are_the_users_to_mend(lora: Path) -> None:
    model = stir(peftc.compile(tiny("bert"), "lora"))
    with torch.no_grad():
        next(model.deltas.parameters()).fill_(float("inf"))
    with pytest.raises(PeftcError, match=r"delta '.*down' holds numbers that are not finite"):
        peftc.merge(model)
