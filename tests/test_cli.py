"""The command line: every command on tiny models, exact numbers, and what each wrong input says."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import Run, saved, tiny
from safetensors.torch import load_file, save_file
from transformers import AutoModelForSequenceClassification, BertTokenizer, PreTrainedModel

from peftc.cli.main import COMMANDS, command
from peftc.store.fingerprint import fingerprint

BART = ("--model", "facebook/bart-large", "--random-weights")


@pytest.mark.xdist_group("bart-large")
def test_plan_is_data_for_programs(run: Run) -> None:
    code, out, _ = run("plan", "mam", *BART, "--json")
    data = json.loads(out)
    assert code == 0
    assert data["sites"] == {"attention": 36, "ffn": 24}
    assert data["parameters"] == {
        "backbone": 406_291_456,
        "weights": 27_377_664,
        "stored": 27_414_528,
        "training": 86_810_976,
    }
    assert [one["sites"] for one in data["matches"]] == [36, 24]
    assert len(data["edits"]) == 60
    assert data["misses"] == []


def test_plan_prints_the_design_table(run: Run) -> None:
    code, out, err = run("plan", "mam", *BART)
    assert code == 0
    for said in (
        "relu(x @ down + down_bias) @ up + up_bias",
        "prepended",
        "parallel",
        "(1 - λ) h + λ Δh",
        "h + s * delta",
        "27,377,664    6.74 %  6.7 % as the paper prints it",
        "27,414,528",
        "86,810,976",
        "406,291,456",
    ):
        assert said in out
    assert err.count("...") == 2  # progress, and nothing from torch or transformers


@pytest.mark.parametrize(
    ("spec", "insertion", "composition"),
    [
        ("lora", "parallel", "h + alpha / r * delta"),
        ("houlsby_adapter", "sequential", "h + delta"),
        ("prefix_tuning", "prepended", "(1 - λ) h + λ Δh"),
        ("bitfit", "in place", "in place"),
    ],
)
def test_dimensions_are_derived(
    run: Run, folder: Path, spec: str, insertion: str, composition: str
) -> None:
    _, out, _ = run("plan", spec, "--model", folder, "--json")
    (row,) = json.loads(out)["methods"]
    assert (row["insertion"], row["composition"]) == (insertion, composition)


def test_plan_lists_sites_and_set_reaches_the_spec_that_knows_it(run: Run, folder: Path) -> None:
    code, out, _ = run("plan", "lora", "bitfit", "--set", "r=3", "--model", folder, "--sites")
    assert code == 0
    assert "lora+bitfit" in out
    assert "down [32, 3]" in out
    assert "bert.encoder.layer.0.attention.self.query.bias 32" in out


def test_compile_certifies_and_saves(run: Run, folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "deltas"
    code, out, _ = run(
        "compile", "lora", "-m", folder, "-o", target, "--time-passes", "--verify-each"
    )
    assert code == 0
    assert "max |compiled - base|" in out
    assert "after insert: invariants hold" in out
    assert "rewrites" in out
    assert {"peftc.json", "model.safetensors", "tokenizer.json"} <= {
        p.name for p in target.iterdir()
    }
    assert run("verify", target)[0] == 0


def test_compile_prints_graphs(run: Run, folder: Path) -> None:
    code, out, _ = run("compile", "lora", "-m", folder, "--no-save", "--print-after", "insert")
    assert code == 0
    assert out.count("# after") == 1
    assert "# bert.encoder.layer.0.attention.self:attention.q:lora" in out
    code, _, err = run("compile", "lora", "-m", folder, "--no-save", "--print-after", "inline")
    assert (code, err.splitlines()[-1]) == (
        1,
        "error: compile runs no pass 'inline'; it runs normalize, insert, penalize, factors, slices, products, joined, turned, rows, norms, masks, held",
    )


def test_compile_leaves_passes_out(run: Run, folder: Path) -> None:
    wanted = ("compile", "lora", "-m", folder, "--no-save", "--time-passes")
    code, out, _ = run(*wanted, "--without", "products", "--without", "masks")
    assert code == 0 and "slices" in out and "products" not in out and "masks" not in out
    code, _, err = run(*wanted, "--without", "insert")
    assert (code, err.splitlines()[-1]) == (
        1,
        "error: --without: 'insert' cannot be left out; these passes can: factors, slices, products, joined, turned, rows, norms, masks, held",
    )


def test_compile_names_its_output(
    run: Run, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    written = []
    for _ in range(2):  # the same command writes the same deltas, over its own
        assert run("compile", "lora", "-m", folder)[0] == 0
        written.append((tmp_path / "lora-tiny-bert" / "model.safetensors").read_bytes())
    assert written[0] == written[1]


def test_a_new_head_comes_back(run: Run, folder: Path, tmp_path: Path) -> None:
    """A checkpoint without a head: its number of classes and its seed are in the deltas."""
    body = tmp_path / "body"
    model: PreTrainedModel = tiny("bert")
    model.base_model.save_pretrained(body)
    choice = ("--task", "classification", "--num-labels", "7")
    assert run("compile", "lora", "-m", body, *choice, "-o", tmp_path / "d")[0] == 0
    assert run("verify", tmp_path / "d")[0] == 0


def test_random_weights_come_back(run: Run, folder: Path, tmp_path: Path) -> None:
    assert run("compile", "lora", "-m", folder, "--random-weights", "-o", tmp_path / "d")[0] == 0
    assert run("verify", tmp_path / "d")[0] == 0


def test_train_learns_and_its_score_is_of_the_saved_model(
    run: Run, folder: Path, rows: Path, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    tiny("bert").base_model.save_pretrained(body)
    BertTokenizer.from_pretrained(folder).save_pretrained(body)
    common = ("--data", rows, "--eval", rows, "--batch", 8)
    first, second = tmp_path / "first", tmp_path / "second"
    well = ("--lr", 0.02, "--epochs", 8)
    code, out, _ = run("train", "lora", "-m", body, *common, "-o", first, *well)
    assert code == 0
    assert "lora+head" in out
    assert _accuracy(out) > 0.9
    code, again, _ = run("train", first, *common, "-o", second, "--lr", 0, "--epochs", 0.1)
    assert code == 0
    assert _accuracy(again) == _accuracy(out)
    assert run("verify", second)[0] == 0


def _accuracy(out: str) -> float:
    return float(out.partition("accuracy ")[2].split()[0])


def test_train_writes_text(run: Run, folder: Path, rows: Path, tmp_path: Path) -> None:
    model = _writer(folder, tmp_path)
    task = ("--task", "summarization", "--epochs", 0.2, "--keep-mlp")
    code, out, _ = run("train", "mam", "-m", model, *task, "--data", rows, "-o", tmp_path / "d")
    assert code == 0
    assert "mean loss" in out
    assert json.loads((tmp_path / "d" / "peftc.json").read_text())["form"] == "training"


def _writer(folder: Path, tmp_path: Path) -> Path:
    path = tmp_path / "bart"
    tiny("bart", encoder_layers=1, decoder_layers=1).save_pretrained(path)
    BertTokenizer.from_pretrained(folder).save_pretrained(path)
    return path


def test_train_refuses_classes_that_the_deltas_do_not_know(
    run: Run, folder: Path, lora: Path, rows: Path, tmp_path: Path
) -> None:
    code, _, err = run("train", lora, "-m", folder, "--data", rows, "-o", tmp_path / "d")
    assert code == 1
    assert "class 'even' is not one that the model knows" in err
    assert not (tmp_path / "d").exists()


def test_an_embedding_of_51_million_has_a_fingerprint() -> None:
    """BART-large's; more elements than float32 can count."""
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(torch.zeros(1).expand(50_265 * 1024))
    assert fingerprint(model.named_parameters())["content"]


