"""Recipes: stock transformers Trainers, with settings that suit deltas."""

from __future__ import annotations

import csv
import json
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from torch.utils.data import Dataset
from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Seq2SeqTrainingArguments,
    TrainingArguments,
    set_seed,
)

from peftc.errors import PeftcError
from peftc.graph.facts import ModelFacts
from peftc.graph.rows import room_of
from peftc.training.trainer import Seq2SeqTrainer, Trainer

MAX_DATA_BYTES = 4 << 30
Row = Mapping[str, Any]


@dataclass(frozen=True)
class Recipe:
    """How to train. Lengths in tokens; `warmup` and `label_smoothing` as fractions."""

    epochs: float = 2.0
    lr: float = 2e-3
    batch: int = 32
    warmup: float = 0.06
    weight_decay: float = 0.01
    label_smoothing: float = 0.0
    max_length: int = 64
    max_target_length: int = 32
    num_beams: int = 1
    seed: int = 0


@dataclass(frozen=True)
class TrainResult:
    """`metric` on the evaluation rows by the recipe's task: accuracy, or ROUGE-L by longest common
    subsequence; None without evaluation rows. `predictions` are label indices, or texts."""

    metric: float | None
    loss: float
    seconds: float
    steps: int
    predictions: tuple[Any, ...]


class Rows(Dataset[dict[str, Any]]):
    """Encoded examples in memory."""

    def __init__(self, rows: Sequence[dict[str, Any]]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.rows[index]


def read_rows(path: Path, columns: Sequence[str]) -> list[Row]:
    """Rows of a .jsonl or .csv file. Raises PeftcError naming the line that lacks a column."""
    if not path.is_file():
        raise PeftcError(f"no data file {path}")
    if path.stat().st_size > MAX_DATA_BYTES:
        raise PeftcError(f"{path} is larger than {MAX_DATA_BYTES >> 30} GiB")
    with path.open(encoding="utf-8", newline="") as lines:
        try:
            rows: list[Row] = (
                list(csv.DictReader(lines))
                if path.suffix == ".csv"
                else [json.loads(line) for line in lines if line.strip()]
            )
        except (ValueError, csv.Error) as error:
            raise PeftcError(f"{path} is neither JSON lines nor CSV: {error}") from error
    if not rows:
        raise PeftcError(f"{path} has no rows")
    for number, row in enumerate(rows, 1):
        missing = [c for c in columns if not isinstance(row, dict) or row.get(c) is None]
        if missing:
            raise PeftcError(f"{path}, row {number}: no column '{missing[0]}'")
    return rows


def _fitting(recipe: Recipe, model: PreTrainedModel) -> Recipe:
    """The recipe with texts no longer than there are positions for, besides rows in front of them."""
    longest = ModelFacts.read(model).longest
    if longest is None:
        return recipe
    return replace(recipe, max_length=min(recipe.max_length, room_of(model).longest(longest)))


def encode_classes(
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    labels: Sequence[int],
    max_length: int,
) -> Rows:
    encoded = tokenizer(list(texts), truncation=True, max_length=max_length)
    return Rows(
        [{**{k: encoded[k][i] for k in encoded}, "labels": label} for i, label in enumerate(labels)]
    )


def _settings(recipe: Recipe, out: Path) -> dict[str, Any]:
    return dict(
        output_dir=str(out),
        num_train_epochs=recipe.epochs,
        learning_rate=recipe.lr,
        per_device_train_batch_size=recipe.batch,
        per_device_eval_batch_size=4 * recipe.batch,
        warmup_steps=recipe.warmup,
        weight_decay=recipe.weight_decay,
        label_smoothing_factor=recipe.label_smoothing,
        train_sampling_strategy="group_by_length",
        lr_scheduler_type="linear",
        seed=recipe.seed,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=not sys.stderr.isatty(),
        dataloader_pin_memory=False,
    )


def train_classifier(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: tuple[Sequence[str], Sequence[int]],
    test: tuple[Sequence[str], Sequence[int]] | None,
    recipe: Recipe,
) -> TrainResult:
    """Train what requires grad on (texts, label indices); accuracy on `test`."""
    set_seed(recipe.seed)
    recipe, start = _fitting(recipe, model), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        trainer = Trainer(
            model=model,
            args=TrainingArguments(**_settings(recipe, Path(scratch))),
            train_dataset=encode_classes(tokenizer, *train, recipe.max_length),
            data_collator=DataCollatorWithPadding(tokenizer),
        )
        done = _run(trainer)
        seconds = time.perf_counter() - start
        if test is None:
            return TrainResult(None, done.training_loss, seconds, done.global_step, ())
        _in_order(trainer)
        logits = trainer.predict(encode_classes(tokenizer, *test, recipe.max_length)).predictions
    predicted = np.asarray(logits).argmax(-1)
    accuracy = float((predicted == np.asarray(test[1])).mean())
    return TrainResult(
        accuracy, done.training_loss, seconds, done.global_step, tuple(predicted.tolist())
    )


def _run(trainer: transformers.Trainer) -> Any:
    """Train without the dicts that Trainer prints where there is no progress bar."""
    trainer.remove_callback(PrinterCallback)
    return trainer.train()


def _in_order(trainer: transformers.Trainer) -> None:
    """Trainer groups by length in `predict` too, and returns the rows in that order."""
    trainer.args.train_sampling_strategy = "random"


def train_seq2seq(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    train: tuple[Sequence[str], Sequence[str]],
    test: tuple[Sequence[str], Sequence[str]] | None,
    recipe: Recipe,
) -> TrainResult:
    """Train what requires grad on (sources, targets); generate on `test` and score ROUGE-L."""
    set_seed(recipe.seed)
    recipe, start = _fitting(recipe, model), time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        settings = _settings(recipe, Path(scratch))
        trainer = Seq2SeqTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                **settings,
                predict_with_generate=True,
                generation_max_length=recipe.max_target_length,
                generation_num_beams=recipe.num_beams,
            ),
            train_dataset=encode_pairs(tokenizer, *train, recipe),
            data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
        )
        done = _run(trainer)
        seconds = time.perf_counter() - start
        if test is None:
            return TrainResult(None, done.training_loss, seconds, done.global_step, ())
        _in_order(trainer)
        tokens = np.asarray(trainer.predict(encode_pairs(tokenizer, *test, recipe)).predictions)
    tokens = np.where(tokens < 0, tokenizer.pad_token_id, tokens)
    texts = tokenizer.batch_decode(tokens, skip_special_tokens=True)
    score = sum(rouge_l(t, w) for t, w in zip(texts, test[1], strict=True)) / len(texts)
    return TrainResult(score, done.training_loss, seconds, done.global_step, tuple(texts))


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase,
    sources: Sequence[str],
    targets: Sequence[str],
    recipe: Recipe,
) -> Rows:
    encoded = tokenizer(list(sources), truncation=True, max_length=recipe.max_length)
    wanted = tokenizer(
        text_target=list(targets), truncation=True, max_length=recipe.max_target_length
    )
    return Rows(
        [
            {**{k: encoded[k][i] for k in encoded}, "labels": labels}
            for i, labels in enumerate(wanted["input_ids"])
        ]
    )


def rouge_l(text: str, wanted: str) -> float:
    """F1 of the longest common subsequence of words (Lin 2004), by the rouge-score package."""
    try:
        from rouge_score.rouge_scorer import RougeScorer
    except ImportError as error:
        raise PeftcError('scoring summaries needs: pip install "peftc[metrics]"') from error
    score: float = RougeScorer(["rougeL"], use_stemmer=True).score(wanted, text)["rougeL"].fmeasure
    return score
