"""What the command line says to each wrong input: one message, exit code 1, nothing half written."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import Run, tiny
from datasets import ClassLabel, Dataset, DatasetInfo, Features, Value

HUB = "is no local folder, not in the Hugging Face cache, and"
WRONG = {
    "no arguments": (["plan"], "Missing option '--model'"),
    "no such option": (["plan", "mam", "--modle", "x"], "No such option: --modle"),
    "no such command": (["pln"], "No such command 'pln'"),
    "no such spec": (["plan", "lorra", "-m", "{model}"], "no spec 'lorra'"),
    "unknown argument": (["plan", "lora", "-m", "{model}", "--set", "rank=4"], "rank"),
    "not a pair": (
        ["plan", "lora", "-m", "{model}", "--set", "r"],
        "--set takes NAME=VALUE, not 'r'",
    ),
    "not a number": (
        ["plan", "lora", "-m", "{model}", "--set", "r=four"],
        "--set r: 'four' is no number",
    ),
    "no words": (
        ["compile", "lora", "-m", "{model}", "--words", "a", "-o", "{new}"],
        "lora starts from no words; leave --words out",
    ),
    **{
        f"a budget {of}": (
            ["plan", *given, "-m", "{model}", "--budget", "1%"],
            "--budget sizes specs one by one, as they are: name a spec, no --set",
        )
        for of, given in (
            ("with arguments", ("lora", "--set", "r=2")),
            ("of nothing", ("--sites",)),
        )
    },
    "no such folder": (["plan", "lora", "-m", "./nowhere"], "there is no folder './nowhere'"),
    "not a model": (["plan", "lora", "-m", "{empty}"], "holds no config.json"),
    "offline": (["plan", "mam", "-m", "facebook/bart-large"], HUB),
    "offline, named": (["plan", "mam", "-m", "facebook/bart-large"], "--random-weights builds its"),
    "deltas as a model": (["plan", "lora", "-m", "{lora}"], "holds what peftc wrote, not a model"),
    "no site": (["plan", "{nowhere}", "-m", "{model}"], "matches no site"),
    "wrong task": (
        ["compile", "lora", "-m", "{model}", "--task", "summarization"],
        "there is no Auto",
    ),
    "foreign output": (
        ["compile", "lora", "-m", "{model}", "-o", "{model}"],
        "was not written by peftc",
    ),
    "output in the way": (["merge", "{lora}", "-o", "{model}"], "is not empty"),
    "not deltas": (["merge", "{model}", "-o", "{new}"], "peftc did not write it"),
    "truncated": (["merge", "{truncated}", "-o", "{new}"], "model.safetensors is damaged"),
    "truncated, without a digest": (
        ["merge", "{before}", "-o", "{new}"],
        "{before}/model.safetensors cannot be read: Error while deserializing header",
    ),
    "nothing to keep": (["prune", "{lora}", "--keep", "0", "-o", "{new}"], "'0' is no budget"),
    "too much to keep": (["prune", "{lora}", "--keep", "90%", "-o", "{new}"], "or fewer"),
    "other backbone": (["verify", "{lora}", "-m", "{other}"], "belong to another backbone"),
    "no data": (
        ["train", "lora", "-m", "{model}", "--data", "{new}", "-o", "{new}"],
        "no data file",
    ),
    "no data in a recipe": (
        ["train", "lora", "-m", "{model}", "-o", "{new}"],
        "recipe 'classification' names no data; give --data",
    ),
    **{
        f"data, {name}": (["train", "lora", "-m", "{body}", "--data", data, "-o", "{new}"], message)
        for name, data, message in (
            (
                "of no kind",
                "{lora}/model.safetensors",
                "{lora}/model.safetensors: peftc reads .jsonl, .json, .csv, .tsv, .parquet, .arrow, .txt, "
                "not '.safetensors'",
            ),
            ("an empty folder", "{empty}", "{empty} cannot be read: "),
        )
    },
    "a recipe that is not YAML": (
        ["eval", "{lora}", "--data", "{rows}", "--recipe", "{damaged}/peftc.json"],
        "{damaged}/peftc.json:1:2: not YAML: expected the node content, but found '<stream end>'",
    ),
    "a training that told no recipe": (
        ["eval", "{damaged}", "--data", "{rows}"],
        "{damaged}/train_report.json is damaged: it holds no recipe; name one (--recipe)",
    ),
    "train, no tokenizer": (
        ["train", "lora", "-m", "{bare}", "--random-weights", "--data", "{rows}", "-o", "{new}"],
        "there is no tokenizer with {bare}; save one beside its weights",
    ),
    "eval, no tokenizer": (
        ["eval", "{other}", "--data", "{rows}"],
        "there is no tokenizer with {other}; save one beside its weights",
    ),
    **{
        f"deltas with {name}": (
            ["train", "{lora}", *more, "--data", "{rows}", "-o", "{new}"],
            "deltas go on as they are: no other spec, no --set, no --words",
        )
        for name, more in (
            ("a spec", ("lora",)),
            ("arguments", ("--set", "r=2")),
            ("words", ("--words", "a")),
        )
    },
    "a train of nothing": (
        ["train", "lora", "--data", "{rows}", "-o", "{new}"],
        "--model is needed",
    ),
    "no column": (
        [
            "train",
            "lora",
            "-m",
            "{model}",
            "--data",
            "{rows}",
            "-o",
            "{new}",
            "--text-column",
            "body",
        ],
        "no column 'body'",
    ),
    **{
        f"{command}, {name}": ([*start, "--data", f"{{{data}}}", *more], message)
        for command, start in (
            ("train", ("train", "lora", "-m", "{body}", "-o", "{new}")),
            ("eval", ("eval", "{lora}")),
        )
        for name, data, more, message in (
            ("no rows", "nothing", (), "{nothing} has no rows"),
            (
                "another column",
                "rows",
                ("--text-column", "txt"),
                "{rows}: no column 'txt' (text); there are text, label, summary (did you mean 'text'?)",
            ),
            (
                "out of range",
                "range",
                (),
                "row 2: label 7 is out of range: 'label' has classes 0 to 1",
            ),
        )
    },
    "eval, a class of others": (
        ["eval", "{lora}", "--data", "{rows}"],
        "evaluation data, row 1: class 'even' is not one that the model knows: LABEL_0, LABEL_1, LABEL_2",
    ),
    "not a bundle": (["run", "{lora}", "text"], "is a directory of deltas"),
    "texts twice": (["run", "{lora}", "text", "--input", "{rows}"], "not both"),
    "damaged manifest": (["verify", "{damaged}"], "is damaged"),
    "large manifest": (["verify", "{large}"], "{large}/peftc.json is larger than 4 MiB"),
    "deep manifest": (
        ["verify", "{deep}"],
        "{deep}/peftc.json is damaged: maximum recursion depth exceeded",
    ),
    "damaged merge": (
        ["verify", "{merged}"],
        "{merged}/merge_report.json is damaged: Expecting property name",
    ),
    "no rows to answer": (["run", "{bundle}", "--input", "{nothing}"], "{nothing} has no rows"),
    "not a graph": (["run", "{bundle}", "text"], "{bundle}/model.onnx cannot be loaded: "),
    "nothing certified": (
        ["verify", "{bundle}"],
        "{bundle}/peftc.json certifies nothing; export it again",
    ),
    "another precision": (
        ["verify", "{fp8}"],
        "{fp8}/peftc.json has precision fp8; this peftc reads fp32, fp16, bf16, int8, int4",
    ),
    "no layout": (
        ["export", "{lora}", "-o", "{new}", "--layout", "other"],
        "no layout 'other'; there are peftc, optimum",
    ),
}
# Of packages that are not here.
LACKING = {
    "datasets": (
        ["train", "lora", "-m", "{body}", "--data", "{rows}", "-o", "{new}"],
        'reading data to train on needs: pip install "peftc[train]"',
    ),
    "torch.utils.tensorboard": (
        ["train", "lora", "-m", "{body}", "--data", "{rows}", "-o", "{new}", "--log", "{new}"],
        "--log needs: pip install tensorboard",
    ),
    "onnxscript": (
        ["export", "{lora}", "-o", "{new}"],
        'exporting needs ONNX: pip install "peftc[cpu]" or "peftc[gpu]"',
    ),
    "onnxruntime": (
        ["run", "{bundle}", "text"],
        'running a bundle needs ONNX Runtime: pip install "peftc[cpu]" or "peftc[gpu]"',
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_message(
    run: Run, case: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "peftc.model.backbones._hub_refusal", lambda name: "the hub cannot be reached"
    )
    refused(run, *WRONG[case], places)


@pytest.mark.parametrize("package", LACKING)
def test_a_package_that_is_not_here_is_told_with_its_name(
    run: Run, package: str, places: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    refused(run, *LACKING[package], places)


def refused(run: Run, arguments: Sequence[str], message: str, places: dict[str, Path]) -> None:
    code, _, err = run(*(one.format(**places) for one in arguments))
    said = err.partition("error: ")[2]
    assert code == 1
    assert message.format(**places) in said
    assert "Traceback" not in err
    assert not places["new"].exists()


@pytest.fixture
def places(folder: Path, lora: Path, body: Path, rows: Path, tmp_path: Path) -> dict[str, Path]:
    """What arguments name in braces."""
    names = ("empty", "new", "truncated", "before", "damaged", "large", "deep", "merged", "bundle", "fp8")  # fmt: skip
    places = {name: tmp_path / name for name in (*names, "other", "bare")}
    for name in names:
        if name != "new":
            places[name].mkdir()
    for name in ("truncated", "before", "damaged"):
        for file in lora.iterdir():
            (places[name] / file.name).write_bytes(file.read_bytes())
    for name in ("truncated", "before"):
        whole = places[name] / "model.safetensors"
        os.truncate(whole, whole.stat().st_size - 100)
    manifest = json.loads((lora / "peftc.json").read_text())
    del manifest["files"]  # as there were none before
    (places["before"] / "peftc.json").write_text(json.dumps(manifest))
    for name in ("peftc.json", "train_report.json"):
        (places["damaged"] / name).write_text("{")
    (places["large"] / "peftc.json").write_text("")
    os.truncate(places["large"] / "peftc.json", (4 << 20) + 1)
    (places["deep"] / "peftc.json").write_text("[" * 100_000)
    (places["merged"] / "merge_report.json").write_text("{")
    graphs = {"model": {"file": "model.onnx"}}
    made = {"format": 2, "kind": "text-classification", "graphs": graphs, "parity": [], "data_bytes": 0}  # fmt: skip
    for name, more in (("bundle", {}), ("fp8", {"precision": "fp8"})):
        (places[name] / "peftc.json").write_text(json.dumps({**made, **more}))
        (places[name] / "model.onnx").write_text("not a graph")
    tiny("bert", seed=9).save_pretrained(places["other"])
    tiny("bert").base_model.save_pretrained(places["bare"])
    places["nowhere"] = tmp_path / "nowhere.yaml"
    places["nowhere"].write_text("name: nowhere\ndeltas:\n  - train: [gain]\n")
    places["nothing"] = tmp_path / "nothing.jsonl"
    places["nothing"].write_text("")
    places["range"] = _beyond(tmp_path / "range")
    return {**places, "model": folder, "lora": lora, "body": body, "rows": rows}


def _beyond(path: Path) -> Path:
    """Rows of which one has a class that there is not."""
    names = Features({"text": Value("string"), "label": ClassLabel(names=["LABEL_0", "LABEL_1"])})
    rows = pa.table({"text": ["a", "b"], "label": [1, 7]})
    Dataset(rows.cast(names.arrow_schema), info=DatasetInfo(features=names)).save_to_disk(path)
    return path
