"""Sparse storage: a tensor of mostly zeros as its non-zeros and where they are, exact to the bit."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod

import torch

from peftc.errors import PeftcError

# `positions` count the elements in row-major order and rise; `values` has one for each, or one for all of
# them (a mask); `shape` is the tensor's.
PARTS = ("positions", "values", "shape")
NAMES_BYTES = 512  # about what the names of the parts add to the file
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_INDICES = (torch.int32, torch.int64)


class SparseError(PeftcError):
    """Parts of a sparse tensor that do not make one."""


def packed(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Each floating tensor as `NAME.positions`, `NAME.values` and `NAME.shape` where that takes less room.

    Zero is what has no bit set, so that -0.0 is kept too; `unpacked` gives the same tensors back.
    """
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        parts = _parts(tensor) if tensor.is_floating_point() else None
        if parts is None:
            found[name] = tensor
        else:
            found |= {f"{name}.{part}": one for part, one in zip(PARTS, parts, strict=True)}
    return found


def _parts(dense: torch.Tensor) -> tuple[torch.Tensor, ...] | None:
    flat = dense.detach().contiguous().reshape(-1)
    bits = flat.view(_BITS[flat.element_size()])
    index = torch.int32 if flat.numel() <= torch.iinfo(torch.int32).max else torch.int64
    room = flat.nbytes - NAMES_BYTES
    if int(torch.count_nonzero(bits)) * index.itemsize >= room:
        return None
    positions = bits.nonzero().reshape(-1)
    values = flat[positions]
    if len(values) > 1 and bool((bits[positions] == bits[positions[0]]).all()):
        values = values[:1].clone()
    shape = torch.tensor(dense.shape, dtype=torch.int64)
    parts = (positions.to(index), values, shape)
    return parts if sum(one.nbytes for one in parts) < room else None


def names(expected: Collection[str], found: Collection[str]) -> set[str]:
    """What a file that holds `found` should hold of the expected tensors: each whole, or all of its parts."""
    wanted: set[str] = set()
    for name in expected:
        parts = {f"{name}.{part}" for part in PARTS}
        split = name not in found and any(part in found for part in parts)
        wanted |= parts if split else {name}
    return wanted


def check_sizes(
    sizes: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> None:
    """Raise SparseError unless the parts can be of the expected shapes; nothing is read for it."""
    for name, shape in expected.items():
        if name in sizes:
            continue
        positions, values, own = (sizes[f"{name}.{part}"] for part in PARTS)
        if len(positions) != 1 or positions[0] > prod(shape):
            raise SparseError(
                f"'{name}.positions' has the shape {list(positions)}, expected at most [{prod(shape)}]"
            )
        if values not in (positions, (min(1, positions[0]),)):
            raise SparseError(
                f"'{name}.values' has the shape {list(values)} for {positions[0]} positions"
            )
        if own != (len(shape),):
            raise SparseError(f"'{name}.shape' has the shape {list(own)}, expected [{len(shape)}]")


def unpacked(
    tensors: Mapping[str, torch.Tensor], expected: Mapping[str, tuple[int, ...]]
) -> dict[str, torch.Tensor]:
    """`tensors` with the expected ones made of their parts; all others stay as they are.

    Raises SparseError when parts are missing or damaged.
    """
    dense = dict(tensors)
    for name, shape in expected.items():
        parts = [f"{name}.{part}" for part in PARTS]
        if name in dense or not any(part in dense for part in parts):
            continue
        missing = [part for part in parts if part not in dense]
        if missing:
            raise SparseError(f"'{missing[0]}' is missing")
        check_sizes({part: tuple(dense[part].shape) for part in parts}, {name: shape})
        positions, values, own = (dense.pop(part) for part in parts)
        _check(name, shape, positions, values, own)
        flat = torch.zeros(prod(shape), dtype=values.dtype, device=values.device)
        flat[positions.long()] = values
        dense[name] = flat.reshape(shape)
    return dense


def _check(
    name: str,
    shape: tuple[int, ...],
    positions: torch.Tensor,
    values: torch.Tensor,
    own: torch.Tensor,
) -> None:
    if positions.dtype not in _INDICES or own.dtype not in _INDICES:
        part, odd = ("positions", positions) if own.dtype in _INDICES else ("shape", own)
        raise SparseError(f"'{name}.{part}' holds {_kind(odd)}, expected int32 or int64")
    if not values.is_floating_point():
        raise SparseError(f"'{name}.values' holds {_kind(values)}, expected floating numbers")
    if own.tolist() != list(shape):
        raise SparseError(f"'{name}' has the shape {own.tolist()}, expected {list(shape)}")
    outside = positions[(positions < 0) | (positions >= prod(shape))]
    if len(outside):
        raise SparseError(
            f"'{name}.positions' has {int(outside[0])}, outside of {prod(shape)} elements"
        )
    falls = (positions[1:] <= positions[:-1]).nonzero()
    if len(falls):
        at = int(falls[0]) + 1
        raise SparseError(
            f"'{name}.positions' does not rise at {at}: {positions[at - 1 : at + 1].tolist()}"
        )


def _kind(tensor: torch.Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
