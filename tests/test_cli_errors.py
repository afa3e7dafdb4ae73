"""What the command line says to each wrong input: one message, exit code 1, nothing half written."""

from __future__ import annotations

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
    "nothing to keep": (["prune", "{lora}", "--keep", "0", "-o", "{new}"], "'0' is no budget"),
    "too much to keep": (["prune", "{lora}", "--keep", "90%", "-o", "{new}"], "or fewer"),
    "other backbone": (["verify", "{lora}", "-m", "{other}"], "belong to another backbone"),
    "no data": (
        ["train", "lora", "-m", "{model}", "--data", "{new}", "-o", "{new}"],
        "no data file",
    ),
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
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_input_is_one_clear_message(
    run: Run,
    case: str,
    folder: Path,
    lora: Path,
    body: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        "peftc.model.backbones._hub_refusal", lambda name: "the hub cannot be reached"
    )
    arguments, message = WRONG[case]
    places = {**_places(folder, lora, tmp_path), "rows": rows, "body": body}
    code, _, err = run(*(one.format(**places) for one in arguments))
    said = err.partition("error: ")[2]
    assert code == 1
    assert message.format(**places) in said
    assert "Traceback" not in err
    assert not (tmp_path / "new").exists()


def _places(folder: Path, lora: Path, tmp_path: Path) -> dict[str, Path]:
    places = {name: tmp_path / name for name in ("empty", "new", "truncated", "damaged", "other")}
    places["empty"].mkdir()
    for name in ("truncated", "damaged"):
        places[name].mkdir()
        for file in lora.iterdir():
            (places[name] / file.name).write_bytes(file.read_bytes())
    whole = places["truncated"] / "model.safetensors"
    whole.write_bytes(whole.read_bytes()[:-100])
    (places["damaged"] / "peftc.json").write_text("{")
    tiny("bert", seed=9).save_pretrained(places["other"])
    places["nowhere"] = tmp_path / "nowhere.yaml"
    places["nowhere"].write_text("name: nowhere\ndeltas:\n  - train: [gain]\n")
    places["nothing"] = tmp_path / "nothing.jsonl"
    places["nothing"].write_text("")
    places["range"] = _beyond(tmp_path / "range")
    return {**places, "model": folder, "lora": lora}


def _beyond(path: Path) -> Path:
    """Rows of which one has a class that there is not."""
    names = Features({"text": Value("string"), "label": ClassLabel(names=["LABEL_0", "LABEL_1"])})
    rows = pa.table({"text": ["a", "b"], "label": [1, 7]})
    Dataset(rows.cast(names.arrow_schema), info=DatasetInfo(features=names)).save_to_disk(path)
    return path
