"""Every key of TrainingArguments that changes a step: losses and metrics are those of the backbone trained as it is.

docs/habits.md shows the keys; norm tuning trains the same weights with and without peftc.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import batch, tiny
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments

import peftc

EACH = dict(eval_strategy="steps", eval_steps=1)
KEYS: dict[str, dict[str, object]] = {
    "gradient_accumulation_steps": dict(gradient_accumulation_steps=2),
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "neftune_noise_alpha": dict(neftune_noise_alpha=5.0),
    "bf16": dict(bf16=True),
    "bf16_full_eval": dict(bf16_full_eval=True, **EACH),
    "torch_compile": dict(torch_compile=True, torch_compile_backend="eager"),
    "label_smoothing_factor": dict(label_smoothing_factor=0.1),
    "train_sampling_strategy": dict(train_sampling_strategy="group_by_length"),
    "auto_find_batch_size": dict(auto_find_batch_size=True),
    "eval_accumulation_steps": dict(eval_accumulation_steps=1, **EACH),
    "load_best_model_at_end": dict(
        load_best_model_at_end=True, save_strategy="steps", save_steps=1, **EACH
    ),
    "save_only_model": dict(save_only_model=True, save_strategy="steps", save_steps=1),
    "optim": dict(optim="adafactor"),
    "weight_decay": dict(weight_decay=0.1),
    "max_grad_norm": dict(max_grad_norm=0.01),
    "warmup_steps": dict(warmup_steps=1),
    "full_determinism": dict(full_determinism=True),
    "include_num_input_tokens_seen": dict(include_num_input_tokens_seen="all"),
    "remove_unused_columns": dict(remove_unused_columns=False),
    "dataloader_drop_last": dict(dataloader_drop_last=True),
    "batch_eval_metrics": dict(
        batch_eval_metrics=True, include_for_metrics=["inputs", "loss"], **EACH
    ),
}


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, model: PreTrainedModel) -> None:
        inputs = batch(model, "right", size=4)
        words = inputs.get("decoder_input_ids", inputs["input_ids"])
        labels = words if model.can_generate() else torch.tensor([0, 1, 2, 1])
        self.inputs = inputs | {"labels": labels.clone()}

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {k: v[index] for k, v in self.inputs.items()}


def history(model: PreTrainedModel, out: Path, more: dict[str, object]) -> list[float]:
    """What a Trainer logs of losses and norms, and the loss after it."""
    arguments = TrainingArguments(
        str(out),
        **{
            **dict(max_steps=2, learning_rate=1e-2, per_device_train_batch_size=2),
            **dict(per_device_eval_batch_size=2),
            **dict(logging_steps=1, save_strategy="no", report_to=[], use_cpu=True),
            **more,
        },
    )
    counted = (
        (lambda given, compute_result: {"rows": 1.0}) if "batch_eval_metrics" in more else None
    )
    stops = [EarlyStoppingCallback(1)] if "load_best_model_at_end" in more else []
    rows = Rows(model)
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        eval_dataset=rows,
        compute_metrics=counted,
        callbacks=stops,
    )
    trainer.train()
    words = ("loss", "eval_loss", "grad_norm")
    logged = [float(one[k]) for one in trainer.state.log_history for k in words if k in one]
    return [*logged, trainer.evaluate()["eval_loss"]]


@pytest.mark.habit("training: keys of TrainingArguments, below", "the backbone trained as it is")
@pytest.mark.sampled(4)
@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize(
    "family", ["llama", *(pytest.param(one, marks=pytest.mark.slow) for one in ("bert", "bart"))]
)
def test_trained_as_the_backbone_is(family: str, key: str, tmp_path: Path) -> None:
    plan = peftc.plan(tiny(family), "norm_tuning")
    bare = tiny(family)
    for path, weight in bare.named_parameters():
        weight.requires_grad_(path in {one.path for one in plan.unfrozen})
    want = history(bare, tmp_path / "bare", KEYS[key])
    got = history(peftc.compile(tiny(family), "norm_tuning"), tmp_path / "ours", KEYS[key])
    # float32; bfloat16 rounds after each op, and some ops of a graph are one
    close = 2e-2 if key.startswith("bf16") else 2e-4
    assert len(want) >= 4 and got == pytest.approx(want, rel=close)
