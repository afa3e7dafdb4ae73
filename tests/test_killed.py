"""A training that is killed goes on from its last whole checkpoint and ends with the same bits, whenever it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import Run, tiny

import peftc
from peftc import cli
from peftc.cli import progress
from peftc.store.directory import held
from peftc.training.checkpoints import last_whole
from peftc.training.report import REPORT

pytestmark = pytest.mark.xdist_group("test_killed")  # what is left of a whole run is made once
RECIPES: dict[str, dict[str, Any]] = {
    "steps": {"train": {"num_train_epochs": 2, "save_steps": 3, "logging_steps": 2}},
    "patience": {"patience": 2, "train": {"num_train_epochs": 5}},
}
SHARED = {"learning_rate": 0.02, "per_device_train_batch_size": 16, "weight_decay": 0.01, "seed": 3}
TIMES = ("seconds", "_second", "runtime")  # how their names end


@pytest.fixture(scope="module", autouse=True)
def recipes(body: Path) -> None:
    """Beside the model: learning with dropout, in an order that is drawn anew each epoch."""
    for name, keys in RECIPES.items():
        train = {**SHARED, "train_sampling_strategy": "group_by_length", **keys["train"]}
        (body / f"{name}.yaml").write_text(json.dumps({**keys, "train": train}))


def command(recipe: str, body: Path, rows: Path, out: Path) -> list[str]:
    given = ["train", "lora", "-m", body, "-r", body / f"{recipe}.yaml", "--data", rows]
    given += ["--eval", rows, "-o", out / "d", "--checkpoints", out / "c"]
    return [str(one) for one in given]


def moments(die: Callable[[], None]) -> None:
    """Call `die` before, within and after what a training asks of the disk, and around its steps."""

    def around(real: Callable[..., Any], torn: bool) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            die()
            done = real(*args, **more)
            if torn:
                content = Path(args[1]).read_bytes()
                Path(args[1]).write_bytes(content[: len(content) // 2])
                die()
                Path(args[1]).write_bytes(content)
            die()
            return done

        return wrapped

    for where, name, torn in (
        *((os, call, False) for call in ("replace", "fsync", "unlink")),
        (transformers.Trainer, "training_step", False),
        (torch, "save", True),
        (transformers.TrainerState, "save_to_json", True),
    ):
        setattr(where, name, around(getattr(where, name), torn))


def child(work: Callable[[], int], at: int, log: Path) -> int:
    """Run `work` in a process of its own that dies at the `at`-th moment; its exit code. `log` gets the moments."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    code, seen = 99, 0

    def die() -> None:
        nonlocal seen
        seen += 1
        if seen == at:
            os.kill(os.getpid(), signal.SIGKILL)

    torch.set_num_threads(1)  # the others stayed in the parent
    try:
        moments(die)
        code = work()
        log.write_text(str(seen))
    finally:
        os._exit(code)


def left(out: Path) -> tuple[bytes, bytes, dict[str, Any]]:
    """Deltas, their manifest and the report, without its times."""
    told = json.loads((out / "d" / REPORT).read_text())
    for one in (told, *told["history"]):
        for key in [key for key in one if key.endswith(TIMES)]:
            del one[key]
    files = ("model.safetensors", "peftc.json")
    return *((out / "d" / name).read_bytes() for name in files), told


@pytest.fixture(scope="module")
def whole(
    body: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, tuple[int, Any]]:
    """Of each recipe: how many moments there are, and what is left at the end."""
    found, threads = {}, torch.get_num_threads()
    torch.set_num_threads(1)
    for recipe in RECIPES:
        out = tmp_path_factory.mktemp(recipe)
        given, log = command(recipe, body, rows, out), out / "log"
        assert cli.main(given) == 0  # traced and tokenised once for all
        first, again = left(out), command(recipe, body, rows, out / "again")
        assert child(lambda: cli.main(again), 0, log) == 0  # noqa: B023
        assert left(out / "again") == first
        found[recipe] = int(log.read_text()), first
    torch.set_num_threads(threads)
    return found


