"""A training that is killed goes on from its last whole checkpoint and ends with the same bits, whenever it was."""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import tiny

from peftc import cli
from peftc.training.report import REPORT

RECIPES: dict[str, dict[str, Any]] = {
    "steps": {"train": {"num_train_epochs": 2, "save_steps": 3, "logging_steps": 2}},
    "patience": {"patience": 2, "train": {"num_train_epochs": 5}},
}
SHARED = {"learning_rate": 0.02, "per_device_train_batch_size": 16, "weight_decay": 0.01, "seed": 3}
TIMES = ("seconds", "_second", "runtime")  # how their names end


@pytest.fixture(scope="module")
def body(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT with dropout and without a head, its tokenizer, and recipes."""
    path = tmp_path_factory.mktemp("models") / "body"
    tiny("bert").base_model.save_pretrained(path)
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(path)
    for name, keys in RECIPES.items():
        train = {**SHARED, "train_sampling_strategy": "group_by_length", **keys["train"]}
        (path / f"{name}.yaml").write_text(json.dumps({**keys, "train": train}))
    return path


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


@pytest.mark.sampled(7)
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
