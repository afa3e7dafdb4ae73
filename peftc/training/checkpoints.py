"""Checkpoints of a training: whose they are, which of them is whole, and what a Trainer's own leave out."""

from __future__ import annotations

import json
import time
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import EarlyStoppingCallback, TrainerCallback
from transformers.trainer_callback import ExportableState

from peftc.errors import PeftcError
from peftc.store.directory import check_files, held, read_manifest, sweep, write_directory
from peftc.store.versions import versions

RECORD = "training.json"
STATE = "trainer_state.json"
Say = Callable[[str], object]


class CheckpointError(PeftcError):
    """A directory of checkpoints that this training cannot use."""


@contextmanager
def claimed(folder: Path, run: Mapping[str, Any], first: bool) -> Iterator[None]:
    """Make `folder` that of a run, or see that it is, and keep others out of it; of the processes of a run the `first`
    does. Raises CheckpointError where it is another's."""
    _claim(folder, run)
    with held(folder) if first else nullcontext(True) as ours:
        if not ours:
            raise CheckpointError(
                f"{folder} is in use by a training; wait for its end, or choose another directory"
            )
        yield


def _claim(folder: Path, run: Mapping[str, Any]) -> None:
    file = folder / RECORD
    if not file.is_file():
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise CheckpointError(
                f"{folder} holds no {RECORD}, so no checkpoints of 'peftc train'; choose another directory"
            )
        said = json.dumps({"versions": versions(), "run": run}, indent=1)

        def fill(new: Path) -> None:
            (new / RECORD).write_text(said)

        return write_directory(folder, fill)
    sweep(folder)
    try:
        there = json.loads(file.read_text())["run"]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is damaged; choose another directory") from error
    if odd := list(_differences(dict(_leaves(there)), dict(_leaves(run)))):
        raise CheckpointError(
            f"{folder} holds checkpoints of another training: {'; '.join(odd)}; choose another directory"
        )


def _leaves(tree: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(tree, Mapping):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _leaves(value, f"{path}.{key}" if path else str(key))


def _differences(there: Mapping[str, Any], here: Mapping[str, Any]) -> Iterator[str]:
    for key in sorted({*there, *here}):
        if there.get(key) != here.get(key):
            yield f"'{key}' is {_short(there.get(key))} there, {_short(here.get(key))} here"


def _short(value: Any) -> str:
    text = "not set" if value is None else str(value)
    return text if len(text) <= 40 else f"{text[:12]}..."


def last_whole(folder: str | Path, say: Say = warnings.warn) -> str | None:
    """The newest whole checkpoint of a Trainer in `folder`, for its `resume_from_checkpoint`; None where there is
    none. `say` is told what is wrong with a newer one, a line each."""
    for one in reversed(every(Path(folder))):
        if (fault := _fault(one)) is None:
            return str(one)
        say(f"{one} is passed over: {fault}")
    return None


def every(folder: Path) -> list[Path]:
    """The checkpoints in a folder, whole or not, in their order."""
    found = [one for one in folder.glob("checkpoint-*") if step_of(one) is not None]
    return sorted(found, key=lambda one: step_of(one) or 0)


def step_of(checkpoint: Path) -> int | None:
    number = checkpoint.name.rpartition("-")[2]
    return int(number) if number.isdecimal() and checkpoint.is_dir() else None


def _fault(checkpoint: Path) -> str | None:
    """What keeps a Trainer from going on from it. A Trainer writes the deltas, its optimizer, its schedule, the random
    states and, last, its own; one that it removes loses them in any order."""
    try:
        check_files(checkpoint, read_manifest(checkpoint), content=True)
        random = sorted(one.name for one in checkpoint.glob("rng_state*.pth"))
        for name in ("optimizer.pt", "scheduler.pt", *(random or ["rng_state.pth"])):
            with zipfile.ZipFile(checkpoint / name) as held:
                if held.testzip() is not None:
                    return f"{name} is damaged"
        state_of(checkpoint)["global_step"]
    except FileNotFoundError as error:
        return f"it lacks {Path(str(error.filename)).name}"
    except zipfile.BadZipFile:
        return f"{name} is damaged"
    except (ValueError, KeyError, TypeError):
        return f"{STATE} is damaged"
    except (PeftcError, OSError) as error:
        return str(error)
    return None


def state_of(checkpoint: str | Path) -> dict[str, Any]:
    """What the Trainer knew when it wrote a checkpoint."""
    found: dict[str, Any] = json.loads((Path(checkpoint) / STATE).read_text())
    return found


def is_done(state: Mapping[str, Any]) -> bool:
    """Whether training had ended with that checkpoint: at its last step, or early."""
    return bool(state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"])


class Progress(TrainerCallback, ExportableState):
    """What a Trainer forgets in a checkpoint: losses that it has not logged, their sum, the random state that the
    order of an epoch came of, how patient it still is, the seconds. It is also who ends training at a step when
    `asked`, after a checkpoint where there are to be `kept`."""

    def __init__(self, trainer: Any, kept: bool) -> None:
        self.trainer, self.kept, self.asked = trainer, kept, False
        self.before, self.start = 0.0, time.perf_counter()
        self.order: torch.Tensor | None = None
        self.back: Mapping[str, Any] | None = None

    @property
    def seconds(self) -> float:
        return self.before + time.perf_counter() - self.start

    def state(self) -> dict[str, Any]:
        ours = self.trainer
        if self.order is None:  # asked before there is any
            return {"args": {}, "attributes": {}}
        return {
            "args": {},
            "attributes": {
                "loss": ours._tr_loss.item(),
                "sum": ours._total_loss_scalar,
                "logged": ours._globalstep_last_logged,
                "order": bytes(self.order.tolist()).hex(),
                "seconds": self.seconds,
            },
        }

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        stored = state.stateful_callbacks
        self.back = stored[type(self).__name__]["attributes"]
        if not self.back:
            return
        ours = self.trainer
        ours._tr_loss.fill_(self.back["loss"])
        ours._total_loss_scalar = self.back["sum"]
        ours._globalstep_last_logged = self.back["logged"]
        ours._initial_global_step = 0
        self.before = self.back["seconds"]
        for one in ours.callback_handler.callbacks:
            if isinstance(one, EarlyStoppingCallback):
                for name, value in stored["EarlyStoppingCallback"]["attributes"].items():
                    setattr(one, name, value)

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.back and state.epoch is not None and state.epoch % 1:
            order = bytes.fromhex(self.back["order"])
            torch.set_rng_state(torch.tensor(list(order), dtype=torch.uint8))
        self.back = None
        self.order = torch.get_rng_state()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            if not self.kept:
                raise KeyboardInterrupt
            control.should_save = True

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self.asked:
            raise KeyboardInterrupt
