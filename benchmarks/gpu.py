"""What needs a GPU: training and generating in bf16 against PEFT, eager and compiled, memory, kernels of attention,
ONNX Runtime.

Rows as those of bench.py, at BART-large and a Llama of 1.1 billion parameters with random weights. A row that fails
says why and stops no other. A whole run at real size on a GPU writes results/gpu.json, whole after each row; `left`
there names the rows that time did not reach.

python benchmarks/gpu.py [--pairs 10] [--seconds 20] [--only TEXT] [--size toy] [--device cpu] [--out FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import adapted
import measured
import torch
import transformers
from paired import Row, measure
from peft import PeftModel
from torch import nn
from torch._dynamo.utils import counters
from transformers import PreTrainedModel

import peftc
from peftc.runtime import PROVIDERS

try:
    from onnxruntime import get_available_providers
except ImportError:
    get_available_providers = tuple

Steps = dict[str, Callable[[], object]]
# Measures two ways to do one thing, ours first, and how many times the other's time ours may take.
Clock = Callable[[Steps, float], dict[str, Any]]


@dataclass
class Subject:
    """A model of one size on one device, built in its forms when a row first needs them."""

    name: str
    size: measured.Size
    device: str
    backend: str

    @property
    def changes(self) -> Mapping[str, Any]:
        """What the model is at this size."""
        return self.size.models[self.name]

    @cached_property
    def pair(self) -> dict[str, nn.Module]:
        """PEFT's LoRA at q and v, and ours."""
        place: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        return adapted.pair(self.name, "lora q,v", **place, **self.changes)

    @cached_property
    def bare(self) -> PreTrainedModel:
        place: dict[str, Any] = {"device": self.device, "dtype": torch.bfloat16}
        return measured.bare(self.name, **place, **self.changes)

    @cached_property
    def folded(self) -> PreTrainedModel:
        model: Any = self.pair["ours"]
        return peftc.merge(model)[0]

    def batch(self, padded: bool = False) -> dict[str, Any]:
        """What a training step is given."""
        return self._placed(measured.batch(self.name, self.size.rows, self.size.length, padded))

    def training(self, model: nn.Module) -> Callable[[], object]:
        return measured.training_step(model, self.batch())

    def generating(self, model: Any) -> Callable[[], object]:
        """Greedy generation from one prompt."""
        prompt = self._placed(measured.batch(self.name, 1, self.size.prompt))
        return measured.generating(model, prompt, self.size.tokens)

    def _placed(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: one.to(self.device) for name, one in inputs.items()}


# ---- rows


def training(subject: Subject, clock: Clock) -> dict[str, Any]:
    """Forward and backward."""
    ours, peft = (subject.training(subject.pair[side]) for side in ("ours", "peft"))
    return clock({"ours": ours, "peft": peft}, 1.0)


def memory(subject: Subject, clock: Clock) -> dict[str, Any]:
    """The most bytes that a training step holds beyond what was held before it."""
    found = {}
    for side, model in subject.pair.items():
        step = subject.training(model)
        step()
        found[side] = measured.peak_bytes(step, subject.device)
    return {"peak bytes": found, "ratio": found["ours"] / found["peft"]}


def attention(subject: Subject, clock: Clock, *, padded: bool) -> dict[str, Any]:
    """Which attention a training step computes."""
    found = {}
    for side, model in {"bare": subject.bare, **subject.pair}.items():
        step = measured.training_step(model, subject.batch(padded))
        step()
        found[side] = measured.attention(step)
        model.zero_grad()
    return found


def generation(subject: Subject, clock: Clock, *, ours: str, other: str) -> dict[str, Any]:
    """Tokens of one row, by two of the model's forms."""
    models: dict[str, Callable[[], Any]] = {
        "ours": lambda: subject.pair["ours"],
        "peft": lambda: subject.pair["peft"],
        "bare": lambda: subject.bare,
        "folded": lambda: subject.folded,
    }
    bounds = {("ours", "peft"): 1.0, ("ours", "bare"): 1.05, ("folded", "bare"): 1.02}
    steps = {side: subject.generating(models[side]()) for side in (ours, other)}
    return _with_speed(clock(steps, bounds[ours, other]), subject)