def test_merge_writes_a_plain_checkpoint(run: Run, lora: Path, tmp_path: Path) -> None:
    code, out, _ = run("merge", lora, "-o", tmp_path / "out")
    assert code == 0
    assert "folded 4 of 4 deltas" in out
    model, info = AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert type(model).__name__ == "BertForSequenceClassification"


def test_merge_keeps_what_does_not_fold(run: Run, folder: Path, tmp_path: Path) -> None:
    deltas = saved("mam", folder, tmp_path / "mam")
    code, out, error = run("merge", deltas, "-o", tmp_path / "out")
    assert (code, (tmp_path / "out").exists()) == (1, False)
    assert "kept 2 prefix_tuning" in out
    assert "4 of 4 deltas do not fold" in error
    code, out, _ = run("merge", deltas, "-o", tmp_path / "out", "--partial")
    assert code == 0
    assert "kept 2 prefix_tuning" in out
    assert "kept 2 scaled_parallel_adapter" in out
    assert run("verify", tmp_path / "out" / "deltas")[0] == 0


def test_verify_says_each_number(run: Run, lora: Path) -> None:
    code, out, _ = run("verify", lora)
    assert code == 0
    *lines, last = out.splitlines()
    assert all(line.split()[0] in ("ok", "info") for line in lines)
    said = json.loads((lora / "certificate.json").read_text())
    each = [one for one in said["rows"] if one["moved"] is not None]
    assert last.startswith(f"{len(each)} of {len(each)} rewrites hold by themselves")
    assert said["holds"] and len(said["rows"]) - len(each) == len(lines) == 7
    page = (lora / "certificate.md").read_text()
    assert page.startswith("# Certificate: holds")
    assert all(one["what"] in page for one in said["rows"])
    assert run("verify", lora)[0] == 0  # what it wrote is in no one's way


