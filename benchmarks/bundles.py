"""Bundles, side by side in one run: what peftc exports beside the bare model's own bundle, and torch.

BART-large's size with MAM (random weights, 512 source tokens, 32 greedy tokens, batch 1) and a Llama of 8 layers at
d = 512 (64 + 32 tokens), in fp32 and int4. Times are medians of paired ratios. Each export runs in a process of its
own, which says how long it took, what is compared apart, beside the seconds that torch's two exporters alone take to
write the same graphs to files; so does whoever loads a bundle and writes with it, which says how much memory that took at most. Written to
results/bundles.json.

python benchmarks/bundles.py [--size real|toy] [--pairs 30] [--seconds 60] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import adapted
import measured
import onnx_ir as ir
import torch
import transformers
from paired import Row, measure

import peftc
from peftc.export import bundle as making

LLAMA = dict(vocab_size=8000, num_hidden_layers=8, tie_word_embeddings=True)


@dataclass(frozen=True)
class Given:
    """A model of `measured.MODELS`, changed, and the tokens that it is given and writes. Its table of tokens is so many
    times as `wide`: a tied one then decides the next token, as a trained model does; int4 is refused where nothing is."""

    name: str
    changes: Mapping[str, Any]
    length: int
    tokens: int
    wide: float = 1.0

    def bare(self) -> Any:
        model = measured.bare(self.name, **self.changes)
        with torch.no_grad():
            model.get_input_embeddings().weight.mul_(self.wide)
        return model

    def mam(self) -> Any:
        return adapted.mam(self.name, False, **self.changes)

    def writing(self, model: Any) -> Any:
        inputs = measured.batch(self.name, rows=1, length=self.length)
        return measured.generating(model, inputs, self.tokens)


GIVEN = {
    "real": (
        Given("bart", measured.SIZES["real"].models["bart"], 512, 32),
        Given("llama", LLAMA, 64, 32, wide=10.0),
    ),
    "toy": tuple(
        Given(name, changes, 8, 4) for name, changes in measured.SIZES["toy"].models.items()
    ),
}


def own_process(task: str, **said: Any) -> dict[str, float]:
    """What `alone` finds in a process of its own."""
    command = [
        sys.executable,
        "-W",
        "ignore",
        __file__,
        "--alone",
        json.dumps({"task": task, **said}),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def alone(said: Mapping[str, Any]) -> dict[str, float]:
    """One export, or one bundle that writes, and what it took."""
    given = next(one for one in GIVEN[said["size"]] if one.name == said["name"])
    found = exported(given, **said) if said["task"] == "export" else {}
    if said["task"] == "write":
        given.writing(peftc.runtime.load(said["bundle"]))()
    return found | {"peak": peak()}


def peak() -> int:
    """The most bytes that this process has held, what it maps of files among it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def exported(
    given: Given, bundle: str, adds: bool, quantize: str | None, **_: Any
) -> dict[str, float]:
    model, seconds, saving = given.mam() if adds else given.bare(), [0.0], [0.0]
    real = making.to_onnx

    def timed(*args: Any) -> Any:
        """What torch's exporters do, and the file that they would write."""
        start = time.perf_counter()
        made = real(*args)
        middle = time.perf_counter()
        with tempfile.TemporaryDirectory(dir=Path(bundle).parent) as folder:
            ir.save(made, Path(folder) / "model.onnx", external_data="model.onnx.data")
        end = time.perf_counter()
        seconds[0] += end - start
        saving[0] += end - middle
        return made

    making.to_onnx = timed
    start = time.perf_counter()
    parity = making.export(model, bundle, quantize=quantize)
    manifest = json.loads((Path(bundle) / "peftc.json").read_text())
    proof = manifest["fold"]["seconds"] + sum(one.seconds for one in parity)
    return {
        "seconds": time.perf_counter() - start - proof - saving[0],
        "exporters alone": seconds[0],
        "certificate": proof,
        "weights": sum(one.nbytes for one in model.parameters()),
    }


def of(given: Given, size: str, folder: Path, clock: Any) -> dict[str, Any]:
    """The rows of one model."""
    found: dict[str, Any] = {}
    kinds = {"bare": (False, None), "mam": (True, None)}
    if given.name == "llama":
        kinds = {"bare": (False, None), "int4": (False, "int4")}
    said = {"size": size, "name": given.name}
    for kind, (adds, quantize) in kinds.items():
        one = own_process("export", bundle=str(folder / kind), adds=adds, quantize=quantize, **said)
        one["peak / weights"] = one["peak"] / one["weights"]
        one["seconds / alone"] = one["seconds"] / one["exporters alone"]
        written = own_process("write", bundle=str(folder / kind), **said)["peak"]
        stored = sum(file.stat().st_size for file in (folder / kind).iterdir())
        found[f"{given.name}: bundle {kind}"] = {**one, "writing peak": written, "stored": stored}
        print(
            f"{given.name}: export {kind}: {one['seconds']:.1f} s, {one['seconds / alone']:.2f} of the exporters alone, "
            f"certificate {one['certificate']:.1f} s, peak {one['peak / weights']:.2f} of the weights; "
            f"writing {written / 2**30:.2f} GiB, {stored / 2**20:.0f} MiB",
            flush=True,
        )
    if clock is None:
        return found
    ways = {kind: given.writing(peftc.runtime.load(folder / kind)) for kind in kinds}
    bare = given.bare()
    rows = [(("bare bundle", ways["bare"]), ("bare torch", given.writing(bare)), 0.5, bare)]
    if given.name == "bart":
        model = given.mam()
        rows += [
            (("mam bundle", ways["mam"]), ("bare bundle", ways["bare"]), 1 / 0.9, bare),
            (("mam bundle", ways["mam"]), ("bare torch", given.writing(bare)), 1 / 2.0, bare),
            (("mam bundle", ways["mam"]), ("unfolded torch", given.writing(model)), 1 / 2.6, model),
        ]
        assert torch.equal(ways["mam"](), given.writing(model)()), "tokens differ"
    else:
        rows += [(("int4 bundle", ways["int4"]), ("fp32 bundle", ways["bare"]), 1.0, bare)]
    assert torch.equal(ways["bare"](), given.writing(bare)()), "tokens differ"
    for mine, other, bound, moved in rows:
        row = Row(f"{given.name}: write", dict((mine, other)), bound, (moved,))
        found[f"{row.what}, {mine[0]} / {other[0]}"] = clock(row)
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=GIVEN, default="real")
    parser.add_argument(
        "--pairs", type=int, default=30, help="pairs of each row, at least; 0: exports alone"
    )
    parser.add_argument("--seconds", type=float, default=60, help="time for a row, at most")
    parser.add_argument("--out", type=Path, help="where the figures go")
    parser.add_argument("--alone", help=argparse.SUPPRESS)
    asked = parser.parse_args(arguments)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    if asked.alone:
        print(json.dumps(alone(json.loads(asked.alone))))
        return
    found: dict[str, Any] = {}
    for given in GIVEN[asked.size]:
        with tempfile.TemporaryDirectory() as folder:
            found |= of(
                given,
                asked.size,
                Path(folder),
                partial(measure, pairs=asked.pairs, seconds=asked.seconds) if asked.pairs else None,
            )
        data = {"machine": measured.machine(), "rows": found}
        if asked.out is not None:
            asked.out.write_text(json.dumps(data, indent=1) + "\n")
        elif asked.size == "real":
            measured.write("bundles", data)


if __name__ == "__main__":
    main()
