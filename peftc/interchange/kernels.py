"""PEFT's adapters of convolutions: a linear's delta, as one of the matrix of the kernels."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from peftc.errors import PeftcError


class KernelError(PeftcError):
    """An adapter of a convolution that PEFT and peftc would compute as different functions."""


def require(path: str, conv: nn.Module) -> None:
    """Raise KernelError where PEFT's own convolution is none of the backbone's shape.

    `peft.tuners.lora.layer._ConvNd` passes on stride and padding alone, and A reads every group.
    """
    for name, plain in (("groups", 1), ("dilation", 1), ("padding_mode", "zeros")):
        value = getattr(conv, name, plain)
        if any(one != plain for one in (value if isinstance(value, tuple) else (value,))):
            raise KernelError(
                f"the convolution '{path}' has {name} {value}, which PEFT's adapter leaves out; "
                "train specs/lora_conv.yaml there instead"
            )


def require_product(path: str, found: Mapping[str, torch.Tensor]) -> None:
    """Raise KernelError where PEFT's tensors of a convolution make no product of matrices."""
    if "lokr_w2" in found and found["lokr_w2"].ndim == 3:  # make_kron aligns w1 from the right
        raise KernelError(
            f"'{path}': PEFT's LoKr of a Conv1d is no product of w1 and whole kernels"
        )
