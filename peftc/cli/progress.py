"""How far a training is: steps, loss, tokens a second, time left; a bar on a terminal, lines in a pipe."""

from __future__ import annotations

import time
from typing import Any

from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

from peftc.cli.console import console

LINES = 10  # of a whole training, in a pipe


class Shown(TrainerCallback):
    """Tells the steps of a Trainer on stderr."""

    def __init__(self) -> None:
        self.out = console(stderr=True)
        self.bar = Progress(
            TextColumn("step {task.completed}/{task.total}"),
            BarColumn(),
            TextColumn("{task.description}"),
            TimeRemainingColumn(),
            console=self.out,
            transient=True,
        )
        self.loss, self.start = "", 0.0

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.start = time.perf_counter()
        if self.out.is_terminal:
            self.bar.start()
            self.task = self.bar.add_task("", total=state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        if logs and "loss" in logs:
            self.loss = f"loss {float(logs['loss']):.4f}"

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        step, last = state.global_step, state.max_steps
        seconds = time.perf_counter() - self.start
        said = f"{self.loss}  {state.num_input_tokens_seen / seconds:,.0f} tokens/s"
        if self.out.is_terminal:
            self.bar.update(self.task, completed=step, description=said)
        elif step == last or step % max(last // LINES, 1) == 0:
            left = seconds / step * (last - step)
            self.out.print(f"step {step}/{last}  {said.strip()}  {left:.0f} s left")

    def close(self) -> None:
        """Also where training ended by an exception."""
        if self.out.is_terminal:  # else it would print an empty line
            self.bar.stop()
