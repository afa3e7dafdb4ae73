"""The second oracle: AdapterHub's `adapters`, run by test_adapters_parity.py in an environment of its own.

    python adapters_oracle.py FOLDER

`adapters` 1.3.0 needs a transformers that peftc does not support, so the two meet in files only. Each folder
in FOLDER is one case. It holds

    case.json             {"model": a class, "config": a class, "fields": of that config, "adapter": see `build`}
    weights.safetensors   the model's state dict
    inputs.safetensors    arguments of the model, named BATCH.ARGUMENT

and is given

    adapter.safetensors   the adapter's weights, under the names that `adapters` gives them
    logits.safetensors    BATCH.bare and BATCH.adapted, without and with the adapter
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import adapters
import torch
import transformers
from safetensors.torch import load_file, save_file


def model_of(
    case: dict[str, Any], weights: dict[str, torch.Tensor]
) -> transformers.PreTrainedModel:
    """The same model under this transformers: of the config's fields those that both versions have.

    Eager attention, because prefix tuning in `adapters` 1.3.0 is wrong under SDPA: a causal mask that SDPA
    infers starts at the first prefix key, and a boolean mask is extended by "do not attend".
    """
    config_class = getattr(transformers, case["config"])
    known = config_class().to_dict()
    fields = {name: value for name, value in case["fields"].items() if name in known}
    config = config_class.from_dict(fields, attn_implementation="eager")
    model = getattr(transformers, case["model"])(config)
    model.load_state_dict(weights)
    assert model.config._attn_implementation == "eager"
    return model.eval()


def build(adapter: dict[str, Any]) -> adapters.AdapterConfig:
    """A configuration from its class and arguments; an argument may be a configuration too."""
    arguments = {k: build(v) if isinstance(v, dict) else v for k, v in adapter.items()}
    return getattr(adapters, arguments.pop("class"))(**arguments)


def attach(model: transformers.PreTrainedModel, adapter: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Add the adapter with weights of some size, by a seed; returns them.

    What starts at one, as IA3's scales do, stays positive.
    """
    before = {name for name, _ in model.named_parameters()}
    adapters.init(model)
    model.add_adapter("delta", config=build(adapter))
    model.set_active_adapters("delta")
    model.eval()
    added = {name: p for name, p in model.named_parameters() if name not in before}
    torch.manual_seed(2)
    with torch.no_grad():
        for value in added.values():
            value.add_(torch.empty_like(value).uniform_(-0.5, 0.5))
    return {name: value.detach() for name, value in added.items()}


def logits(
    model: transformers.PreTrainedModel, inputs: dict[str, torch.Tensor], kind: str
) -> dict[str, torch.Tensor]:
    """BATCH.kind for every batch of `inputs`."""
    found = {}
    for batch in {name.partition(".")[0] for name in inputs}:
        mine = {k.partition(".")[2]: v for k, v in inputs.items() if k.startswith(f"{batch}.")}
        with torch.no_grad():
            found[f"{batch}.{kind}"] = model(**mine).logits
    return found


def answer(folder: Path) -> None:
    case = json.loads((folder / "case.json").read_text())
    inputs = load_file(folder / "inputs.safetensors")
    model = model_of(case, load_file(folder / "weights.safetensors"))
    found = logits(model, inputs, "bare")
    save_file(attach(model, case["adapter"]), folder / "adapter.safetensors")
    save_file(found | logits(model, inputs, "adapted"), folder / "logits.safetensors")


if __name__ == "__main__":
    for path in sorted(Path(sys.argv[1]).iterdir()):
        answer(path)
