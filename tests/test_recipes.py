"""Recipes: the paper's hyper-parameters, keys that are checked, data of every kind, each task, what stops a training."""

from __future__ import annotations

import json
import math
import xml.etree.ElementTree as xml
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import datasets
import numpy as np
import pytest
import torch
import transformers
from conftest import Run, tiny
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from transformers import BertTokenizerFast, DataCollatorWithPadding, TrainingArguments

import peftc
from peftc.cli import options, progress
from peftc.errors import PeftcError
from peftc.model import backbones
from peftc.training import data, report, run
from peftc.training.metrics import METRICS
from peftc.training.recipe import RecipeError, load_recipe, recipe_of, shipped
from peftc.training.tasks import TASKS

# Table 8 and appendix A of He et al. 2022.
PAPER: dict[str, dict[str, Any]] = {
    "xsum": dict(
        learning_rate=5e-5, max_steps=100_000, label_smoothing_factor=0.1, max_grad_norm=0.1,
        weight_decay=0.01, warmup_steps=0, rows=64, lengths=(512, 128),
        beams=6, wrote=(10, 60),
    ),
    "wmt16_en_ro": dict(
        learning_rate=5e-5, max_steps=50_000, label_smoothing_factor=0.1, max_grad_norm=1.0,
        weight_decay=0.01, warmup_steps=0, rows=512, lengths=(150, 150),
        beams=5, wrote=(1, 200),
    ),
    **{
        name: dict(
            learning_rate=1e-4, num_train_epochs=10, label_smoothing_factor=0, max_grad_norm=1.0,
            weight_decay=0.1, warmup_steps=0.06, rows=32, lengths=(512, 32),
            beams=None, wrote=(None, None),
        )
        for name in ("mnli", "sst2")
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_hyperparameters(name: str) -> None:
    recipe, wanted = load_recipe(name), dict(PAPER[name])
    args, written = recipe.train, recipe.generation
    rows = args["per_device_train_batch_size"] * args.get("gradient_accumulation_steps", 1)
    assert rows == wanted.pop("rows")
    assert (recipe.max_length, recipe.max_target_length) == wanted.pop("lengths")
    assert written.get("num_beams") == wanted.pop("beams")
    assert (written.get("min_length"), written.get("max_length")) == wanted.pop("wrote")
    assert {key: args[key] for key in wanted} == wanted
    assert args["lr_scheduler_type"] == "polynomial"


def test_the_tables_name_the_same_tasks() -> None:
    assert set(get_args(options.TaskName)) == set(TASKS) == set(backbones.TASKS)
    assert set(shipped()) == {*PAPER, "classification", "summarization"}
    assert all(METRICS[m].of == task.predicts for task in TASKS.values() for m in task.metrics)


WRONG: dict[str, tuple[Any, str]] = {
    "no mapping": ([1], "r.yaml: a recipe is a mapping"),
    "key": ({"tsak": "x"}, "r.yaml: unknown key 'tsak' (did you mean 'task'?)"),
    "task": ({"task": "clasification"}, "'task clasification' (did you mean 'classification'?)"),
    "argument": (
        {"train": {"learning_rat": 1}},
        "r.yaml: unknown key 'train.learning_rat' (did you mean 'learning_rate'?)",
    ),
    "number": ({"train": {"learning_rate": "fast"}}, "'train.learning_rate' is 'fast', not a number"),
    "whole": ({"train": {"max_steps": 1.5}}, "'train.max_steps' is 1.5, not a whole number"),
    "truth": ({"train": {"bf16": "yes"}}, "'train.bf16' is 'yes', not true or false"),
    "own": ({"train": {"output_dir": "x"}}, "not a recipe's to set: --output sets it"),
    "generation": ({"generation": {"num_beam": 1}}, "(did you mean 'num_beams'?)"),
    "column": ({"columns": {"txt": "a"}}, "unknown key 'columns.txt' (did you mean 'text'?)"),
    "metric": ({"metrics": ["bleu"]}, "metric 'bleu' is not one of classification: accuracy"),
    "length": ({"max_length": "long"}, "'max_length' is 'long', not a whole number"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_recipe_says_what_and_the_fix(case: str) -> None:
    given, message = WRONG[case]
    with pytest.raises(RecipeError) as caught:
        recipe_of(given, "r.yaml")
    assert message in str(caught.value)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        recipe_of({"metrics": ["bluu"], "train": {"sede": 1, "report_to": "x"}}, "r.yaml")
    assert len(str(caught.value).splitlines()) == 3


def test_numbers_as_yaml_reads_them(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("train: {learning_rate: 5e-5, max_steps: 10}\n")
    assert load_recipe(tmp_path / "r.yaml").train == {"learning_rate": 5e-5, "max_steps": 10}
    with pytest.raises(RecipeError, match=r"no recipe 'sst3'.*did you mean 'sst2'"):
        load_recipe("sst3")


def test_what_trainers_do_not_take(tokenizer: BertTokenizerFast) -> None:
    recipe = PLAIN.using(lr_scheduler_type="wavy")
    said = "^recipe 'classification', 'train': wavy is not a valid SchedulerType"
    with pytest.raises(PeftcError, match=said):
        run.train(classifier(), tokenizer, Dataset.from_list(ROWS), None, recipe)


ROWS = [
    {"text": ("ab"[i % 2] + " ") * (2 + i % 7), "label": ("even", "odd")[i % 2]} for i in range(24)
]
PLAIN = load_recipe("classification").using(learning_rate=0.02, per_device_train_batch_size=8)
KINDS = ("jsonl", "json.gz", "csv", "parquet", "arrow", "disk", "splits", "folder")


def stored(kind: str, path: Path) -> str:
    """The rows in a file, or a folder, of that kind."""
    import gzip

    rows, lines = Dataset.from_list(ROWS), "".join(json.dumps(row) + "\n" for row in ROWS)
    file = path / f"rows.{kind}"
    if kind == "jsonl":
        file.write_text(lines)
    elif kind == "json.gz":
        file.write_bytes(gzip.compress(lines.encode()))
    elif kind == "csv":
        rows.to_csv(file, index=False)
    elif kind == "parquet":
        rows.to_parquet(file)
    elif kind == "arrow":
        rows.save_to_disk(path / "d")
        return str(next((path / "d").glob("*.arrow")))
    elif kind == "disk":
        rows.save_to_disk(file)
    elif kind == "splits":
        DatasetDict(train=rows, validation=rows.take(4)).save_to_disk(file)
    else:
        file.mkdir()
        (file / "train.jsonl").write_text(lines)
    return str(file)


@pytest.fixture
def tokenizer(folder: Path) -> BertTokenizerFast:
    return transformers.AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("kind", KINDS)
def test_data_of_every_kind(kind: str, tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    source = stored(kind, tmp_path)
    rows = data.read(source, PLAIN, "train")
    assert data.class_names(rows, PLAIN, source) == ("even", "odd")
    encoded = data.encode(rows, PLAIN, tokenizer, {"even": 0, "odd": 1}, source)
    assert encoded["labels"][:4] == [0, 1, 0, 1]
    assert encoded["input_ids"][1] == tokenizer(ROWS[1]["text"])["input_ids"]
    if kind == "splits":
        assert len(data.read(source, PLAIN, "eval")) == 4


def test_rows_are_encoded_once(
    tokenizer: BertTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = data.read(stored("jsonl", tmp_path), PLAIN, "train")
    classes = {"even": 0, "odd": 1}
    first = data.encode(rows, PLAIN, tokenizer, classes, "rows")
    tokenizer(["a"], truncation=True, max_length=3)  # a tokenizer keeps how it was called last

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised again")

    monkeypatch.setattr(type(tokenizer), "__call__", refuse)
    again = data.encode(rows, PLAIN, tokenizer, classes, "rows")
    assert again.cache_files == first.cache_files and again.cache_files
    with pytest.raises(AssertionError, match="tokenised again"):
        data.encode(rows, PLAIN.using(max_length=5), tokenizer, classes, "rows")


CLASSES = {"even": 0, "odd": 1}
BAD: dict[str, tuple[list[dict[str, Any]], str]] = {
    "a column": ([{"txt": "a", "label": "x"}], "no column 'text' (text); there are txt, label (did"),
    "a value": ([*ROWS[:2], {"text": "a", "label": None}], "row 3: no column 'label'"),
    "one class": ([{"text": "a", "label": "x"}], "column 'label' holds one class alone: x"),
    "a class": ([*ROWS[:2], {"text": "a", "label": "new"}], "row 3: class 'new' is not one that"),
    "regression: a number": (
        [{"text": "a", "label": "1.5"}, {"text": "b", "label": "much"}], "row 2: 'much' is no number",
    ),
    "token-classification: a tag": (
        [{"tokens": ["a", "b"], "tags": tags} for tags in (["even", "odd"], ["odd"])],
        "row 2: 1 tag for 2 words",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_data_is_one_message(case: str, tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    rows, message = BAD[case]
    file = tmp_path / "bad.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = case.rpartition(":")[0] or "classification"
    recipe = PLAIN.using(task=task, metrics=())
    with pytest.raises(PeftcError) as caught:
        read = data.read(str(file), recipe, "train")
        data.class_names(read, recipe, str(file))
        data.encode(read, recipe, tokenizer, CLASSES, str(file))
    assert message in str(caught.value)


def test_data_that_is_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A split that is not there, and a hub that does not answer."""
    source, recipe = stored("splits", tmp_path), PLAIN.using(splits={"train": "trian"})
    with pytest.raises(PeftcError) as caught:
        data.read(source, recipe, "train")
    said = "has no split 'trian', only train, validation (did you mean 'train'?)"
    assert str(caught.value) == f"{source} {said}"

    def silent(*_: Any, **__: Any) -> None:
        raise ConnectionError("Couldn't reach 'glue' on the Hub.\nTry again.")

    monkeypatch.setattr(datasets, "load_dataset", silent)
    with pytest.raises(PeftcError) as caught:
        data.read("glue", PLAIN, "train")
    said = "is no local file and cannot be had from the hub: Couldn't reach 'glue' on the Hub"
    assert str(caught.value) == f"data 'glue' {said}"


def test_files_that_are_no_data(tmp_path: Path) -> None:
    (tmp_path / "b.jsonl").write_text("{not json\n")
    (tmp_path / "e.csv").write_text("text,label\n")
    for name, message in (
        ("b.jsonl", "b.jsonl is not json"),
        ("e.csv", "e.csv has no rows"),
        ("n.jsonl", "no data file"),
    ):
        with pytest.raises(PeftcError, match=message):
            data.read(str(tmp_path / name), PLAIN, "train")


def test_a_label_out_of_range(tokenizer: BertTokenizerFast) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["even", "odd"])})
    rows = Dataset.from_dict({"text": ["a", "b"], "label": [1, -1]}, features=features)
    assert data.class_names(rows, PLAIN, "hub") == ("even", "odd")
    with pytest.raises(
        PeftcError, match="row 2: label -1 is out of range: 'label' has classes 0 to 1"
    ):
        data.encode(rows, PLAIN, tokenizer, {"even": 0, "odd": 1}, "hub")


def classifier(**changes: Any) -> Any:
    backbone = tiny("bert", num_labels=2, **changes)
    backbone.config.id2label, backbone.config.label2id = (
        {0: "even", 1: "odd"},
        {"even": 0, "odd": 1},
    )
    torch.manual_seed(0)
    return peftc.compile(backbone, ["lora", "head"])


@pytest.mark.habit(
    "training: recipes, peftc train", "the bare Trainer on the same rows, to the bit"
)
def test_a_recipe_trains_as_the_bare_trainer_does(
    tokenizer: BertTokenizerFast, tmp_path: Path
) -> None:
    """Same rows, same keys: the same losses, the same deltas and the same accuracy, to the bit."""
    rows = Dataset.from_list(ROWS)
    ours = classifier()
    done = run.train(ours, tokenizer, rows, rows, PLAIN.using(num_train_epochs=3))
    bare = classifier()
    transformers.set_seed(0)
    trainer = transformers.Trainer(
        model=bare,
        args=TrainingArguments(
            output_dir=str(tmp_path), num_train_epochs=3, learning_rate=0.02, warmup_steps=0.06,
            per_device_train_batch_size=8, weight_decay=0.01, seed=0, disable_tqdm=True,
            train_sampling_strategy="group_by_length", report_to=[], save_strategy="no",
        ),
        train_dataset=[
            {**tokenizer(row["text"]), "labels": i % 2} for i, row in enumerate(ROWS)
        ],
        data_collator=DataCollatorWithPadding(tokenizer),
    )  # fmt: skip
    loss = trainer.train().training_loss
    assert done.loss == pytest.approx(loss, rel=1e-6)
    for name, value in bare.deltas.values().items():
        assert torch.equal(value, ours.deltas.values()[name]), name
    bare.eval()
    with torch.no_grad():
        scores = [
            bare(**tokenizer(r["text"], return_tensors="pt")).logits.argmax().item() for r in ROWS
        ]
    assert done.metrics["accuracy"] == np.mean([s == i % 2 for i, s in enumerate(scores)])
    assert list(done.predictions) == scores


def writer(folder: Path, path: Path) -> Path:
    tiny("bart", encoder_layers=1, decoder_layers=1).save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


LOCAL = {
    "sst2": {"sentence": "a b", "label": "x"},
    "mnli": {"premise": "a b", "hypothesis": "b", "label": "x"},
    "xsum": {"document": "a b c", "summary": "a"},
    "wmt16_en_ro": {"translation": {"en": "a b", "ro": "b a"}},
}


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_recipes_on_small_local_files(
    name: str, run: Run, folder: Path, body: Path, tmp_path: Path
) -> None:
    file, deltas = tmp_path / "rows.jsonl", tmp_path / "d"
    lines = [
        {k: "xy"[i % 2] if k == "label" else v for k, v in LOCAL[name].items()} for i in range(8)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    model = body if "label" in LOCAL[name] else writer(folder, tmp_path / "bart")
    both = ("--data", file, "--eval", file)
    few = ("--steps", 2, "--batch", 4, "--num-beams", 2)
    code, out, err = run("train", "lora", "-m", model, "--recipe", name, *both, "-o", deltas, *few)
    assert code == 0, err
    told = json.loads((deltas / report.REPORT).read_text())
    assert told["recipe"]["name"] == name and told["seed"] == 42 and told["steps"] == 2
    assert {*load_recipe(name).metrics, "loss"} == set(told["metrics"])
    assert len(told["specs"]["default"]) == 64 and told["versions"]["torch"] == torch.__version__
    assert told["backbone"]["fingerprint"].keys() == {"layout", "content"}
    assert [one["step"] for one in told["history"] if "loss" in one] == [1, 2]
    assert xml.parse(deltas / report.CURVE).getroot().tag.endswith("svg")
    code, out, err = run("eval", deltas, "--data", file, "--json")
    assert code == 0, err
    assert json.loads(out) == pytest.approx(told["metrics"], rel=1e-5)
    assert run("verify", deltas)[0] == 0


def small(body: Path, rows: Path, out: Path) -> tuple[Any, ...]:
    return ("train", "lora", "-m", body, "--data", rows, "-o", out, "--batch", 8)


def test_a_loss_that_is_no_number_stops_and_keeps_what_was_good(
    run: Run, body: Path, rows: Path, tmp_path: Path
) -> None:
    code, out, err = run(*small(body, rows, tmp_path / "d"), "--lr", 1e38, "--warmup", 0)
    assert code == 1 and "error: the loss is nan at step " in err
    assert "Traceback" not in err
    code, out, _ = run("verify", tmp_path / "d")
    assert code == 0 and "not finite    0" in out


def test_an_interrupt_saves_what_was_learned(
    run: Run, body: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(progress.Shown, "on_step_end", stop)
    code, out, _ = run(*small(body, rows, tmp_path / "d"))
    assert code == 130 and "stopped: interrupted at step 3" in out
    assert json.loads((tmp_path / "d" / report.REPORT).read_text())["steps"] == 3
    assert run("verify", tmp_path / "d")[0] == 0


def test_a_dry_run_tries_a_step_and_writes_nothing(
    run: Run, body: Path, rows: Path, tmp_path: Path
) -> None:
    code, out, err = run(*small(body, rows, tmp_path / "d"), "--dry-run")
    assert code == 0, err
    assert "text: column 'text': a a" in out and "classes: even, odd" in out
    assert "one step: " in out and " bytes at most" in out
    assert not (tmp_path / "d").exists()


def test_a_dry_run_leaves_the_deltas(tokenizer: BertTokenizerFast) -> None:
    model = classifier()
    before = {k: v.clone() for k, v in model.deltas.values().items()}
    trial = run.dry_run(model, tokenizer, Dataset.from_list(ROWS), PLAIN)
    assert (
        trial.tokens == sum(map(len, tokenizer([r["text"] for r in ROWS])["input_ids"][:0]))
        or trial.tokens > 0
    )
    assert all(torch.equal(v, before[k]) for k, v in model.deltas.values().items())


def test_no_better_score_ends_it(tokenizer: BertTokenizerFast) -> None:
    rows = Dataset.from_list(ROWS)
    still = PLAIN.using(num_train_epochs=9, learning_rate=0.0, patience=2)
    done = run.train(classifier(), tokenizer, rows, rows, still)
    assert done.steps == 9 and "no better score for 2 evaluations" in done.stopped
    with pytest.raises(PeftcError, match="needs rows to evaluate on"):
        run.train(classifier(), tokenizer, rows, None, still)


def test_streamed_rows(tokenizer: BertTokenizerFast, tmp_path: Path) -> None:
    recipe = PLAIN.using(stream=True)
    rows = data.read(stored("jsonl", tmp_path), recipe, "train")
    assert data.class_names(rows, recipe, "rows") == ("even", "odd")
    with pytest.raises(PeftcError, match="set 'max_steps'"):
        run.train(classifier(), tokenizer, rows, None, recipe)
    done = run.train(classifier(), tokenizer, rows, None, recipe.using(max_steps=4))
    assert done.steps == 4 and math.isfinite(done.loss)


def test_progress_in_a_pipe(run: Run, body: Path, rows: Path, tmp_path: Path) -> None:
    code, _, err = run(*small(body, rows, tmp_path / "d"), "--epochs", 1)
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    assert code == 0 and len(lines) == 8 and "\x1b" not in err
    assert lines[-1].startswith("step 8/8  loss ") and lines[-1].endswith(" tokens/s  0 s left")


def test_events_for_tensorboard(run: Run, body: Path, rows: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    code, _, _ = run(*small(body, rows, tmp_path / "d"), "--log", tmp_path / "log", "--steps", 2)
    assert code == 0 and [*(tmp_path / "log").glob("events*")]


TAGGED = {"tokens": ["a", "b", "a"], "tags": ["O", "X", "O"]}
ASKED = {
    "question": "a",
    "context": "b c d e f",
    "answers": {"text": ["d"], "answer_start": [4]},
}
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}{% endif %}"
)
CHAT = {"messages": [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c"}]}
# (a row, another), the recipe's own keys, the family, and the metrics that come of it
LEARNED: dict[str, tuple[tuple[dict[str, Any], ...], dict[str, Any], str, set[str]]] = {
    "regression": (
        ({"text": "a a", "label": 0.0}, {"text": "b", "label": 1.0}), {}, "bert", {"mse", "pearson"},
    ),
    "multi-label": (
        ({"text": "a", "labels": ["x"]}, {"text": "a b", "labels": ["x", "y"]}),
        {}, "bert", {"f1_micro", "f1_macro"},
    ),
    "token-classification": (
        (TAGGED, TAGGED), {}, "bert", {"tag_accuracy", "tag_f1"},
    ),
    "question-answering": ((ASKED, ASKED), {"max_length": 32}, "bert", {"exact_match", "span_f1"}),
    "language-modeling": (({"text": "a b c"}, {"text": "a b c"}), {}, "llama", {"perplexity"}),
    "packed": (
        ({"text": "a b c"}, {"text": "a b"}), {"packed": True, "max_length": 8}, "llama", {"perplexity"},
    ),
    "completion": (
        ({"text": "a b", "summary": "c"},) * 2, {"columns": {"target": "summary"}}, "llama", {"perplexity"},
    ),
    "chat": ((CHAT, CHAT), {"columns": {"messages": "messages"}}, "llama", {"perplexity"}),
}  # fmt: skip
WELL = {"perplexity": 40.0, "mse": 0.2}  # better is less; 120 random words begin at 120


@pytest.mark.sampled(4)
@pytest.mark.parametrize("name", LEARNED)
def test_each_task_is_learned(
    name: str, run: Run, folder: Path, tmp_path: Path, tokenizer: BertTokenizerFast
) -> None:
    pair, keys, family, metrics = LEARNED[name]
    task = name if name in TASKS else "language-modeling"
    recipe, file, model = tmp_path / "r.yaml", tmp_path / "rows.jsonl", tmp_path / "model"
    settings = {"num_train_epochs": 12, "learning_rate": 0.03, "per_device_train_batch_size": 8}
    recipe.write_text(json.dumps({"task": task, **keys, "train": settings}))
    file.write_text("".join(json.dumps(pair[i % 2]) + "\n" for i in range(32)))
    backbone = tiny(family)
    (backbone.base_model if family == "bert" else backbone).save_pretrained(model)
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "[SEP]"
    tokenizer.save_pretrained(model)
    both = ("--data", file, "--eval", file)
    code, _, err = run("train", "lora", "-m", model, "-r", recipe, *both, "-o", tmp_path / "d")
    assert code == 0, err
    told = json.loads((tmp_path / "d" / report.REPORT).read_text())["metrics"]
    assert set(told) == {*metrics, "loss"}
    for metric in metrics - {"loss"}:
        good = told[metric] <= WELL[metric] if metric in WELL else told[metric] > 0.9
        assert good, told
    code, out, err = run("eval", tmp_path / "d", "--data", file, "--json")
    assert code == 0, err
    assert json.loads(out) == pytest.approx(told, rel=1e-4, abs=1e-6)


def encoded(tokenizer: BertTokenizerFast, row: dict[str, Any], **keys: Any) -> Dataset:
    recipe = recipe_of({"task": "language-modeling", **keys}, "r")
    return data.encode(Dataset.from_list([row, row]), recipe, tokenizer, {}, "rows")


def test_what_is_answered_alone_is_learned(tokenizer: BertTokenizerFast) -> None:
    tokenizer.chat_template, tokenizer.eos_token = TEMPLATE, "[SEP]"
    row = {"text": "a b ", "summary": "c d"}
    one = encoded(tokenizer, row, columns={"target": "summary"})[0]
    learned = tokenizer.convert_ids_to_tokens([i for i in one["labels"] if i >= 0])
    assert learned == ["c", "d", "[SEP]"]
    chat = encoded(tokenizer, CHAT, columns={"messages": "messages"})[0]
    assert tokenizer.convert_ids_to_tokens([i for i in chat["labels"] if i >= 0]) == ["c"]
    packed = encoded(tokenizer, {"text": "a b"}, packed=True, max_length=4)
    whole = tokenizer(["a b[SEP]"] * 2)["input_ids"]
    assert [*chain(*packed["input_ids"])] == [*chain(*whole)]
    assert len(packed[0]["input_ids"]) == 4


# Of the papers and scripts of the metrics, by hand: found, wanted, the number.
COUNTED: dict[str, tuple[list[Any], list[Any], float]] = {
    "accuracy": ([0, 1, 1, 2], [0, 1, 2, 2], 3 / 4),
    "f1": ([1, 1, 0, 0], [1, 0, 1, 0], 1 / 2),
    "matthews": ([1, 1, 0, 0], [1, 1, 1, 0], 1 / math.sqrt(3)),
    "f1_micro": ([[1, 0], [1, 1]], [[1, 0], [0, 1]], 4 / 5),
    "f1_macro": ([[1, 0], [1, 1]], [[1, 0], [0, 1]], (2 / 3 + 1) / 2),
    "exact": ([[1, 0], [1, 1]], [[1, 0], [0, 1]], 1 / 2),
    "mse": ([1.0, 2.0], [1.0, 4.0], 2.0),
    "pearson": ([1.0, 2.0, 3.0], [2.0, 4.0, 6.0], 1.0),
    "rouge1": (["the cat sat"], ["the cats sit"], 2 / 3),
    "rouge2": (["the cat sat"], ["the cats sit"], 1 / 2),
    "rougeL": (["b a c"], ["a b c"], 2 / 3),
    "bleu": (["a b c d e"], ["a b c d f"], 100 * (4 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25),
    "tag_accuracy": ([0, 1, 0], [0, 1, 1], 2 / 3),
    "tag_f1": ([0, 1, 0], [0, 1, 1], 2 / 3),
    "exact_match": (["The cat.", "a dog"], [["cat"], ["dogs", "a cat"]], 1 / 2),
    "span_f1": (["big cat", "dog"], [["cat"], ["dog"]], (2 / 3 + 1) / 2),
}


@pytest.mark.parametrize("name", METRICS)
def test_metrics_by_hand(name: str) -> None:
    found, wanted, number = COUNTED[name]
    assert METRICS[name].score(found, wanted) == pytest.approx(number)