def _with_speed(found: dict[str, Any], subject: Subject) -> dict[str, Any]:
    tokens = subject.size.tokens
    return found | {"tokens per second": {k: tokens / s for k, s in found["seconds"].items()}}


def compiled_training(subject: Subject, clock: Clock) -> dict[str, Any]:
    """Forward and backward, both under torch.compile."""
    steps, seen = {}, {}
    for side in ("ours", "peft"):
        model: Any = torch.compile(subject.pair[side], backend=subject.backend)
        steps[side] = subject.training(model)
        seen[side] = _compiled(side, steps[side])
    return clock(steps, 1.0) | {"compiled": seen}


def compiled_generation(subject: Subject, clock: Clock) -> dict[str, Any]:
    """Tokens of one row, each model's forward under torch.compile."""
    steps, seen = {}, {}
    with contextlib.ExitStack() as stack:
        for side in ("ours", "peft"):
            model = subject.pair[side]
            stack.enter_context(_forward_compiled(model, subject.backend))
            steps[side] = subject.generating(model)
            seen[side] = _compiled(side, steps[side])
        return _with_speed(clock(steps, 1.0), subject) | {"compiled": seen}


@contextlib.contextmanager
def _forward_compiled(model: nn.Module, backend: str) -> Iterator[None]:
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    inner.forward = torch.compile(inner.forward, backend=backend)
    try:
        yield
    finally:
        del inner.forward


def _compiled(side: str, step: Callable[[], object]) -> dict[str, Any]:
    """How many graphs a first call was cut into, and what cut it, with how often. Raises RuntimeError with the side
    that could not be compiled."""
    counters.clear()
    try:
        step()
    except Exception as error:
        raise RuntimeError(f"{side}: {type(error).__name__}: {error}") from error
    breaks = {_words(why, 160): count for why, count in counters["graph_break"].items()}
    return {"graphs": counters["stats"]["unique_graphs"], "breaks": breaks}


def onnx_runtime(subject: Subject, clock: Clock, **options: str) -> dict[str, Any]:
    """Tokens of one row: the bundle, exported with `options`, by ONNX Runtime's provider for the device, and the model
    that it was made of, folded too, in float32."""
    (provider,) = PROVIDERS[subject.device]
    if provider not in get_available_providers():
        raise RuntimeError(f"{provider} is not installed: peftc[gpu] brings it, in place of [cpu]")
    model: Any = adapted.pair(subject.name, "lora q,v", **subject.changes)["ours"]
    with tempfile.TemporaryDirectory() as folder:
        peftc.export(model, Path(folder) / "bundle", **options)
        runner = peftc.runtime.load(Path(folder) / "bundle", (provider,))
        folded: Any = peftc.merge(model)[0]
        placed = folded.to(subject.device)
        steps = {"onnx": subject.generating(runner), "folded": subject.generating(placed)}
        return _with_speed(clock(steps, 1.0), subject) | {"provider": provider}


# In the order in which they are taken: what is quick first, as a machine may be lent for minutes.
ROWS: dict[str, Callable[[Subject, Clock], dict[str, Any]]] = {
    "training step": training,
    "generate, ours / peft": partial(generation, ours="ours", other="peft"),
    "generate, ours / bare": partial(generation, ours="ours", other="bare"),
    "generate, folded / bare": partial(generation, ours="folded", other="bare"),
    "peak memory of a training step": memory,
    "attention, full batch": partial(attention, padded=False),
    "attention, padded batch": partial(attention, padded=True),
    "training step, compiled": compiled_training,
    "generate, compiled": compiled_generation,
    "generate, ONNX Runtime": onnx_runtime,
    "generate, ONNX Runtime, fp16, fused": partial(onnx_runtime, precision="fp16", fuse="cuda"),
}