def test_verify_a_merged_checkpoint(run: Run, lora: Path, tmp_path: Path) -> None:
    merged = tmp_path / "merged"
    assert run("merge", lora, "-o", merged)[0] == 0
    code, out, _ = run("verify", merged)
    assert code == 0
    assert "ok      merged against the deltas" in out
    model = AutoModelForSequenceClassification.from_pretrained(merged)
    with torch.no_grad():
        model.bert.encoder.layer[1].attention.self.query.weight.mul_(2)
    model.save_pretrained(merged)
    code, out, error = run("verify", merged)
    assert (code, json.loads((merged / "certificate.json").read_text())["holds"]) == (1, False)
    assert "first in bert.encoder.layer.1.attention.self.query" in out
    assert "merged against the deltas" in error


def test_export_run_and_verify_a_classifier(
    run: Run, folder: Path, lora: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle = tmp_path / "bundle"
    code, out, _ = run("export", lora, "-o", bundle)
    assert code == 0
    assert "max |ONNX - torch|" in out
    code, out, _ = run("run", bundle, "a b", "c", "--json")
    answers = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [set(one) for one in answers] == [{"text", "label", "score"}] * 2
    assert len(run("run", bundle, "--input", rows)[1].splitlines()) == 64
    monkeypatch.setattr("sys.stdin", io.StringIO("a b\n\nc\n"))
    label, probability = run("run", bundle)[1].splitlines()[1].split("\t")
    assert label == answers[1]["label"]
    assert float(probability) == pytest.approx(answers[1]["score"], abs=1e-4)
    assert "model against torch, now" in run("verify", bundle, "-m", lora, "--full")[1]
    code, _, error = run("run", bundle, "a", "--device", "cuda")
    assert code == 1 and "has no CUDAExecutionProvider" in error
    code, _, error = run("bench", bundle, "--device", "tpu")
    assert code == 1 and "no device 'tpu'; there are cpu, cuda" in error
    (bundle / "model.onnx").write_bytes(b"not a graph")
    assert run("verify", bundle)[0] == 1
    code, out, _ = run("run", bundle, "--ports")  # by the manifest alone
    lines = out.splitlines()
    assert code == 0 and lines[0] == "model.onnx"
    assert "  input   input_ids  int64 [batch, seq_len]" in lines
    assert lines[-1].startswith("  output  logits  float [batch, ")
    said = json.loads(run("run", bundle, "--ports", "--json")[1])
    assert said["model"]["inputs"]["input_ids"]["shape"] == ["batch", "seq_len"]


def test_export_run_and_verify_a_writer(run: Run, folder: Path, tmp_path: Path) -> None:
    model, bundle = _writer(folder, tmp_path), tmp_path / "bundle"
    assert run("export", model, "-o", bundle)[0] == 0
    assert run("run", bundle, "a b", "--num-beams", 2, "--max-new-tokens", 5)[0] == 0
    code, out, _ = run("verify", bundle, "-m", model)
    assert code == 0
    assert "tokens of beam search that differ, now" in out
    tensors = load_file(model / "model.safetensors")
    name = next(one for one in tensors if one.endswith("fc2.weight"))
    save_file(tensors | {name: tensors[name] * 2}, model / "model.safetensors", {"format": "pt"})
    code, out, _ = run("verify", bundle, "-m", model)
    assert code == 1
    assert re.search(r"FAILED  \w+ against torch, now: \w+: '\S+' differs from torch by", out)


@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.slow
def test_bench_measures_beside_torch(
    writes: bool, run: Run, folder: Path, lora: Path, tmp_path: Path
) -> None:
    model, bundle = _writer(folder, tmp_path) if writes else lora, tmp_path / "bundle"
    assert run("export", model, "-o", bundle)[0] == 0
    asked = ("--length", 4, "--new-tokens", 3, "--seconds", 0)
    code, out, _ = run("bench", bundle, "-m", model, *asked, "--json")
    found = json.loads(out)
    assert (code, found["unit"], found["calls"]) == (0, "tokens", 5)
    for way in ("bundle", "torch"):
        one = found[way]
        assert 0 < one["p50"] <= one["p90"] <= one["p99"]
        assert one["per_second"] == pytest.approx(1e3 * (3 if writes else 4) / one["p50"])
    middle, low, high = found["times_torch"]
    assert 0 < low <= middle <= high
    code, out, _ = run("bench", bundle, *asked)
    assert (code, "torch" in out, "tokens a second" in out) == (0, False, True)


def test_specs_and_schema(run: Run) -> None:
    assert "mam" in run("specs")[1]
    assert run("specs", "lora")[1].startswith("# LoRA")
    assert json.loads(run("schema")[1])["type"] == "object"


@pytest.mark.parametrize("command", [*COMMANDS])
def test_help_teaches_by_example(run: Run, command: str) -> None:
    code, out, _ = run(command, "--help")
    assert code == 0
    assert f"peftc {command}" in out.replace("Usage: peftc", "")
    assert max(map(len, out.splitlines())) <= 80


@pytest.mark.parametrize("name", COMMANDS)
def test_the_list_says_what_the_help_of_a_command_says(name: str) -> None:
    assert COMMANDS[name][1] == (command(name).__doc__ or "").splitlines()[0]


def test_a_terminal_sees_that_a_command_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr("sys.stderr", Terminal())
    command("plan")
    assert "loading" in sys.stderr.getvalue()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["specs"], ["schema"], ["specs", "lora"], ["new", "x"]]
)
def test_what_needs_no_torch_does_not_load_it(arguments: list[str], tmp_path: Path) -> None:
    script = f"import sys; from peftc.cli.main import main; main({arguments!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, cwd=tmp_path)


