"""Tolerance: how far apart two ways to compute the same may be: folded and unfolded, ONNX and torch."""

from __future__ import annotations

from collections.abc import Mapping

import torch

# A share of the largest output. float32: sums in another order over the depth of a model, about 5e-6 at worst on
# the families of the tests, and a wrong fold is far above. The half types round every weight and every activation:
# 32 roundings of one number (2**-8, 2**-11), of which T5's unscaled attention takes 16. Models of float64 have
# norms and softmaxes in float32.
SHARES: Mapping[torch.dtype, float] = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 2**-6,
    torch.bfloat16: 2**-3,
}


def tolerance(scale: float, dtype: torch.dtype = torch.float32) -> float:
    """The largest difference of outputs of type `dtype`, whose largest is `scale`, that is rounding."""
    return SHARES.get(dtype, SHARES[torch.float32]) * scale
