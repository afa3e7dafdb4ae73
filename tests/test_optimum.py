"""Bundles in optimum's layout: the graphs, what is refused, and (slow) optimum itself, which writes the same tokens.

optimum-onnx wants an older transformers, so it runs in an environment of its own (optimum_oracle.py), made anew unless
PEFTC_OPTIMUM_PYTHON names a Python that has it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, Run, batch, logits, stir, tiny

import peftc
from peftc.errors import PeftcError
from peftc.export.bundle import verified
from peftc.runtime import RuntimeFault

PACKAGES = ("torch", "optimum==2.1.0", "optimum-onnx==0.1.0", "transformers==4.57.6", "onnxruntime")
MODES = [
    dict(max_new_tokens=8, do_sample=False),
    dict(max_new_tokens=8, do_sample=False, num_beams=3, length_penalty=2.0),
]
# The kind that a family is of, by the methods that optimum is given.
KINDS = {
    "bart": "text2text-generation",
    "t5": "text2text-generation",
    "whisper": "automatic-speech-recognition",
    "gpt2": "text-generation",
    "llama": "text-generation",
    "roberta": "text-classification",
}


@pytest.mark.slow
@pytest.mark.parametrize("family", KINDS)
def test_graphs_and_names(family: str, tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny(family), "houlsby_adapter"))
    parity = peftc.export(model, tmp_path / "b", layout="optimum")
    manifest = json.loads((tmp_path / "b" / "peftc.json").read_text())
    names = [one.graph for one in parity]
    if "2" not in KINDS[family] and "speech" not in KINDS[family]:
        assert names == ["model"]
        assert peftc.runtime.load(tmp_path / "b")  # the names of our own
        return
    assert names == ["encoder_model", "decoder_model", "decoder_with_past_model"]
    first, step = (manifest["graphs"][name] for name in names[1:])
    assert (
        "encoder_hidden_states" in first["inputs"] and "present.1.encoder.value" in first["outputs"]
    )
    held = [one for one in step["inputs"] if one.startswith("past_key_values.0.")]
    parts = ("decoder.key", "decoder.value", "encoder.key", "encoder.value")
    assert held == [f"past_key_values.0.{part}" for part in parts]
    assert not any("encoder" in one for one in step["outputs"])
    with pytest.raises(RuntimeFault, match="is in the layout of optimum, which runs it"):
        peftc.runtime.load(tmp_path / "b")
    again = {one.graph: fault for one, fault in verified(model, tmp_path / "b", full=True)}
    assert again == dict.fromkeys(names, "")


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("family", "method"), [("bart", "mam"), ("gpt2", "prefix_tuning"), ("llama", "prompt_tuning")]
)
def test_what_stands_in_a_cache_is_refused(family: str, method: str, tmp_path: Path) -> None:
    model = peftc.compile(tiny(family), method)
    with pytest.raises(PeftcError, match="optimum starts to write from an empty cache"):
        peftc.export(model, tmp_path / "b", layout="optimum")
    assert not (tmp_path / "b").exists()


@pytest.mark.slow
def test_from_the_command_line(run: Run, tmp_path: Path) -> None:
    tiny("bart").save_pretrained(tmp_path / "m")
    bundle = tmp_path / "b"
    assert run("export", tmp_path / "m", "-o", bundle, "--layout", "optimum")[0] == 0
    code, out, _ = run("verify", bundle, "-m", tmp_path / "m")
    assert code == 0 and "decoder_with_past_model against torch, now" in out


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has optimum."""
    if given := os.environ.get("PEFTC_OPTIMUM_PYTHON"):
        return given
    folder = tmp_path_factory.mktemp("optimum")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    made = str(folder / "bin" / "python")
    install = [made, "-m", "pip", "install", "--quiet"]
    pinned = (ROOT / "constraints.txt").read_text()
    torch_alone = next(line for line in pinned.splitlines() if line.startswith("torch=="))
    for packages in ([torch_alone], [torch_alone, *PACKAGES[1:]]):
        subprocess.run([*install, *packages], check=True)
    return made


@pytest.mark.slow
def test_optimum_writes_the_same(python: str, tmp_path: Path) -> None:
    given: dict[str, Any] = {}
    want: dict[str, Any] = {}
    for family, kind in KINDS.items():
        model = stir(peftc.compile(tiny(family), "houlsby_adapter"))
        peftc.export(model, tmp_path / family, layout="optimum")
        inputs = batch(model, "left" if kind == "text-generation" else "right")
        inputs.pop("decoder_input_ids", None)
        if kind == "text-classification":
            want[family] = logits(model, inputs).tolist()
        else:
            want[family] = [model.generate(**inputs, **mode).tolist() for mode in MODES]
        numbers = {k: v.tolist() for k, v in inputs.items()}
        given[family] = {"kind": kind, "inputs": numbers, "modes": MODES}
    (tmp_path / "inputs.json").write_text(json.dumps(given))
    script = Path(__file__).parent / "optimum_oracle.py"
    command = [python, "-W", "ignore", str(script), str(tmp_path)]
    run = subprocess.run(command, check=True, capture_output=True, text=True)
    got = json.loads(run.stdout.splitlines()[-1])
    for family, kind in KINDS.items():
        if kind == "text-classification":  # float32, two layers
            assert torch.allclose(torch.tensor(got[family]), torch.tensor(want[family]), atol=1e-5)
        else:
            assert got[family] == want[family], family
