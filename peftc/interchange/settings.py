"""Settings: every key of a PEFT adapter's configuration is used here, harmless, or refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peftc.errors import PeftcError

CONFIG = "adapter_config.json"
MAX_CONFIG_BYTES = 4 << 20
Config = Mapping[str, Any]


class InterchangeError(PeftcError):
    """A PEFT checkpoint that cannot be read, or deltas that PEFT has no form for."""


@dataclass(frozen=True)
class Keys:
    """What the keys of one kind of adapter mean: `used` are read, `harmless` change nothing that the tensors do not
    say, `refused` change what is computed when they are set, each with its fix."""

    used: tuple[str, ...]
    harmless: tuple[str, ...]
    refused: Mapping[str, str] = field(default_factory=dict)


# Where the adapter comes from; which modules it is at, and their layout, say the tensors and the backbone.
COMMON = (
    "peft_type",
    "peft_version",
    "auto_mapping",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)
_CHOSEN = (
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "fan_in_fan_out",
)
_WHOLE = ("task_type", "modules_to_save")
_IN_TRAINING = (
    "PEFT drops more than inputs with it while it trains, and a spec cannot; set it to 0 in the file: what the "
    "adapter computes is the same"
)
_CONVERTED = (
    "its base weights move when PEFT loads them; save it with "
    "save_pretrained(..., path_initial_model_for_weight_conversion=...), which makes an ordinary LoRA"
)
_LYCORIS = Keys(
    ("r", "alpha", "rank_pattern", "alpha_pattern", *_WHOLE),
    (
        *_CHOSEN,
        "init_weights",
        "use_effective_conv2d",
        "decompose_both",
        "decompose_factor",
        "rank_dropout_scale",
    ),
    {"rank_dropout": _IN_TRAINING, "module_dropout": _IN_TRAINING},
)
_ROWS = Keys(
    ("num_virtual_tokens", *_WHOLE),
    # The file holds the rows that all of these made.
    ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "init_weights",
     "prompt_tuning_init", "prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs",
     "encoder_reparameterization_type", "encoder_hidden_size", "encoder_num_layers", "encoder_dropout",
     "prefix_projection"),
)  # fmt: skip
KINDS: Mapping[str, Keys] = {
    "LORA": Keys(
        ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora", "lora_dropout", "bias",
         "lora_bias", "init_lora_weights", *_WHOLE),
        (*_CHOSEN, "megatron_core", "qalora_group_size", "eva_config", "corda_config", "lora_ga_config",
         "runtime_config"),
        {
            "alora_invocation_tokens": "an activated LoRA acts behind those tokens alone",
            "layer_replication": "it repeats layers of the backbone",
            "loftq_config": _CONVERTED,
            "target_parameters": "it adapts parameters that are no linear's weight",
            "trainable_token_indices": "it changes rows of the embedding",
            "megatron_config": "it splits the linears",
        },
    ),
    "IA3": Keys(_WHOLE, (*_CHOSEN, "feedforward_modules", "init_ia3_weights")),
    "VERA": Keys(
        ("vera_dropout", "bias", *_WHOLE),
        (*_CHOSEN, "r", "projection_prng_key", "save_projection", "d_initial", "init_weights"),
    ),
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS,
    "PROMPT_TUNING": _ROWS,
    "P_TUNING": _ROWS,
    "PREFIX_TUNING": _ROWS,
}  # fmt: skip
# How LoRA may have started: these leave the base weights as they are.
_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
_MOVING = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT saves these of its task models whole, and older versions do not say so.
_HEADS = {"SEQ_CLS": ("classifier", "score"), "TOKEN_CLS": ("classifier", "score"), "QUESTION_ANS": ("qa_outputs",)}  # fmt: skip


def read(directory: Path) -> Config:
    """The configuration of an adapter, every key of it checked. Raises InterchangeError."""
    file = directory / CONFIG
    if not file.is_file():
        raise InterchangeError(f"{directory} has no {CONFIG}: not a PEFT adapter")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InterchangeError(f"{file} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        config: Any = json.loads(file.read_text())
    except (ValueError, RecursionError) as error:
        raise InterchangeError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InterchangeError(f"{file} is not a PEFT configuration")
    check(config, file)
    return config


def check(config: Config, file: Path) -> None:
    """Raise InterchangeError at a key that would change what the adapter computes, and is not read."""
    kind = str(config.get("peft_type"))
    if kind not in KINDS:
        raise InterchangeError(f"{file}: {kind} has no form here; {', '.join(KINDS)} have one")
    keys = KINDS[kind]
    for key, value in config.items():
        if not value or key in (*COMMON, *keys.used, *keys.harmless):
            continue  # what is off does nothing, in versions of PEFT to come too
        fix = keys.refused.get(key, "save the adapter without it")
        raise InterchangeError(
            f"{file}: '{key}' is {_short(value)}, which peftc does not compute: {fix}"
        )
    start = config.get("init_lora_weights")
    if start not in _STARTS:
        moving = str(start).lower().startswith(_MOVING)
        fix = _CONVERTED if moving else "save the adapter with another"
        raise InterchangeError(f"{file}: 'init_lora_weights' is {_short(start)}: {fix}")


def whole_modules(config: Config) -> tuple[str, ...]:
    """What the names of modules that are saved whole end with. Raises InterchangeError."""
    said = config.get("modules_to_save") or ()
    if not isinstance(said, list | tuple) or not all(isinstance(one, str) for one in said):
        raise InterchangeError(
            f"{CONFIG}: 'modules_to_save' is {_short(said)}, not a list of names"
        )
    return (*said, *_HEADS.get(str(config.get("task_type")), ()))


def rate(config: Config) -> float:
    """How much of the input the adapter drops while it trains. Raises InterchangeError."""
    found = config.get("lora_dropout", config.get("vera_dropout")) or 0.0
    if not isinstance(found, int | float) or not 0 <= found < 1:
        raise InterchangeError(
            f"{CONFIG}: a dropout of {_short(found)} is no rate from 0 to below 1"
        )
    return float(found)


def patterns(config: Config, key: str) -> tuple[tuple[str, Any], ...]:
    """`rank_pattern` or `alpha_pattern` as rows. Raises InterchangeError."""
    found = config.get(key) or {}
    if not isinstance(found, dict):
        raise InterchangeError(f"{CONFIG}: '{key}' is {_short(found)}, not a table")
    return tuple(found.items())


def _short(value: object) -> str:
    return repr(value)[:60]
