"""Training with the stock Trainers: only deltas learn, checkpoints resume, labels may be smoothed."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import logits, tiny
from datasets import Dataset
from methods import spec
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainingArguments,
)

import peftc
from peftc.cli.rows import read_rows
from peftc.errors import PeftcError
from peftc.training import run
from peftc.training.recipe import load_recipe

WORDS = ["good", "fine", "great", "bad", "poor", "sad", "very", "so", "film", "song"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocab = {w: i for i, w in enumerate(["<s>", "<pad>", "</s>", "<unk>", *WORDS])}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
    )


def reviews(count: int) -> tuple[list[str], list[int]]:
    torch.manual_seed(3)
    texts, labels = [], []
    for i in range(count):
        word = WORDS[int(torch.randint(0, 3, ()))] if i % 2 else WORDS[int(torch.randint(3, 6, ()))]
        texts.append(f"{WORDS[6 + i % 2]} {word} {WORDS[8 + i % 2]}" if i % 3 else f"so {word}")
        labels.append(i % 2)
    return texts, labels


def labelled(count: int) -> dict[str, list[str]]:
    texts, labels = reviews(count)
    return {"text": texts, "label": [f"LABEL_{label}" for label in labels]}


@pytest.mark.sampled(3)
@pytest.mark.parametrize("method", ["lora", "mam", "bitfit"])
def test_a_classifier_learns(method: str, tokenizer: PreTrainedTokenizerFast) -> None:
    small = {"lora": dict(r=4, alpha=8), "mam": dict(l=4, m=8, r=4), "bitfit": {}}[method]
    backbone = tiny("roberta", num_labels=2)
    before = {n: p.detach().clone() for n, p in backbone.named_parameters()}
    model = peftc.compile(backbone, [peftc.load_spec(method, **small), "head"])
    recipe = load_recipe("classification").using(
        num_train_epochs=8, learning_rate=5e-3, per_device_train_batch_size=16, max_length=8
    )
    train, test = (Dataset.from_dict(labelled(count)) for count in (96, 40))
    done = run.train(model, tokenizer, train, test, recipe)
    assert done.metrics["accuracy"] >= 0.8 and done.steps == 48  # chance is 0.5
    free = {one.path for one in model.plan.unfrozen}
    assert all(torch.equal(p, before[n]) for n, p in backbone.named_parameters() if n not in free)


def test_seq2seq_with_label_smoothing_and_generation(tokenizer: PreTrainedTokenizerFast) -> None:
    model = peftc.compile(tiny("bart"), peftc.load_spec("mam", l=4, m=8, r=4))
    texts, _ = reviews(24)
    recipe = load_recipe("summarization").using(
        num_train_epochs=2,
        per_device_train_batch_size=8,
        label_smoothing_factor=0.1,
        max_length=8,
        max_target_length=6,
        generation={"num_beams": 2},
    )
    rows = Dataset.from_dict({"text": texts, "summary": texts})
    before = model.generation_config
    done = run.train(model, tokenizer, rows, rows.take(4), recipe)
    assert done.steps == 6 and len(done.predictions) == 4 and 0 <= done.metrics["rougeL"] <= 1
    assert model.generation_config is before


def encoded(tokenizer: PreTrainedTokenizerFast, count: int) -> list[dict[str, list[int]]]:
    texts, _ = reviews(count)
    ids = tokenizer(texts, padding="max_length", max_length=4)["input_ids"]
    return [{"input_ids": one, "attention_mask": [1] * 4, "labels": one} for one in ids]


@pytest.mark.habit("training: checkpoints and resume", "an uninterrupted training, to the bit")
def test_checkpoints_resume_exactly(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """Four steps equal two steps, a checkpoint, a new process's model, and two more."""

    def trainer(out: Path, **more: object) -> Seq2SeqTrainer:
        model = peftc.compile(tiny("bart", dropout=0.0), peftc.load_spec("lora", r=4))
        args = Seq2SeqTrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            report_to=[],
            learning_rate=1e-2,
            disable_tqdm=True,
            logging_strategy="no",
            seed=5,
            **more,
        )
        return Seq2SeqTrainer(model=model, args=args, train_dataset=encoded(tokenizer, 16))

    whole = trainer(tmp_path / "a")
    whole.train()
    saved = {one.name for one in (tmp_path / "a" / "checkpoint-2").iterdir()}
    assert {"peftc.json", "model.safetensors"} <= saved
    size = (tmp_path / "a" / "checkpoint-2" / "model.safetensors").stat().st_size
    assert size < 4 * whole.model.plan.parameters.training + 10_000  # deltas only
    resumed = trainer(tmp_path / "b")
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    for name, value in whole.model.deltas.values().items():
        assert torch.allclose(value, resumed.model.deltas.values()[name], atol=1e-6), name


@pytest.mark.habit("training: activation checkpointing", "the same training without")
@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", ["mam", "lora"])
def test_a_trainer_computes_layers_twice(
    method: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """`gradient_checkpointing` changes nothing but the memory: dropout, prefixes and losses are the same."""
    losses, learned = [], []
    for twice in (False, True):
        torch.manual_seed(0)
        model = peftc.compile(tiny("llama", attention_dropout=0.1), spec(method))
        args = TrainingArguments(
            output_dir=str(tmp_path / str(twice)),
            report_to=[],
            disable_tqdm=True,
            max_steps=3,
            seed=5,
            learning_rate=1e-2,
            gradient_checkpointing=twice,
        )
        trainer = Trainer(model=model, args=args, train_dataset=encoded(tokenizer, 16))
        losses.append(trainer.train().training_loss)
        learned.append(model.deltas.values())
    assert losses[0] == losses[1]
    assert all(torch.equal(one, learned[1][name]) for name, one in learned[0].items())


@pytest.mark.habit("training: the loss that a Trainer logs", "the model's own")
def test_trainer_loss_is_the_models_own(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    backbone = tiny("gpt2")
    rows = encoded(tokenizer, 4)
    batch = {k: torch.tensor([row[k] for row in rows]) for k in rows[0]}
    with torch.no_grad():
        want = backbone(**batch).loss
    model = peftc.compile(backbone, "lora")
    with torch.no_grad():
        assert (model(**batch).loss - want).abs() <= 1e-6 * want
    args = TrainingArguments(output_dir=str(tmp_path), report_to=[], disable_tqdm=True, max_steps=2)
    trainer = Trainer(model=model, args=args, train_dataset=rows)
    trainer.train()
    state = trainer.optimizer.state
    assert state and len(state) == sum(p.requires_grad for p in model.parameters())
    trainer.save_model(str(tmp_path))
    again, _ = peftc.load(tmp_path, backbone=tiny("gpt2")), model.eval()
    assert torch.equal(logits(again, batch), logits(model, batch))


def test_bad_data(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(PeftcError, match="row 1: no column 'label'"):
        read_rows(tmp_path / "a.jsonl", ["text", "label"])
    (tmp_path / "b.jsonl").write_text("{not json\n")
    with pytest.raises(PeftcError, match="neither JSON lines nor CSV"):
        read_rows(tmp_path / "b.jsonl", ["text"])
    with pytest.raises(PeftcError, match="no data file"):
        read_rows(tmp_path / "none.jsonl", ["text"])
    (tmp_path / "c.csv").write_text("text,label\nx,1\n")
    assert read_rows(tmp_path / "c.csv", ["text", "label"]) == [{"text": "x", "label": "1"}]