def outcome(what: str, take: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """A row, or why there is none; what it held on the device is given back."""
    try:
        found = take()
    except Exception as error:
        found = {"refused": _words(f"{type(error).__name__}: {error}", 400)}
    finally:
        torch._dynamo.reset()
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()
    if "seconds" not in found:  # what was timed has been told
        print(f"{what:<44}{found}", flush=True)
    return found


def _words(text: str, most: int) -> str:
    """A message in one line of so many characters, without folders and addresses of this machine."""
    text = re.sub(r" at 0x[0-9a-f]+", "", " ".join(text.split()))
    for folder in (measured.RESULTS.parents[1], tempfile.gettempdir(), Path.home(), sys.prefix):
        text = text.replace(str(folder), "…")
    return text[:most]


# ---- the run


def machine(device: str) -> dict[str, Any]:
    """Where figures were taken: as measured.machine, and the device with its memory in bytes."""
    found = measured.machine() | {"peft": version("peft"), "device": device}
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found[name] = version(name)
    if device == "cuda":
        seen = torch.cuda.get_device_properties(0)
        found |= {"device": seen.name, "memory": seen.total_memory, "cuda": torch.version.cuda}
    return found


def chosen(device: str | None) -> str:
    """The device asked for, or CUDA's. Raises ValueError where there is none."""
    if device == "cpu":
        return device
    if not torch.cuda.is_available():
        raise ValueError(
            f"--device cuda: torch {torch.__version__} finds no CUDA device here; run on a machine with a GPU, or "
            "pass --device cpu --size toy to try the code"
        )
    return "cuda"


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=10, help="pairs of each row, at least")
    parser.add_argument("--seconds", type=float, default=20, help="time for a row, at most")
    parser.add_argument("--only", default="", help="rows whose names have this text")
    parser.add_argument("--size", choices=measured.SIZES, default="real")
    parser.add_argument("--device", choices=PROVIDERS, help="cuda, unless said")
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    parser.add_argument("--out", type=Path, help="a file of results; --only adds to it")
    options = parser.parse_args(arguments)
    try:
        options.device = chosen(options.device)
    except ValueError as error:
        parser.error(str(error))
    if (
        options.out is None
        and not options.only
        and (options.device, options.size) == ("cuda", "real")
    ):
        options.out = measured.RESULTS / "gpu.json"
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parsed(arguments)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    size = measured.SIZES[options.size]
    subjects = [Subject(name, size, options.device, options.backend) for name in size.models]
    jobs = [(f"{one.name}: {what}", one, take) for what, take in ROWS.items() for one in subjects]
    about = machine(options.device) | {"size": options.size}
    rows = known(options.out, about) if options.only and options.out else {}
    for what, subject, take in jobs:
        if options.only in what:
            clock = _clock(what, options.pairs, options.seconds)
            rows[what] = outcome(what, partial(take, subject, clock))
            if options.out:
                left = [one for one, *_ in jobs if one not in rows]
                measured.write_at(options.out, {"machine": about, "rows": rows, "left": left})


def known(path: Path, about: Mapping[str, Any]) -> dict[str, Any]:
    """The rows of a file, for some to be taken anew. Stops where they are of another machine or other versions."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text())
    odd = [k for k in sorted({*data["machine"], *about}) if data["machine"].get(k) != about.get(k)]
    if odd:
        raise SystemExit(f"{path.name}: its rows are of another {odd[0]}; give --out another file")
    rows: dict[str, Any] = data["rows"]
    return rows


def _clock(what: str, pairs: int, seconds: float) -> Clock:
    return lambda steps, bound: measure(Row(what, steps, bound), pairs, seconds)


if __name__ == "__main__":
    main()
