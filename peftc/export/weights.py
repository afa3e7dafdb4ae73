"""One weights file for all graphs of a bundle: equal tensors are stored once."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from peftc.export.graph import quiet

DATA = "model.onnx.data"
_SMALL, _ALIGN = 1024, 4096
_PLAIN = (np.float32, np.float16)


def write_models(models: Mapping[str, Any], directory: Path) -> int:
    """Write `ROLE.onnx` for each onnx_ir Model and their shared data file; returns the bytes of data."""
    import onnx_ir as ir

    places: dict[tuple[bytes, int], int] = {}
    offset = 0
    with (directory / DATA).open("wb") as file:
        for model in models.values():
            for value in model.graph.initializers.values():
                tensor = value.const_value
                if tensor is None or tensor.nbytes < _SMALL:
                    continue
                content = _content(tensor)
                key = (hashlib.sha256(content).digest(), len(content))
                if key not in places:
                    offset += file.write(b"\0" * (-offset % _ALIGN))
                    places[key] = offset
                    offset += file.write(content)
                value.const_value = ir.ExternalTensor(
                    DATA,
                    places[key],
                    len(content),
                    tensor.dtype,
                    shape=tensor.shape,
                    name=value.name,
                    base_dir=directory,
                )
    with quiet():
        for role, model in models.items():
            ir.save(model, directory / f"{role}.onnx")
    return offset


def laid_out(array: NDArray[Any]) -> NDArray[Any]:
    """An array in the order of its axes; of plain numbers by torch, which takes a fifth of numpy's time."""
    if array.flags.c_contiguous:
        return array
    if array.dtype in _PLAIN and array.flags.writeable:
        turned: NDArray[Any] = torch.from_numpy(array).contiguous().numpy()
        return turned
    return np.ascontiguousarray(array)


def _content(tensor: Any) -> memoryview:
    """The bytes of a tensor."""
    array = tensor.numpy()
    if array.dtype not in _PLAIN:
        return memoryview(tensor.tobytes())
    return laid_out(array).data.cast("B")
