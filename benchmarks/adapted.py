"""The same adapter in PEFT and here, on the models of `measured`.

The adapters are PEFT's own: built by PEFT, saved, and imported, so that both sides compute one function.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from measured import MODELS, bare
from peft import IA3Config, LoraConfig, PeftConfig, PrefixTuningConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

import peftc
from peftc.interchange.read import import_peft

_QV = {"llama": ["q_proj", "v_proj"], "gpt2": ["c_attn"], "bart": ["q_proj", "v_proj"]}
_ALL = {
    "llama": [*_QV["llama"], "k_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "bart": [*_QV["bart"], "k_proj", "out_proj", "fc1", "fc2"],
}
_SCALED = {"llama": ["k_proj", "v_proj"], "gpt2": ["c_attn"], "bart": ["k_proj", "v_proj"]}
_FEEDS = {"llama": ["down_proj"], "gpt2": ["mlp.c_proj"], "bart": ["fc2"]}


def _lora(targets: Mapping[str, list[str]], **more: Any) -> Callable[[str], PeftConfig]:
    return lambda name: LoraConfig(
        r=8,
        lora_alpha=16,
        target_modules=targets[name],
        lora_dropout=0.0,
        fan_in_fan_out=name == "gpt2",
        **more,
    )


def _ia3(name: str) -> PeftConfig:
    return IA3Config(
        target_modules=[*_SCALED[name], *_FEEDS[name]],
        feedforward_modules=_FEEDS[name],
        fan_in_fan_out=name == "gpt2",
    )


@dataclass(frozen=True)
class Adapter:
    """A row: PEFT's configuration for a model, and the models that it is measured on."""

    config: Callable[[str], PeftConfig]
    models: tuple[str, ...] = tuple(MODELS)


ADAPTERS = {
    "lora q,v": Adapter(_lora(_QV)),
    "lora all linears": Adapter(_lora(_ALL)),
    "dora q,v": Adapter(_lora(_QV, use_dora=True)),
    "ia3": Adapter(_ia3),
    "prefix": Adapter(
        lambda _: PrefixTuningConfig(num_virtual_tokens=30, task_type="CAUSAL_LM"), ("gpt2",)
    ),
}


def pair(name: str, adapter: str, **changes: Any) -> dict[str, nn.Module]:
    """A model with an adapter in PEFT, and the same adapter here; deltas of both in the type of the weights."""
    backbone = bare(name, **changes)
    config = ADAPTERS[adapter].config(name)
    theirs = get_peft_model(copy.deepcopy(backbone), config, autocast_adapter_dtype=False).eval()
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        ours = import_peft(folder, backbone)
    return {"peft": theirs, "ours": ours}


def mam(name: str, stored: bool, **changes: Any) -> PreTrainedModel:
    """The paper's MAM, while training or with its constants evaluated."""
    model = peftc.compile(bare(name, **changes), "mam")
    if not stored:
        return model
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, stored=True)
        return peftc.load(folder, backbone=peftc.detach(model))
