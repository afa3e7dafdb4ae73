"""Every key of TrainingArguments: losses and metrics are those of the backbone trained as it is, or it ends alike.

docs/habits.md shows the keys; norm tuning trains the same weights with and without peftc.
"""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest
import torch
from conftest import batch, tiny
from torch.utils.data import Dataset
from transformers import EarlyStoppingCallback, PreTrainedModel, Trainer, TrainingArguments

import peftc

EACH = dict(eval_strategy="steps", eval_steps=1)
SAVED = dict(save_strategy="steps", save_steps=1)
KEYS: dict[str, dict[str, object]] = {
    "gradient_accumulation_steps": dict(gradient_accumulation_steps=2),
    "gradient_checkpointing": dict(gradient_checkpointing=True),
    "neftune_noise_alpha": dict(neftune_noise_alpha=5.0),
    "bf16": dict(bf16=True),
    "bf16_full_eval": dict(bf16_full_eval=True, **EACH),
    "fp16": dict(fp16=True),
    "fp16_full_eval": dict(fp16_full_eval=True, **EACH),
    "torch_compile": dict(torch_compile=True, torch_compile_backend="eager"),
    "label_smoothing_factor": dict(label_smoothing_factor=0.1),
    "train_sampling_strategy": dict(train_sampling_strategy="group_by_length"),
    "auto_find_batch_size": dict(auto_find_batch_size=True),
    "eval_accumulation_steps": dict(eval_accumulation_steps=1, **EACH),
    "load_best_model_at_end": dict(
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=False,
        **SAVED,
        **EACH,
    ),
    "save_only_model": dict(save_only_model=True, **SAVED),
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
    "learning_rate": dict(learning_rate=5e-2),
    "per_device_train_batch_size": dict(per_device_train_batch_size=1),
    "per_device_eval_batch_size": dict(per_device_eval_batch_size=1, **EACH),
    "num_train_epochs": dict(num_train_epochs=2, max_steps=-1),
    "lr_scheduler_type": dict(
        lr_scheduler_type="cosine_with_restarts", lr_scheduler_kwargs={"num_cycles": 2}, max_steps=4
    ),
    "adam_beta1": dict(adam_beta1=0.5, adam_beta2=0.6, adam_epsilon=1e-3),
    "optim_args": dict(optim="adamw_torch", optim_args="fused=False"),
    "gradient_checkpointing_kwargs": dict(
        gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "activation_checkpointing": dict(
        activation_checkpointing=True, activation_checkpointing_kwargs={}
    ),
    "torch_compile_mode": dict(
        torch_compile=True, torch_compile_backend="eager", torch_compile_mode="default"
    ),
    "use_cache": dict(use_cache=True),
    "eval_delay": dict(eval_delay=1, **EACH),
    "eval_on_start": dict(eval_on_start=True, **EACH),
    "eval_do_concat_batches": dict(eval_do_concat_batches=False, **EACH),
    "eval_use_gather_object": dict(eval_use_gather_object=True, **EACH),
    "prediction_loss_only": dict(prediction_loss_only=True, **EACH),
    "save_total_limit": dict(save_total_limit=1, save_on_each_node=True, **SAVED),
    "enable_jit_checkpoint": dict(enable_jit_checkpoint=True),
    "seed": dict(seed=7, data_seed=3),
    "accelerator_config": dict(accelerator_config={"split_batches": True}),
    "dataloader_num_workers": dict(
        dataloader_num_workers=1,
        dataloader_persistent_workers=True,
        dataloader_prefetch_factor=2,
        dataloader_multiprocessing_context="fork",
        dataloader_pin_memory=False,
        dataloader_in_order=False,
    ),
    "label_names": dict(label_names=["labels"], length_column_name="count"),
    # What is told of a training, and to whom: all at once.
    "logging_strategy": dict(
        logging_strategy="steps",
        logging_first_step=True,
        logging_nan_inf_filter=False,
        log_on_each_node=False,
        log_level="error",
        log_level_replica="error",
        disable_tqdm=True,
        run_name="name",
        project="name",
        trackio_space_id="name",
        trackio_bucket_id="name",
        trackio_static_space_id="name",
        skip_memory_metrics=False,
        torch_empty_cache_steps=1,
        average_tokens_across_devices=False,
        restore_callback_states_from_checkpoint=True,
        ignore_data_skip=True,
        do_train=True,
        do_eval=True,
        do_predict=True,
    ),
}
# What cannot be had on this machine: the words that end it are the bare model's.
REFUSED: dict[str, dict[str, object]] = {
    "tf32": dict(tf32=True),
    "use_liger_kernel": dict(use_liger_kernel=True, liger_kernel_config={"rope": False}),
    "optim_target_modules": dict(optim="galore_adamw", optim_target_modules=["mlp"]),
}
# docs/limits.md has it: layers are given a mask's minus infinity, at which this watch of the values stops.
LIMITED = {"debug": dict(debug="underflow_overflow")}
# What is tried elsewhere: each run here has the first, those of several processes the second.
ELSEWHERE = {
    "test_habits.py": ("output_dir", "max_steps", "logging_steps", "report_to", "use_cpu"),
    "test_launched.py": ("fsdp", "fsdp_config", "deepspeed"),
    "test_hub.py": ("push_to_hub", "hub_model_id", "hub_strategy"),
    "test_train.py": ("resume_from_checkpoint",),
}
# What torch's DDP, accelerate and the hub are told, and no model.
UNTRIED = (
    *("ddp_find_unused_parameters", "ddp_bucket_cap_mb", "ddp_broadcast_buffers"),
    *("ddp_static_graph", "ddp_backend", "ddp_timeout", "local_rank", "parallelism_config"),
    *("hub_token", "hub_private_repo", "hub_always_push", "hub_revision"),
)


def test_every_key_has_its_place() -> None:
    """A key that a later transformers brings is not passed over."""
    tried = {key for row in (*KEYS.values(), *REFUSED.values(), *LIMITED.values()) for key in row}
    there = {*UNTRIED, *(key for keys in ELSEWHERE.values() for key in keys)}
    known = {one.name for one in fields(TrainingArguments)}
    assert (tried | there, tried & there - {"max_steps"}) == (known, set())
    assert all((Path(__file__).parent / name).is_file() for name in ELSEWHERE)


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
@pytest.mark.sampled(24)
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
    # float32; half precision rounds after each op, and some ops of a graph are one
    close = 2e-2 if "16" in key else 2e-4
    assert len(want) >= 4 and got == pytest.approx(want, rel=close)


@pytest.mark.habit("training: keys that this machine cannot have", "the bare model's error")
@pytest.mark.parametrize("key", REFUSED)
def test_refused_as_the_backbone_is(key: str, tmp_path: Path) -> None:
    said = []
    for model in (tiny("llama"), peftc.compile(tiny("llama"), "norm_tuning")):
        with pytest.raises(Exception) as caught:
            history(model, tmp_path, REFUSED[key])
        said.append((caught.type, str(caught.value)))
    assert said[0] == said[1]


def test_a_watch_of_values_stops_at_a_mask(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="inf/nan detected"):
        history(peftc.compile(tiny("llama"), "norm_tuning"), tmp_path, LIMITED["debug"])
