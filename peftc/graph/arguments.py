"""Inputs of a model by the argument names that Hugging Face models share: their axes, and examples of them."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from transformers import PreTrainedModel

from peftc.errors import PeftcError

Tensors = Mapping[str, torch.Tensor]

IMAGE = 224  # of models whose configuration names no size, because any is theirs
# Sizes of the example that is traced: all >= 2, because export specialises 0 and 1, and all
# different, so that no two axes are taken for one.
SIZES = {"batch": 3, "seq": 11, "target": 7, "past": 5, "query": 2, "total": 7}


class CaptureError(PeftcError):
    """A model that cannot be traced to one graph."""


def axes(name: str, rank: int, entry: str, encoder_decoder: bool) -> tuple[str | None, ...]:
    """The dynamic axes of an input by the argument names that Hugging Face models share."""
    if name.startswith("past."):
        return ("batch", None, "seq" if ".cross." in name else "past", None)
    if rank == 0:
        return ()
    if name in ("pixel_values", "input_features", "input_values") or rank == 1:
        return ("batch", *(None,) * (rank - 1))
    step = "query" if entry == "decode" else "target"
    if name == "decoder_attention_mask":
        length = "total" if entry == "decode" else "target"
    elif name.startswith("decoder_") or (name == "labels" and encoder_decoder):
        length = step
    elif entry == "decode" and not encoder_decoder:
        length = "total" if name == "attention_mask" else "query"
    else:
        length = "seq"
    return ("batch", length, *(None,) * (rank - 2))


def example(
    name: str, real: torch.Tensor, entry: str, encoder_decoder: bool, more: int = 0
) -> torch.Tensor:
    """`real` with its dynamic axes repeated or cut to the traced sizes, so that its values stay valid.

    `more` is what its length has beyond the traced one: rows in front, in a cache or a state.
    """
    sizes = {**SIZES, "seq": SIZES["seq"] + more, "past": SIZES["past"] + more}
    for axis, label in enumerate(axes(name, real.ndim, entry, encoder_decoder)):
        if label is None or real.is_meta:
            continue
        if real.shape[axis] == 0:
            shape = [1 if i == axis else n for i, n in enumerate(real.shape)]
            real = real.new_zeros(shape)
        index = torch.arange(sizes[label], device=real.device) % real.shape[axis]
        real = real.index_select(axis, index)
    if real.is_meta:
        labels = axes(name, real.ndim, entry, encoder_decoder)
        shape = [sizes[a] if a else n for a, n in zip(labels, real.shape, strict=True)]
        return torch.empty(shape, dtype=real.dtype, device="meta")
    return real.detach()


def forward_flags(model: PreTrainedModel) -> dict[str, bool]:
    """What a `forward` without a cache is called with."""
    names = inspect.signature(type(model).forward).parameters
    return {"use_cache": False} if "use_cache" in names else {}


def dummy_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """Inputs for a `forward` capture when there is no real batch at hand."""
    name, device = model.main_input_name, model.device
    ids = torch.ones(SIZES["batch"], SIZES["seq"], dtype=torch.long, device=device)
    if name == "input_ids":
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    else:
        shape = (SIZES["batch"], *_features(model, name))
        inputs = {name: torch.zeros(shape, device=device, dtype=model.dtype)}
    if model.config.is_encoder_decoder and not reads_its_end(model):
        inputs["decoder_input_ids"] = ids[:, : SIZES["target"]].clone()
    return inputs


def seeded_inputs(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """One batch for a certificate, the same each time; token ids avoid the special ones at the start."""
    generator = torch.Generator().manual_seed(0)
    inputs = dummy_inputs(model)
    for name, tensor in inputs.items():
        if name.endswith("input_ids"):
            low, high = min(10, model.config.vocab_size // 2), model.config.vocab_size
            ids = torch.randint(low, high, tensor.shape, generator=generator)
            if reads_its_end(model):
                ids[ids == model.config.eos_token_id] = low
                ids[:, -1] = model.config.eos_token_id
            inputs[name] = ids.to(tensor.device)
        elif tensor.is_floating_point():
            noise = torch.randn(tensor.shape, generator=generator)
            inputs[name] = noise.to(tensor)
    if "attention_mask" in inputs:
        inputs["attention_mask"][0, -3:] = 0
    return inputs


def reads_its_end(model: PreTrainedModel) -> bool:
    """A classifier on an encoder-decoder: the decoder reads the input too, and the head its last state."""
    head = model.base_model is not model and not model.can_generate()
    return bool(model.config.is_encoder_decoder) and head and model.main_input_name == "input_ids"


def _features(model: PreTrainedModel, name: str) -> tuple[int, ...]:
    """The sizes of one image, spectrogram or wave, by what the configuration says of it."""
    config = model.config
    if name == "pixel_values":
        size = getattr(config, "image_size", None) or IMAGE
        height, width = (size, size) if isinstance(size, int) else size
        return (getattr(config, "num_channels", 3), height, width)
    if name == "input_features" and hasattr(config, "num_mel_bins"):
        return (config.num_mel_bins, 2 * config.max_source_positions)
    if name == "input_values":
        return (4000,)
    raise CaptureError(
        f"{type(model).__name__}: no example input is known for '{name}'; "
        "pass example={...} with one batch of it"
    )
