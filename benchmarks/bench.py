"""Times, side by side in one run: peftc against PEFT, the bare model, and bare export.

Medians of ratios taken pair by pair, repeated until the 95 % interval of the median is narrower than 0.04 (or
`--seconds` a row are over); the interval is printed. Written to results/bench.json with machine and versions.

python benchmarks/bench.py [--pairs 30] [--seconds 120] [--only TEXT]
"""

from __future__ import annotations

import argparse
import copy
import resource
import statistics
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import adapted
import measured
import torch
import transformers
from paired import Row, interval, measure, told
from transformers import BertConfig, BertForSequenceClassification

import peftc

COMPILE = """
import resource, sys, time, torch, transformers
transformers.logging.set_verbosity_error()
from transformers import BartConfig, BartForConditionalGeneration, BertConfig, BertForSequenceClassification
from peftc.driver import compile
from peftc.graph.arguments import dummy_inputs
mode, layers = sys.argv[1], int(sys.argv[2])
torch.manual_seed(0)
if layers:
    sizes = dict(hidden_size=64, intermediate_size=128, num_attention_heads=4, vocab_size=500)
    model = BertForSequenceClassification(BertConfig(num_hidden_layers=layers, **sizes)).eval()
else:
    model = BartForConditionalGeneration(BartConfig()).eval()
inputs = dummy_inputs(model)
flags = {} if layers else {"use_cache": False}
start = time.perf_counter()
if mode == "peftc":
    compiled = compile(model, "mam")
    compiled._programs.ready("forward", inputs, flags)
elif mode == "export":
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(value.ndim), auto) for name, value in inputs.items()}
    shapes |= dict.fromkeys(flags)
    torch.export.export(model, (), {**inputs, **flags}, dynamic_shapes=shapes, strict=False)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def generation(name: str, tokens: int = 24) -> Iterator[Row]:
    """Greedy generation, LoRA at q and v not folded, batch 1: what surrounds the arithmetic counts most."""
    inputs = measured.batch(name, rows=1, length=16)
    models = adapted.pair(name, "lora q,v", **_eight(name))
    plain = measured.bare(name, **_eight(name))
    steps = {k: measured.generating(model, inputs, tokens) for k, model in models.items()}
    ours, peft = steps["ours"], steps["peft"]
    alone = measured.generating(plain, inputs, tokens)
    both = models["ours"], plain
    yield Row(f"{name}: generate, lora", {"ours": ours, "bare": alone}, 1.05, both)
    both = models["ours"], models["peft"]
    yield Row(f"{name}: generate, lora", {"ours": ours, "peft": peft}, 1.0, both)
    folded, _ = peftc.merge(models["ours"])
    merged = measured.generating(folded, inputs, tokens)
    yield Row(
        f"{name}: generate, lora folded", {"ours": merged, "bare": alone}, 1.02, (folded, plain)
    )
    for stored in (False, True):
        model = adapted.mam(name, stored, **_eight(name))
        step = measured.generating(model, inputs, tokens)
        what = f"{name}: generate, mam" + (" stored" if stored else "")
        yield Row(what, {"ours": step, "bare": alone}, 1.5, (model, plain))


def _eight(name: str) -> dict[str, int]:
    return {"llama": {"num_hidden_layers": 8}, "gpt2": {"n_layer": 8}}.get(name, {})


def training(name: str) -> Iterator[Row]:
    """Forward and backward of LoRA at q and v; by regions too, as hooks on layers make it."""
    inputs = measured.batch(name, length=128)
    models = adapted.pair(name, "lora q,v")
    steps = {k: measured.training_step(model, inputs) for k, model in models.items()}
    what, both = f"{name}: training step, lora", {k: steps[k] for k in ("ours", "peft")}
    yield Row(what, both, 1.0, tuple(models.values()))
    followed = adapted.pair(name, "lora q,v")["ours"]
    for layer in followed._programs.layers.values():
        layer.register_forward_hook(lambda *_: None)
    by_layers = measured.training_step(followed, inputs)
    yield Row(
        f"{name}: training step by layers", {"ours": by_layers, "at once": steps["ours"]}, 1.03
    )


def one_token() -> Iterator[Row]:
    """A step so small that only what surrounds the arithmetic counts: one token through twelve toy layers."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=120, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    bare = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=12)).eval()
    inputs = {name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for method, arguments in (("lora", {"r": 8}), ("dora", {"r": 8}), ("prefix_tuning", {})):
        model = peftc.compile(copy.deepcopy(bare), peftc.load_spec(method, **arguments))

        def ours(model: Any = model) -> None:
            with torch.no_grad():
                model(**inputs)

        def alone() -> None:
            with torch.no_grad():
                bare(**inputs)

        yield Row(f"one token through 12 toy layers, {method}", {"ours": ours, "bare": alone}, 1.6)


def compiling(layers: int) -> Iterator[Row]:
    """In fresh processes, the model already built: compiling MAM against a bare export; 0 is BART-large."""
    seconds: dict[str, list[float]] = {}

    def run(mode: str) -> Callable[[], float]:
        def one() -> float:
            command = [sys.executable, "-W", "ignore", "-c", COMPILE, mode, str(layers)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            seconds.setdefault(mode, []).append(float(done.stdout.split()[-2]))
            return seconds[mode][-1]

        return one

    what = f"compile {layers} toy layers, mam" if layers else "compile BART-large, mam"
    yield Row(what, {"ours": run("peftc"), "bare export": run("export")}, 1.15)


def in_processes(row: Row, pairs: int) -> dict[str, Any]:
    """A row whose steps say themselves how long they took."""
    (mine, ours), (other, theirs) = row.steps.items()
    found: list[tuple[Any, Any]] = [(ours(), theirs()) for _ in range(pairs)]
    ratios = [a / b for a, b in found]
    ratio = statistics.median(ratios)
    low, high = interval(ratios)
    told(row, ratio, low, high)
    medians = (statistics.median(side) for side in zip(*found, strict=True))
    return {
        "ratio": ratio,
        "interval": [low, high],
        "bound": row.bound,
        "pairs": pairs,
        "seconds": dict(zip((mine, other), medians, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=30, help="pairs of each row, at least")
    parser.add_argument("--seconds", type=float, default=120, help="time for a row, at most")
    parser.add_argument("--only", default="", help="rows whose names have this text")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    found: dict[str, Any] = {}

    def keep(label: str, row: dict[str, Any]) -> None:
        """What was found stands in the file before the next row is taken."""
        found[label] = row
        if not options.only:
            measured.write("bench", {"machine": measured.machine(), "rows": found})

    made = [lambda: one_token()]
    made += [lambda name=name: generation(name) for name in measured.MODELS]
    made += [lambda name=name: training(name) for name in measured.MODELS]
    for rows in made:
        for row in rows():
            label = f"{row.what} / {[*row.steps][1]}"
            if options.only in label:
                keep(label, measure(row, options.pairs, options.seconds))
    for layers in (0, 6, 12, 24, 48):
        for row in compiling(layers):
            if options.only in row.what:
                keep(row.what, in_processes(row, 3))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
