"""Counts of AdapterHub's `adapters`, as JSON: python adapterhub.py, in an environment that has it.

`adapters` 1.3.0 needs a transformers that peftc does not support, so each row stands beside the bare model under that
transformers. `counts.py --adapterhub PYTHON` starts it.
"""

from __future__ import annotations

import json

import adapters
import measured
import torch
import transformers
from counted import step, training

METHODS = {
    "lora q,v": lambda: adapters.LoRAConfig(r=8, alpha=16),
    "ia3": adapters.IA3Config,
    "prefix": lambda: adapters.PrefixTuningConfig(prefix_length=30),
    "mam": adapters.MAMConfig,
}


def main() -> None:
    torch.set_num_threads(1)
    found = {}
    for name in measured.MODELS:
        found[f"{name} / step / bare"] = step(measured.bare(name), name)
        for method, config in METHODS.items():
            model = measured.bare(name)
            adapters.init(model)
            model.add_adapter("delta", config=config())
            model.train_adapter("delta")  # the backbone is frozen, the adapter is used
            model.eval()
            found[f"{name} / step / {method}"] = step(model, name)
            found[f"{name} / training, full / {method}"] = training(model, name, False)
    versions = {"adapters": adapters.__version__, "transformers": transformers.__version__}
    print(json.dumps({"versions": versions, "rows": found}))


if __name__ == "__main__":
    main()
