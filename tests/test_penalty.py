"""A method's penalty is in the loss wherever the loss is computed, once a step."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers
from conftest import batch, tiny
from torch.utils.data import Dataset
from transformers import PreTrainedModel, TrainingArguments
from transformers.trainer_pt_utils import LabelSmoother

import peftc
from peftc.errors import PeftcError
from peftc.training.trainer import Trainer

ADALORA = peftc.load_spec("adalora", r=2)
PLAIN = replace(ADALORA, entries=tuple(replace(one, penalty=None) for one in ADALORA.entries))
FAMILIES = ("bert", "llama", "bart")


def inputs_of(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Four rows with labels, of unlike numbers of tokens."""
    found = batch(model, "right", size=4)
    if not model.can_generate():
        return found | {"labels": torch.tensor([0, 1, 2, 1])}
    labels = found.get("decoder_input_ids", found["input_ids"]).clone()
    labels[0, 3:] = -100
    return found | {"labels": labels}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, inputs: dict[str, torch.Tensor]) -> None:
        self.inputs = inputs

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v[index] for k, v in self.inputs.items()}


def started(family: str, spec: peftc.Spec) -> PreTrainedModel:
    model = peftc.compile(tiny(family), spec)
    torch.manual_seed(2)
    with torch.no_grad():
        for one in model.deltas.parameters():
            one.copy_(torch.randn_like(one) * 0.3)
    return model


def step(
    family: str, spec: peftc.Spec, kind: type, out: Path, parts: int = 1, **more: object
) -> dict[str, torch.Tensor]:
    """The gradient of one step, as the Trainer makes it: by SGD with a rate of one."""
    model = started(family, spec)
    before = {k: v.detach().clone() for k, v in model.deltas.named_parameters()}
    settings = {k: more.pop(k) for k in ("label_smoothing_factor",) if k in more}
    arguments = TrainingArguments(
        str(out),
        max_steps=1,
        learning_rate=1.0,
        lr_scheduler_type="constant",
        optim="sgd",
        max_grad_norm=0.0,
        per_device_train_batch_size=4 // parts,
        gradient_accumulation_steps=parts,
        train_sampling_strategy="sequential",
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        **settings,
    )
    kind(model, arguments, train_dataset=Rows(inputs_of(model)), **more).train()
    return {k: before[k] - v.detach() for k, v in model.deltas.named_parameters()}


def own_slope(family: str) -> dict[str, torch.Tensor]:
    """The gradient of AdaLoRA's penalty, by hand: gamma * (|PᵀP - I| + |QQᵀ - I|), Frobenius."""
    model = started(family, ADALORA)
    total = torch.zeros(())
    for path, one in model.deltas.named_parameters():
        if not path.endswith("sigma"):
            product = one.T @ one if path.endswith("P") else one @ one.T
            total = total + 0.5 * (product - torch.eye(2)).norm()
    names = [k for k, _ in model.deltas.named_parameters()]
    found = torch.autograd.grad(total, list(model.deltas.parameters()), allow_unused=True)
    return {k: torch.zeros(()) if v is None else v for k, v in zip(names, found, strict=True)}


def own(outputs: object, labels: torch.Tensor, num_items_in_batch: object = None) -> torch.Tensor:
    logits = outputs["logits"]  # type: ignore[index]
    shift = logits.ndim == 3 and logits.shape[1] == labels.shape[1] == 11  # Llama here
    smooth = LabelSmoother(0.2)
    return smooth(outputs, labels, shift_labels=shift, num_items_in_batch=num_items_in_batch)  # type: ignore[no-any-return]


CASES = {
    "its own loss": (transformers.Trainer, {}),
    "its own loss, our Trainer": (Trainer, {}),
    "label smoothing": (Trainer, {"label_smoothing_factor": 0.1}),
    "a loss of the user": (Trainer, {"compute_loss_func": own}),
}


def cells() -> Iterator[tuple[str, str, int]]:
    """transformers adds up the means of parts for the own losses of models that do not divide by a step's tokens."""
    for family in FAMILIES:
        for case in CASES:
            yield family, case, 1
            if family == "llama" or not case.startswith("its own"):
                yield family, case, 2


@pytest.mark.habit(
    "training: a method's penalty, gradients accumulated, label smoothing, evaluation",
    "the formula",
)
@pytest.mark.sampled(20)
@pytest.mark.parametrize(("family", "case", "parts"), cells())
def test_once_a_step(family: str, case: str, parts: int, tmp_path: Path) -> None:
    kind, more = CASES[case]
    got = step(family, ADALORA, kind, tmp_path, parts, **more)
    without = step(family, PLAIN, kind, tmp_path, parts, **more)
    for name, slope in own_slope(family).items():
        # float32, one step: the gradient of the loss is taken away again
        torch.testing.assert_close(
            got[name] - without[name], slope.expand_as(got[name]), rtol=1e-4, atol=1e-5
        )


def test_a_loss_that_says_no_share_of_a_step() -> None:
    """A part of a step has a part of the penalty, which is told from a sum of cross entropies over all its tokens."""
    model = started("llama", ADALORA).train()
    model.loss_function = lambda logits, *_, num_items_in_batch, **__: (
        logits.square().sum() / num_items_in_batch
    )
    with pytest.raises(PeftcError) as error:
        model(**inputs_of(model), num_items_in_batch=torch.tensor(9))
    assert str(error.value) == (
        "the loss of this model reads 'num_items_in_batch' in a way that says no share of a batch, and a method's "
        "penalty is added by that; leave the argument out, or compute the loss yourself and add model.penalty()"
    )


@pytest.mark.parametrize("family", ["bert", "bart"])
@pytest.mark.sampled(2)
def test_as_often_as_the_loss(family: str, tmp_path: Path) -> None:
    """Where transformers adds up means, it adds up those of the penalty too: their balance stays."""
    got = step(family, ADALORA, transformers.Trainer, tmp_path, 2)
    without = step(family, PLAIN, transformers.Trainer, tmp_path, 2)
    for name, slope in own_slope(family).items():
        torch.testing.assert_close(
            got[name] - without[name], 2 * slope.expand_as(got[name]), rtol=1e-4, atol=1e-5
        )


def test_who_computes_the_loss_elsewhere_is_told_once() -> None:
    model = started("bert", ADALORA).train()
    inputs = batch(model)
    with pytest.warns(
        UserWarning, match=r"adalora adds a penalty .* add model.penalty\(\) to yours"
    ):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(**inputs)
        other = started("bert", ADALORA).train()
        assert other.penalty() > 0
        other(**inputs)  # it was asked for
        with torch.no_grad():
            started("bert", ADALORA).train()(**inputs)
        started("bert", ADALORA).eval()(**inputs)
        plain = started("bert", PLAIN).train()
        plain(**inputs)
        assert plain.penalty() == 0
