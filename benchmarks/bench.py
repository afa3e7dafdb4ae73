"""Side by side, in one run: peftc against bare export, PEFT and the bare model. Medians; ratios are what counts.

python benchmarks/bench.py [--runs N]
"""

from __future__ import annotations

import argparse
import copy
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping

import torch
import transformers
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
)

import peftc

LARGE = """
import resource, sys, time, torch, transformers
transformers.logging.set_verbosity_error()
from transformers import BartConfig, BartForConditionalGeneration
from peftc.driver import compile
from peftc.graph.arguments import dummy_inputs
model = BartForConditionalGeneration(BartConfig()).eval()
inputs = dummy_inputs(model)
start = time.perf_counter()
if sys.argv[1] == "peftc":
    compile(model, "mam").program("forward", inputs, {"use_cache": False})
elif sys.argv[1] == "export":
    auto = torch.export.Dim.AUTO
    shapes = {name: dict.fromkeys(range(value.ndim), auto) for name, value in inputs.items()}
    shapes["use_cache"] = None
    torch.export.export(model, (), {**inputs, "use_cache": False}, dynamic_shapes=shapes, strict=False)
print(time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)
"""


def medium() -> BartForConditionalGeneration:
    """A BART of 6 + 6 layers, d = 512: large enough that arithmetic counts, small enough for a laptop."""
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=8000,
        d_model=512,
        encoder_layers=6,
        decoder_layers=6,
        encoder_ffn_dim=2048,
        decoder_ffn_dim=2048,
        encoder_attention_heads=8,
        decoder_attention_heads=8,
        max_position_embeddings=512,
    )
    return BartForConditionalGeneration(config)


def batch() -> dict[str, torch.Tensor]:
    """Rows of different lengths, as batches of text are."""
    torch.manual_seed(1)
    return {
        "input_ids": torch.randint(4, 8000, (4, 128)),
        "attention_mask": (torch.arange(128) < torch.tensor([[128], [96], [112], [80]])).long(),
        "decoder_input_ids": torch.randint(4, 8000, (4, 32)),
        "labels": torch.randint(4, 8000, (4, 32)),
    }


def alternate(steps: Mapping[str, Callable[[], object]], runs: int) -> dict[str, list[float]]:
    """Seconds of each step, taken in turn so that a slow moment of the machine hits all alike."""
    for step in steps.values():
        step()
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(runs):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def show(what: str, seconds: Mapping[str, list[float]], bound: float) -> None:
    """The two medians, and the median of the ratios taken pair by pair."""
    (mine, a), (other, b) = seconds.items()
    ratio = statistics.median(x / y for x, y in zip(a, b, strict=True))
    left, right = statistics.median(a), statistics.median(b)
    verdict = "ok" if ratio <= bound else "OVER"
    print(
        f"{what:<34}{mine} {left:7.3f} s   {other} {right:7.3f} s   ratio {ratio:5.2f} (<= {bound}) {verdict}"
    )


def compile_time(runs: int) -> None:
    """In fresh processes: compiling MAM into BART-large (87 M numbers to draw), against a bare export of it."""
    seconds: dict[str, list[float]] = {"peftc": [], "bare export": []}
    memory: dict[str, float] = {}
    for _ in range(runs):
        for name, mode in (("peftc", "peftc"), ("bare export", "export")):
            done = subprocess.run(
                [sys.executable, "-W", "ignore", "-c", LARGE, mode],
                capture_output=True,
                text=True,
                check=True,
            )
            took, peak = done.stdout.split()[-2:]
            seconds[name].append(float(took))
            memory[name] = max(memory.get(name, 0.0), float(peak))
    show("compile BART-large, MAM", seconds, 1.15)
    print(
        f"{'  peak memory':<34}peftc {memory['peftc']:.2f} GiB   bare export {memory['bare export']:.2f} GiB"
    )


def training_step(runs: int) -> None:
    """Forward and backward of LoRA r = 8 at query and value, against PEFT's on the same model and batch."""
    from peft import LoraConfig, get_peft_model

    backbone = medium()
    theirs = get_peft_model(
        copy.deepcopy(backbone),
        LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj"], lora_dropout=0.0),
    ).train()
    mine = peftc.compile(backbone, "lora").train()
    inputs = batch()

    def step(model: torch.nn.Module) -> Callable[[], None]:
        def run() -> None:
            model(**inputs, use_cache=False).loss.backward()

        return run

    show(
        "training step, LoRA r=8 q,v",
        alternate({"peftc": step(mine), "peft": step(theirs)}, runs),
        1.0,
    )


@torch.no_grad()
def folded_forward(runs: int) -> None:
    """Forward of the folded LoRA model against the bare one."""
    bare = medium().eval()
    model = peftc.compile(copy.deepcopy(bare), "lora")
    for value in model.deltas.values().values():
        value.normal_(0, 0.02)
    folded, _ = peftc.merge(model)
    folded.eval()
    inputs = {k: v for k, v in batch().items() if k != "labels"}
    steps = {
        "folded": lambda: folded(**inputs, use_cache=False),
        "bare": lambda: bare(**inputs, use_cache=False),
    }
    show("forward, folded LoRA", alternate(steps, 2 * runs), 1.02)


@torch.no_grad()
def one_token(runs: int) -> None:
    """A step so small that only what surrounds the arithmetic counts: one token through twelve toy layers, and
    how much of it is fetching the parameters."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=120, hidden_size=32, num_attention_heads=4, intermediate_size=64)
    bare = BertForSequenceClassification(BertConfig(**sizes, num_hidden_layers=12)).eval()
    inputs = {name: torch.ones(1, 1, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    for method, arguments in (("lora", {"r": 8}), ("dora", {"r": 8}), ("prefix_tuning", {})):
        model = peftc.compile(copy.deepcopy(bare), peftc.load_spec(method, **arguments))
        steps = {"peftc": lambda model=model: model(**inputs), "bare": lambda: bare(**inputs)}
        seconds = alternate(steps, 20 * runs)
        show(f"one token, {method}", seconds, 1.6)
        runner, _ = model._programs.ready("forward", inputs, {})
        changes = model._programs._count
        fetched = alternate({"fetch": lambda r=runner, c=changes: r.fetch(c)}, 20 * runs)["fetch"]
        share = statistics.median(fetched) / statistics.median(seconds["peftc"])
        print(f"{'  fetching the parameters':<34}{share:.1%} of it (<= 5%)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=int, default=15, help="timed runs of each step")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    one_token(options.runs)
    training_step(options.runs)
    folded_forward(options.runs)
    compile_time(max(1, options.runs // 5))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"peak memory of this process {peak:.2f} GiB")


if __name__ == "__main__":
    main()