@pytest.mark.habit(
    "training: kill -9 at any moment, and on", "an uninterrupted training, to the bit"
)
@pytest.mark.sampled(20)
@pytest.mark.parametrize("seed", range(20))
def test_killed_and_gone_on_with(
    seed: int, whole: dict[str, tuple[int, Any]], body: Path, rows: Path, tmp_path: Path
) -> None:
    chance, recipe = random.Random(seed), [*RECIPES][seed % 2]
    total, wanted = whole[recipe]
    given, killed = command(recipe, body, rows, tmp_path), 0
    for _ in range(chance.randint(1, 3)):
        code = child(lambda: cli.main(given), chance.randint(1, total), tmp_path / "log")
        killed += code == -signal.SIGKILL
    assert killed
    assert child(lambda: cli.main(given), 0, tmp_path / "log") == 0
    assert left(tmp_path) == wanted
    odd = [one.name for one in tmp_path.rglob(".*")]
    assert not odd


def test_a_fresh_process_has_the_same_numbers(
    whole: dict[str, tuple[int, Any]], body: Path, rows: Path, tmp_path: Path
) -> None:
    call = "import sys; from peftc.cli import main; sys.exit(main(sys.argv[1:]))"
    hashed = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": "1"}
    given = command("steps", body, rows, tmp_path)
    subprocess.run([sys.executable, "-c", call, *given], env=hashed, check=True)
    assert left(tmp_path) == whole["steps"][1]


def checkpoints(out: Path) -> list[str]:
    return sorted(one.name for one in (out / "c").glob("checkpoint-*"))


