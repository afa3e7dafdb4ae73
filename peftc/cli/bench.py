"""`peftc bench`: how fast a bundle answers here, beside torch in the same run."""

from __future__ import annotations

import json
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from peftc import runtime
from peftc.cli import directories, options
from peftc.cli.console import raw, say, step

_PAIRS = 5  # at least, in whatever time
_WARM = 2


@dataclass(frozen=True)
class Speed:
    """Milliseconds of a call, by the share of calls that took no longer, and what a second gives."""

    p50: float
    p90: float
    p99: float
    per_second: float

    @staticmethod
    def of(seconds: list[float], amount: int) -> Speed:
        marks = [0.5, 0.9, 0.99]
        found = torch.tensor(seconds, dtype=torch.float64).quantile(torch.tensor(marks).double())
        p50, p90, p99 = (1e3 * one for one in found.tolist())
        return Speed(p50, p90, p99, 1e3 * amount / p50)


def bench(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="What `peftc export` wrote.")],
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Deltas or a checkpoint, run by torch beside it."),
    ] = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Rows of a call.")] = 1,
    length: Annotated[int, typer.Option("--length", min=1, help="Tokens that a row has.")] = 64,
    new_tokens: Annotated[
        int, typer.Option("--new-tokens", min=1, help="Tokens that are written, greedily.")
    ] = 32,
    seconds: Annotated[float, typer.Option("--seconds", min=0, help="How long to measure.")] = 20,
    device: options.Device = "cpu",
    as_json: options.Json = False,
) -> None:
    """Time a bundle: latencies, tokens a second, and beside torch with --model.

    \b
    peftc bench bundle
    peftc bench bundle --model deltas --batch 8 --length 512
    """
    with step(f"loading {bundle}"):
        options.quiet()
        runner = runtime.load(bundle, options.providers(device))
        asked = _inputs(runner, batch, length)
    ways = {"bundle": runner}
    if model is not None:
        ways["torch"] = directories.model_of(Path(model)).eval()
    calls = {name: _call(one, asked, new_tokens) for name, one in ways.items()}
    with step(f"measuring for {seconds:g} s"):
        times = _measured(calls, seconds)
    amount, unit = _amount(runner, batch, length, new_tokens)
    found = {name: Speed.of(one, amount) for name, one in times.items()}
    ratio = _ratio(*(times[name] for name in ("torch", "bundle"))) if "torch" in times else None
    if as_json:
        about = {"threads": torch.get_num_threads(), "calls": len(times["bundle"]), "unit": unit}
        rows = {name: asdict(one) for name, one in found.items()}
        return raw(json.dumps({**about, **rows, "times_torch": ratio}, indent=1))
    say(f"{'':<8}{'p50':>10}{'p90':>10}{'p99':>10}  {unit} a second")
    for name, one in found.items():
        cells = "".join(f"{value:>7.2f} ms" for value in (one.p50, one.p90, one.p99))
        say(f"{name:<8}{cells}  {one.per_second:,.1f}")
    if ratio is not None:
        middle, low, high = ratio
        say(
            f"the bundle is {middle:.2f} times as fast as torch [{low:.2f}, {high:.2f}]: "
            f"median of {len(times['bundle'])} pairs, {torch.get_num_threads()} threads"
        )


def _inputs(runner: Any, batch: int, length: int) -> dict[str, torch.Tensor]:
    """A seeded batch for the first graph: token ids without padding, or noise."""
    generator, session = torch.Generator().manual_seed(0), runner.sessions[0]
    if "input_ids" in session.inputs:
        high = runner.config.get_text_config().vocab_size
        ids = torch.randint(min(10, high // 2), high, (batch, length), generator=generator)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    name = next(one for one in session.inputs if one != "attention_mask")
    shape = [one if isinstance(one, int) else batch for one in session.shape(name)]
    return {name: torch.randn(shape, generator=generator)}


def _call(one: Any, asked: Mapping[str, torch.Tensor], new_tokens: int) -> Callable[[], object]:
    given = {k: v.to(one.dtype) if v.is_floating_point() else v for k, v in asked.items()}
    if one.can_generate():
        counts = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
        return lambda: one.generate(**given, **counts, do_sample=False, num_beams=1)

    def forward() -> object:
        with torch.inference_mode():
            return one(**given)

    return forward


def _amount(runner: Any, batch: int, length: int, new_tokens: int) -> tuple[int, str]:
    """What one call gives, and its name."""
    if runner.can_generate():
        return batch * new_tokens, "tokens"
    texts = "input_ids" in runner.sessions[0].inputs
    return (batch * length, "tokens") if texts else (batch, "rows")


def _measured(calls: Mapping[str, Callable[[], object]], seconds: float) -> dict[str, list[float]]:
    """Seconds of each call, taken in turn and in changing order, so that a slow moment hits all alike."""
    for call in calls.values():
        for _ in range(_WARM):
            call()
    times: dict[str, list[float]] = {name: [] for name in calls}
    end = time.perf_counter() + seconds
    turn = list(calls.items())
    while len(times[turn[0][0]]) < _PAIRS or time.perf_counter() < end:
        turn.reverse()
        for name, call in turn:
            start = time.perf_counter()
            call()
            times[name].append(time.perf_counter() - start)
    return times


def _ratio(slow: list[float], fast: list[float]) -> tuple[float, float, float]:
    """The median of the ratios of pairs, and a 95 % interval of it, by resampling."""
    ratios, draw = [a / b for a, b in zip(slow, fast, strict=True)], random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(1000))
    return statistics.median(ratios), medians[25], medians[974]
