"""PEFT's prompts and prefixes: one table of rows, read as a prompt at the embedding or keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from transformers import PreTrainedModel

from peftc.errors import PeftcError
from peftc.graph.facts import ModelFacts, token_table
from peftc.language.reader import load_spec
from peftc.language.spec import Spec
from peftc.model.compiled import CompiledModel

ROWS = "prompt_embeddings"
_PROMPTS = ("PROMPT_TUNING", "P_TUNING")


class RowsError(PeftcError):
    """Rows of a PEFT adapter that this backbone has no place for."""


def spec(config: Mapping[str, Any], table: torch.Tensor, backbone: PreTrainedModel) -> Spec:
    """The spec that `prompt_embeddings` fits. Raises RowsError.

    Prompt and p-tuning: [l, d]; of an encoder-decoder [2 l, d], of which PEFT uses the first l. Prefix
    tuning: [l, layers * 2 * kv_heads * head_dim], each layer's keys before its values.
    """
    kind, length = config.get("peft_type"), config.get("num_virtual_tokens")
    if kind not in (*_PROMPTS, "PREFIX_TUNING"):
        raise RowsError(f"'{ROWS}' of a {kind} adapter has no form here")
    if not isinstance(length, int) or not 0 < length <= len(table):
        raise RowsError(f"'num_virtual_tokens' is {length}, and '{ROWS}' has {len(table)} rows")
    if kind in _PROMPTS:
        return load_spec("prompt_tuning", l=length)
    if ModelFacts.read(backbone).encoder_decoder:
        raise RowsError(
            "PEFT's prefix of an encoder-decoder is the decoder's self-attention alone, with positions "
            "that its decoder does not take; train specs/prefix_tuning.yaml instead"
        )
    # The rows are a cache there, so the tokens stand behind them.
    direct = load_spec("prefix_direct", l=length)
    shifted = (
        replace(entry, method="prefix_tuning", positions="shift") for entry in direct.entries
    )
    title = (
        "Imported from a PEFT adapter: one prefix of the self-attention, positions moved behind it"
    )
    return replace(
        direct, name="prefix_tuning", title=title, entries=tuple(shifted), text="", path=""
    )


def fill(model: CompiledModel, table: torch.Tensor) -> None:
    """Copy the rows to the deltas of a model that was compiled with their spec. Raises RowsError."""
    slots = model.deltas.values()
    places = [(p.name, slots[p.path]) for edit in model.plan.edits for p in edit.parameters]
    if places[0][0] == "P":  # PEFT puts its rows behind the scale that some embeddings have
        (_, slot), scale = places[0], getattr(token_table(model), "embed_scale", 1.0)
        values = [table[: len(slot)] / scale]
    else:
        heads, length, size = places[0][1].shape
        layers = table.shape[1] // (heads * size) if table.ndim == 2 else 0
        if tuple(table.shape) != (length, layers * heads * size) or layers != len(places):
            raise RowsError(
                f"'{ROWS}' has the shape {list(table.shape)}; {len(places) // 2} layers of {heads} heads "
                f"of {size} need [{length}, {len(places) * heads * size}]"
            )
        values = list(table.view(length, layers, heads, size).permute(1, 2, 0, 3))
    with torch.no_grad():
        for (_, slot), value in zip(places, values, strict=True):
            if value.shape != slot.shape:
                raise RowsError(
                    f"'{ROWS}' has rows {list(value.shape)}, and this backbone takes {list(slot.shape)}"
                )
            slot.copy_(value)
