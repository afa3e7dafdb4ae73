"""The same under two hash seeds: plans, printed graphs, names of deltas, saved bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
SCRIPT = """
import hashlib, sys, tempfile
from pathlib import Path
from conftest import batch, logits, stir, tiny
from methods import spec
import peftc
from peftc.driver import Trace
from peftc.merging import merge
from peftc.rewrite.text import subject_text

CASES = (("bert", ("mam", "compacter", "vera", "head")), ("gpt2", ("oft", "lora")))

def line(name, value):
    print(name, hashlib.sha256(value if isinstance(value, bytes) else str(value).encode()).hexdigest())

for family, methods in CASES:
    seen = []
    trace = Trace(after=lambda name, subject: seen.append((name, subject_text(subject))))
    model = stir(peftc.compile(tiny(family), [spec(one) for one in methods], trace=trace))
    logits(model, batch(model))
    merged, report = merge(model, trace=trace)
    for name, text in seen:
        line(f"{family} {methods} {name}", text)
    line("plan", [(e.name, e.path, [p.path for p in e.parameters]) for e in model.plan.edits])
    line("deltas", list(model.deltas.values()))
    line("outcomes", report.outcomes)
    for stored in (False, True):
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder, stored=stored)
            for file in sorted(Path(folder).iterdir()):
                line(file.name, file.read_bytes())
"""


def test_two_hash_seeds_agree() -> None:
    path = os.pathsep.join([str(HERE), *filter(None, sys.path)])
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            text=True,
        )
        for seed in ("0", "1")
    ]
    one, other = (run.communicate()[0].splitlines() for run in runs)
    assert all(run.returncode == 0 for run in runs)
    assert len(one) > 20 and one == other
