"""A merge that changes what the model computes is refused: nothing is returned, nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import Run, batch, logits, stir, tiny

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
        with torch.no_grad():
            backbone.get_parameter("classifier.weight").mul_(1.001)
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


def test_the_commands_say_so(run: Run, lora: Path, doctored: None, tmp_path: Path) -> None:
    code, out, err = run("merge", lora, "-o", tmp_path / "out")
    assert code == 1 and "folding moved the outputs" in err and "wrote" not in out
    assert list(tmp_path.iterdir()) == []
    code, out, err = run("verify", lora)
    assert code == 1 and "FAILED" in out and "1 checks failed" in err


@pytest.mark.sampled(4)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("family", ["bert", "llama", "t5"])
def test_other_types_merge_within_their_own_roundings(family: str, dtype: torch.dtype) -> None:
    model = stir(peftc.compile(tiny(family).to(dtype), "lora"), 0.1)
    merged, report = peftc.merge(model)
    assert merged.dtype == dtype
    assert report.changed > 0 and report.error <= SHARES[dtype] * report.scale


def test_deltas_that_are_no_numbers_are_the_users_to_mend(lora: Path) -> None:
    model = stir(peftc.compile(tiny("bert"), "lora"))
    with torch.no_grad():
        next(model.deltas.parameters()).fill_(float("inf"))
    with pytest.raises(PeftcError, match=r"delta '.*down' holds numbers that are not finite"):
        peftc.merge(model)
