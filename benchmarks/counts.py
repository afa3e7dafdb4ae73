"""Counts, which are the same on every machine: kernels, views, FLOPs, saved bytes and peak memory, side by side.

python benchmarks/counts.py [--write] [--only ADAPTER]
python benchmarks/counts.py --passes   # ours with each pass off in turn
python benchmarks/counts.py --adapterhub PYTHON   # AdapterHub's, by a Python that has `adapters`
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adapted
import measured
import torch
import transformers
from counted import Counts, step, training
from torch import nn

import peftc
from passes import LEAN


def rows(only: str = "") -> dict[str, Counts]:
    """Every row, by model / what / adapter / side; or those of one adapter."""
    found: dict[str, Counts] = {}
    for name in measured.MODELS:
        found[f"{name} / step / bare"] = step(measured.bare(name), name)
        for adapter, row in adapted.ADAPTERS.items():
            if name not in row.models or only not in adapter:
                continue
            for side, model in adapted.pair(name, adapter).items():
                found[f"{name} / step / {adapter} / {side}"] = step(model, name)
                for kind in ("full", "padded"):
                    label = f"{name} / training, {kind} / {adapter} / {side}"
                    found[label] = training(model, name, kind == "padded")
        if not only:
            found[f"{name} / step / mam stored / ours"] = step(adapted.mam(name, True), name)
    return found


# What the passes are for: an adapter unfolded, one whose weight is computed, and a prefix with adapters.
OFF = ("lora", "dora", "mam")


def without_passes() -> dict[str, Counts]:
    """Kernels and saved bytes of a padded batch, ours without each pass that makes graphs lean, and with all of them, by
    model / method / pass."""
    found: dict[str, Counts] = {}
    for name in measured.MODELS:
        for method in OFF:
            for off in ("all on", *(one.name for one in LEAN)):
                model = peftc.compile(
                    measured.bare(name), method, without=() if off == "all on" else (off,)
                )
                label = f"{name} / {method} / " + (off if off == "all on" else f"without {off}")
                inputs = measured.batch(name, padded=True)
                run = measured.training_step(model, inputs)
                run()
                found[label] = {
                    "training": measured.kernels(run)[0],
                    "saved bytes": measured.saved_bytes(model, inputs),
                    "evaluation": evaluation(model, inputs),
                }
    return found


def evaluation(model: nn.Module, inputs: Mapping[str, Any]) -> int:
    """Kernels of a forward in evaluation."""
    model.eval()

    @torch.no_grad()
    def run() -> None:
        model(**inputs, use_cache=False)

    run()
    return measured.kernels(run)[0]


def changed(found: Mapping[str, Counts]) -> str:
    """The rows in which a pass changes something, as a Markdown table: evaluation and training kernels, saved MB."""
    lines = ["| | evaluation | training | saved MB |", "|---|---|---|---|"]
    shown = ("evaluation", "training", "saved bytes")
    for label, one in found.items():
        whole = found[label.rpartition(" / ")[0] + " / all on"]
        if one is whole or any(one[k] != whole[k] for k in shown):
            lines.append(
                f"| {label} | {one['evaluation']} | {one['training']} | {one['saved bytes'] / 1e6:.1f} |"
            )
    return "\n".join(lines)


def table(found: Mapping[str, Counts]) -> str:
    lines = [f"{'':<52}{'kernels':>9}{'views':>7}{'MFLOP':>9}{'saved MB':>10}{'peak MB':>9}"]
    for label, one in found.items():
        saved, peak = (
            f"{one[k] / 1e6:.2f}" if k in one else "" for k in ("saved bytes", "peak bytes")
        )
        lines.append(
            f"{label:<52}{one['kernels']:>9}{one['views']:>7}{one['flops'] / 1e6:>9.1f}{saved:>10}{peak:>9}"
        )
    return "\n".join(lines)


def difference(old: Mapping[str, Counts], new: Mapping[str, Counts]) -> list[str]:
    """What changed, a line each; peak memory depends on the allocator and is left out."""
    lines = []
    for label in sorted({*old, *new}):
        before, after = old.get(label, {}), new.get(label, {})
        for what in sorted({*before, *after} - {"peak bytes"}):
            if before.get(what) != after.get(what):
                lines.append(f"{label}: {what} {before.get(what)} -> {after.get(what)}")
    return lines


def over(found: Mapping[str, Counts]) -> list[str]:
    """Rows in which ours is heavier than PEFT's same adapter."""
    lines = []
    for label, one in found.items():
        theirs: Any = found.get(label.removesuffix("ours") + "peft")
        if label.endswith("/ ours") and theirs:
            for what in ("kernels", "flops", "saved bytes"):
                if one.get(what, 0) > theirs.get(what, 0):
                    lines.append(f"OVER  {label}: {what} {one[what]} > {theirs[what]}")
    return lines


def adapterhub(python: str) -> dict[str, Any]:
    """AdapterHub's rows, each beside its own transformers' bare model, by the script that runs there."""
    script = Path(__file__).with_name("adapterhub.py")
    done = subprocess.run([python, script], capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{python} {script} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="write results/counts.json")
    parser.add_argument("--only", default="", help="rows of adapters whose name has this text")
    parser.add_argument("--passes", action="store_true", help="ours, each pass off in turn")
    parser.add_argument("--adapterhub", metavar="PYTHON", help="count what its `adapters` do")
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if options.passes:
        without = without_passes()
        print(changed(without))
        if options.write:
            measured.write("passes", without)
        return
    if options.adapterhub:
        theirs = adapterhub(options.adapterhub)
        print(", ".join(f"{name} {version}" for name, version in theirs["versions"].items()))
        print(table(theirs["rows"]))
        if options.write:
            measured.write("adapterhub", theirs)
        return
    found = rows(options.only)
    print(table(found))
    path = measured.RESULTS / "counts.json"
    if path.is_file():
        known = json.loads(path.read_text())
        if options.only:
            known = {label: one for label, one in known.items() if label in found}
        lines = difference(known, found)
        print("\n".join(lines) if lines else "as committed")
    print("\n".join(over(found)) or "nowhere heavier than PEFT")
    if options.write and not options.only:
        measured.write("counts", found)


if __name__ == "__main__":
    main()
