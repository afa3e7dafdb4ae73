"""`peftc export` and `peftc run`: an ONNX bundle, and text through it by ONNX Runtime."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from peftc.cli import directories, options
from peftc.cli.console import say, step
from peftc.export import bundle
from peftc.export.fused import FUSED
from peftc.export.layouts import LAYOUTS
from peftc.export.precision import PRECISIONS, QUANTIZED
from peftc.store.directory import read_manifest


def export(
    directory: Annotated[
        Path, typer.Argument(metavar="DIR|HF_DIR", help="Deltas, or an ordinary checkpoint.")
    ],
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="BUNDLE", help="A new directory.")
    ],
    opset: Annotated[
        int | None, typer.Option("--opset", help="ONNX opset: 23, or 20 where ops are fused.")
    ] = None,
    precision: Annotated[
        str, typer.Option("--precision", metavar="|".join(PRECISIONS), help="What it computes in.")
    ] = "fp32",
    quantize: Annotated[
        str | None,
        typer.Option("--quantize", metavar="|".join(QUANTIZED), help="Matrices in whole numbers."),
    ] = None,
    layout: Annotated[
        str, typer.Option("--layout", metavar="|".join(LAYOUTS), help="Files, and names in them.")
    ] = "peftc",
    fuse: Annotated[
        str | None,
        typer.Option("--fuse", metavar="|".join(FUSED), help="A provider's own attention."),
    ] = None,
    model: options.Backbone = None,
) -> None:
    """Write an ONNX bundle that `peftc run` and ONNX Runtime serve.

    \b
    peftc export lora-my-bert -o bundle
    peftc export merged -o bundle --opset 20
    peftc export merged -o small --quantize int4
    peftc export merged -o other --layout optimum
    peftc export merged -o for-gpus --precision fp16 --fuse cuda
    """
    directories.new_directory(output)
    compiled = directories.model_of(directory, model)
    made: dict[str, Any] = {
        "tokenizer": directories.tokenizer(directory, compiled),
        "processor": directories.processor(directory, compiled),
    }
    start = time.perf_counter()
    with step("exporting") as progress:
        parity = bundle.export(
            compiled,
            output,
            opset=opset,
            precision=precision,
            quantize=quantize,
            layout=layout,
            fuse=fuse,
            progress=progress,
            **made,
        )
    manifest = read_manifest(output, ())
    whole = time.perf_counter() - start
    proof = manifest["fold"]["seconds"] + sum(one.seconds for one in parity)
    for one in parity:
        say(
            f"{one.graph}: max |ONNX - torch| = {one.error:.3g} "
            f"in {one.cases} cases (at most {one.tolerance:.1e})"
        )
        if one.agreement < 1 or one.divergence > 1e-6:
            say(f"{one.graph}: {one.agreement:.1%} of choices are torch's, KL {one.divergence:.2g}")
    for role, ops in manifest.get("fused", {}).items():
        if role != "for":
            say(f"{role}: fused {ops}")
    size = sum(one.stat().st_size for one in output.rglob("*") if one.is_file())
    say(f"exported in {whole - proof:.1f} s, certified in {proof:.1f} s")
    say(f"wrote {output} ({size:,} bytes)")