@pytest.mark.habit("training: Ctrl-C, and on", "an uninterrupted training, to the bit")
def test_ctrl_c_writes_a_checkpoint_and_goes_on_to_the_same_bits(
    whole: dict[str, tuple[int, Any]],
    body: Path,
    rows: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
) -> None:
    def interrupt(self: Any, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == 4:
            os.kill(os.getpid(), signal.SIGINT)

    given = command("steps", body, rows, tmp_path)
    # As a terminal has it; what runs in the background of a shell may be told to ignore it.
    was = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, was))
    with monkeypatch.context() as patched:
        patched.setattr(progress.Shown, "on_step_begin", interrupt)
        code, out, err = run(*given)
    assert code == 130 and "stopped: interrupted at step 5" in out
    assert "stopping after this step; Ctrl-C again stops at once" in err
    assert checkpoints(tmp_path) == ["checkpoint-3", "checkpoint-5"]
    assert run("verify", tmp_path / "d")[0] == 0
    assert run(*given)[0] == 0 and left(tmp_path) == whole["steps"][1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("recipe", RECIPES)
def test_what_is_done_is_done_at_once(
    recipe: str,
    whole: dict[str, tuple[int, Any]],
    body: Path,
    rows: Path,
    tmp_path: Path,
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = command(recipe, body, rows, tmp_path)
    assert run(*given)[0] == 0
    shutil.rmtree(tmp_path / "d")

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a step")

    monkeypatch.setattr(transformers.Trainer, "training_step", refuse)
    assert run(*given)[0] == 0 and left(tmp_path) == whole[recipe][1]


DAMAGED = {
    "model.safetensors": "model.safetensors is damaged: it has ",
    "peftc.json": "peftc.json is damaged: ",
    "optimizer.pt": "optimizer.pt is damaged",
    "scheduler.pt": "scheduler.pt is damaged",
    "rng_state.pth": "rng_state.pth is damaged",
    "trainer_state.json": "trainer_state.json is damaged",
}


@pytest.mark.parametrize("cut", [True, False])
@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_is_passed_over(
    name: str, cut: bool, trained: Path, tmp_path: Path
) -> None:
    shutil.copytree(trained, tmp_path / "c")
    file = tmp_path / "c" / "checkpoint-8" / name
    content, said = file.read_bytes(), []
    file.write_bytes(content[: len(content) // 2]) if cut else file.unlink()
    assert last_whole(tmp_path / "c", said.append) == str(tmp_path / "c" / "checkpoint-6")
    assert len(said) == 1 and said[0].startswith(f"{file.parent} is passed over: ")
    assert (DAMAGED[name] if cut else name) in said[0]


@pytest.fixture(scope="module")
def trained(
    body: Path,
    rows: Path,
    whole: dict[str, tuple[int, Any]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    out = tmp_path_factory.mktemp("trained")
    assert cli.main(command("steps", body, rows, out)) == 0
    assert checkpoints(out) == ["checkpoint-6", "checkpoint-8"]
    return out / "c"


def test_gone_on_with_past_a_damaged_one(
    trained: Path,
    whole: dict[str, tuple[int, Any]],
    body: Path,
    rows: Path,
    tmp_path: Path,
    run: Run,
) -> None:
    shutil.copytree(trained, tmp_path / "c")
    (tmp_path / "c" / "checkpoint-8" / "optimizer.pt").write_bytes(b"PK")
    code, _, err = run(*command("steps", body, rows, tmp_path))
    assert code == 0 and "checkpoint-8 is passed over: optimizer.pt is damaged\n" in err
    assert left(tmp_path) == whole["steps"][1]


REFUSED: dict[str, tuple[list[str], str]] = {
    "learning rate": (
        ["--lr", "0.5"],
        "{c} holds checkpoints of another training: 'recipe.train.learning_rate' is 0.02 there, 0.5 here; "
        "choose another directory",
    ),
    "spec": (["--set", "r=2"], "{c} holds checkpoints of another training: 'specs.default' is "),
    "rows": (["--data", "{fewer}"], "'data.rows' is 64 there, 32 here"),
    "backbone": (["-m", "{other}"], "'backbone.content' is "),
    "stream": (["--stream", "--steps", "4"], "no --checkpoints with --stream"),
    "both": (["-o", "{c}"], "{c} is not empty and was not written by peftc"),
    "foreign": (
        ["--checkpoints", "{body}"],
        "{body} holds no training.json, so no checkpoints of 'peftc train'; choose another directory",
    ),
    "new, both": (["-o", "{new}", "--checkpoints", "{new}"], "are both {new}; choose two"),
    "torn": (
        ["--checkpoints", "{torn}"],
        "error: {torn}/training.json is damaged; choose another directory",
    ),
    "deltas alone": (
        ["-r", "{alone}"],
        "error: 'train.save_only_model' leaves out what --checkpoints go on from; remove it",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_another_training_is_refused(
    case: str, trained: Path, body: Path, rows: Path, tmp_path: Path, run: Run
) -> None:
    shutil.copytree(trained, tmp_path / "c")
    places = {"c": tmp_path / "c", "new": tmp_path / "new", "body": body}
    places |= {"fewer": tmp_path / "fewer.jsonl", "other": tmp_path / "other"}
    places["fewer"].write_text("".join(rows.read_text().splitlines(keepends=True)[:32]))
    places |= {"torn": tmp_path / "torn", "alone": tmp_path / "alone.yaml"}
    places["torn"].mkdir()
    (places["torn"] / "training.json").write_text("{")
    places["alone"].write_text("train: {save_only_model: true}")
    shutil.copytree(body, places["other"])
    tiny("bert", seed=5).base_model.save_pretrained(places["other"])
    more, message = REFUSED[case]
    before = {one: one.read_bytes() for one in (tmp_path / "c").rglob("*") if one.is_file()}
    given = [*command("steps", body, rows, tmp_path), *(one.format(**places) for one in more)]
    code, _, err = run(*given)
    assert code == 1 and message.format(**places) in err and "Traceback" not in err
    assert {one: one.read_bytes() for one in before} == before
    assert not (tmp_path / "d").exists()


def test_a_training_that_runs_is_left_alone(
    trained: Path, body: Path, rows: Path, tmp_path: Path, run: Run
) -> None:
    folder = tmp_path / "c"
    shutil.copytree(trained, folder)
    with held(folder) as ours:
        code, _, err = run(*command("steps", body, rows, tmp_path))
    assert ours and code == 1
    assert f"error: {folder} is in use by a training; wait for its end" in err
    assert checkpoints(tmp_path) == ["checkpoint-6", "checkpoint-8"]


def test_no_number_goes_back_to_the_last_good_state(
    body: Path, rows: Path, tmp_path: Path, run: Run
) -> None:
    """Also where the weights that gave no number are already in a checkpoint."""
    (tmp_path / "r.yaml").write_text(json.dumps({"train": {**SHARED, "save_steps": 1}}))
    given = [*command("steps", body, rows, tmp_path), "-r", tmp_path / "r.yaml"]
    given += ["--lr", 1e38, "--warmup", 0]
    code, _, err = run(*given)
    assert code == 1 and "error: the loss is nan at step " in err
    step = int(err.partition("nan at step ")[2].split(";")[0])
    assert f"checkpoint-{step - 1}" not in checkpoints(tmp_path)
    code, out, _ = run("verify", tmp_path / "d")
    assert code == 0 and "not finite    0" in out


def stock(out: Path) -> int:
    """What a script with transformers' own Trainer does."""
    torch.manual_seed(0)
    model = peftc.compile(tiny("bert", num_labels=2), ["lora", "head"])
    data = [{"input_ids": [5 + i % 7, 6, 7 + i % 3], "labels": i % 2} for i in range(16)]
    args = transformers.TrainingArguments(
        str(out / "c"),
        num_train_epochs=2,
        save_steps=3,
        save_total_limit=2,
        per_device_train_batch_size=4,
        learning_rate=0.01,
        report_to=[],
        disable_tqdm=True,
    )
    trainer = transformers.Trainer(model, args, train_dataset=data)
    trainer.train(resume_from_checkpoint=last_whole(out / "c"))
    trainer.save_model(str(out / "d"))
    return 0


@pytest.fixture(scope="module")
def stocked(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, bytes]:
    out = tmp_path_factory.mktemp("stock")
    assert child(lambda: stock(out), 0, out / "log") == 0
    return int((out / "log").read_text()), (out / "d" / "model.safetensors").read_bytes()


@pytest.mark.habit(
    "training: kill -9 with a stock Trainer", "an uninterrupted training, to the bit"
)
@pytest.mark.sampled(20)
@pytest.mark.parametrize("seed", range(20))
def test_a_stock_trainer_goes_on_too(seed: int, stocked: tuple[int, bytes], tmp_path: Path) -> None:
    total, wanted = stocked
    at = random.Random(seed).randint(1, total)
    assert child(lambda: stock(tmp_path), at, tmp_path / "log") == -signal.SIGKILL
    assert child(lambda: stock(tmp_path), 0, tmp_path / "log") == 0
    assert (tmp_path / "d" / "model.safetensors").read_bytes() == wanted


def test_no_number_right_after_a_checkpoint(
    trained: Path, body: Path, rows: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing good is known then: that checkpoint goes, and nothing is saved."""
    shutil.copytree(trained, tmp_path / "c")
    shutil.rmtree(tmp_path / "c" / "checkpoint-8")
    given, last = command("steps", body, rows, tmp_path), tmp_path / "c" / "checkpoint-6"
    with monkeypatch.context() as patched:
        patched.setattr(
            transformers.Trainer, "training_step", lambda *_: torch.tensor(float("nan"))
        )
        code, _, err = run(*given)
    said = f"error: the loss is nan at step 7, the first after {last}, which is removed; run it again\n"
    assert code == 1 and said in err
    assert not last.exists() and not (tmp_path / "d").exists()
    assert run(*given)[0] == 0
