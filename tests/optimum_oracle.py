"""Bundles in optimum's layout as optimum-onnx loads them: test_optimum.py runs this where optimum is.

python optimum_oracle.py FOLDER, which holds bundles and `inputs.json`; prints what each writes or gives, by its name.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from optimum.onnxruntime import (
    ORTModelForCausalLM,
    ORTModelForSeq2SeqLM,
    ORTModelForSequenceClassification,
    ORTModelForSpeechSeq2Seq,
)

KINDS = {
    "text-generation": ORTModelForCausalLM,
    "text2text-generation": ORTModelForSeq2SeqLM,
    "automatic-speech-recognition": ORTModelForSpeechSeq2Seq,
    "text-classification": ORTModelForSequenceClassification,
}


def main() -> None:
    folder = Path(sys.argv[1])
    given = json.loads((folder / "inputs.json").read_text())
    found: dict[str, Any] = {}
    for name, one in given.items():
        model = KINDS[one["kind"]].from_pretrained(folder / name)
        inputs = {k: torch.tensor(v) for k, v in one["inputs"].items()}
        if one["kind"] == "text-classification":
            found[name] = model(**inputs).logits.tolist()
        else:
            found[name] = [model.generate(**inputs, **mode).tolist() for mode in one["modes"]]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