def test_a_file_that_cannot_be_written_is_told(run: Run, lora: Path, tmp_path: Path) -> None:
    """A folder inside a file: not even root can make one."""
    file = tmp_path / "file"
    file.write_text("")
    code, _, err = run("merge", lora, "-o", file / "merged")
    assert code == 1 and "Traceback" not in err and "file" in err


def test_our_fault_is_exit_2_with_a_traceback(
    run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from peftc import driver

    def broken(*_: object, **__: object) -> None:
        raise AssertionError("a bug")

    monkeypatch.setattr(driver, "plan", broken)
    code, _, err = run("plan", "lora", "-m", folder)
    assert code == 2
    assert "Traceback" in err and "please report" in err


@pytest.mark.slow
def test_a_pipe_gets_plain_text(folder: Path) -> None:
    """In its own process: no colour, nothing wider than 80, no noise from the libraries."""
    environment = {**os.environ, "TERM": "xterm-256color", "HF_HUB_OFFLINE": "1"}
    script = "import sys; from peftc.cli.main import main; sys.exit(main())"
    done = subprocess.run(
        [sys.executable, "-c", script, "plan", "mam", "--model", str(folder)],
        capture_output=True,
        text=True,
        env=environment,
        check=True,
    )
    assert "\x1b" not in done.stdout + done.stderr
    assert done.stdout.isascii() or set(done.stdout) - set(map(chr, range(128))) <= set("λΔ")
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert done.stderr.splitlines()[1:] == ["tracing and planning ..."]


def test_plan_lists_the_sites_of_a_model(run: Run, folder: Path) -> None:
    code, out, _ = run("plan", "--sites", "--model", folder)
    assert code == 0
    assert "attention.q" in out and "W[32, 32]" in out and "such as" in out
    found = json.loads(run("plan", "--sites", "--model", folder, "--json")[1])
    assert {"at", "scope", "stack", "kind", "layer", "ports", "dims", "slice"} == set(found[0])
    code, _, err = run("plan", "--model", folder)
    assert code == 1 and "name a spec, or ask for --sites" in err


def test_plan_fits_methods_to_a_budget(run: Run, folder: Path) -> None:
    code, out, _ = run("plan", "lora", "lora_ffn", "--budget", "10%", "--model", folder, "--json")
    assert code == 0
    rows = json.loads(out)
    assert [row["method"] for row in rows] == ["lora", "lora_ffn"]
    assert all(9 < row["percent"] <= 10 for row in rows)
    assert "argument" in run("plan", "lora", "--budget", "10%", "--model", folder)[1]


def test_new_writes_a_spec_that_plans(run: Run, folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    assert run("new", "mine", "-o", path)[0] == 0
    assert run("plan", path, "--model", folder)[0] == 0
    code, _, err = run("new", "mine", "-o", path)
    assert code == 1 and "exists already" in err
    assert run("new", "no-name")[0] == 1


def test_peft_adapters_go_out_and_come_in(
    run: Run, folder: Path, lora: Path, tmp_path: Path
) -> None:
    adapter, again = tmp_path / "adapter", tmp_path / "again"
    assert run("export-peft", lora, "-o", adapter)[0] == 0
    code, out, _ = run(
        "import", adapter, "-m", folder, "--task", "classification", "--num-labels", 3, "-o", again
    )
    assert code == 0 and "saved deltas" in out
    assert run("verify", again)[0] == 0
    code, _, err = run("export-peft", lora, "-o", adapter)
    assert code == 1 and "is not empty" in err
