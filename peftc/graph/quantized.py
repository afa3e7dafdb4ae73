"""Quantised weights: parameters that hold whole numbers and their scales, and stand for the matrix that these make.

They are tensor subclasses (torchao's), of the shape and type of what they stand for, so a graph is traced as if they
were that. A graph that runs gives the tensor itself to a linear, which computes with its numbers, and what it stands
for to any other reader.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Container, Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear as kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from peftc.errors import PeftcError
from peftc.graph.program import aten

# Parameters whose numbers only kernels of their own package can read, by the class that says so.
SEALED = {"Params4bit": "bitsandbytes", "Int8Params": "bitsandbytes"}


class QuantizedError(PeftcError):
    """A quantised weight that cannot be used as it is asked to."""


def is_quantized(one: torch.Tensor) -> bool:
    """Whether a tensor is made of others, of which it is no part, as DTensor is."""
    return is_traceable_wrapper_subclass(one) and not isinstance(one, DTensor)


def quantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights of a model by path, tied ones once."""
    return {path: one for path, one in model.named_parameters() if is_quantized(one)}


def dequantized(one: torch.Tensor) -> torch.Tensor:
    """What a weight stands for, as an ordinary tensor, without gradient; an ordinary one is itself."""
    if not is_quantized(one):
        return one
    names, _ = one.__tensor_flatten__()  # type: ignore[attr-defined]
    with torch.no_grad():
        if type(one).dequantize is not torch.Tensor.dequantize:
            whole: torch.Tensor = one.dequantize()
            return whole
        if type(one).__name__ == "Int4OpaqueTensor" and names == ["qdata", "scale_and_zero"]:
            return _int4(one)
        # A format that only its kernel reads: the product with the unit matrix is the weight, turned.
        units = torch.eye(one.shape[-1], dtype=one.dtype, device=one.device)
        turned: torch.Tensor = kernel(units, one).t()
        return turned.contiguous()


ROWS = 64  # torch packs int4 for the CPU in blocks of so many rows, one after the other


def _int4(one: Any) -> torch.Tensor:
    """What torchao's int4 weight of the CPU stands for; torch packs such and does not unpack them."""
    rows, columns = one.shape
    order = _order if type(one.qdata) is torch.Tensor else _order.__wrapped__  # no tracer's is kept
    numbers, last = _halves(one.qdata), rows - rows % ROWS
    blocks = numbers[: last * columns].view(-1, ROWS * columns)[:, order(ROWS, columns)]
    rest = numbers[last * columns :][order(rows - last, columns)]
    groups = torch.cat([blocks.flatten(), rest]).view(rows, -1, one.block_size[-1])
    scale, zero = one.scale_and_zero.transpose(0, 1)[..., None, :].unbind(-1)
    whole: torch.Tensor = ((groups.to(one.dtype) - 8) * scale + zero).view(rows, columns)
    return whole


@functools.lru_cache(maxsize=8)
def _order(rows: int, columns: int) -> torch.Tensor:
    """Where the numbers of a block stand once they are packed, which depends on the machine: what packs them is given
    the place of each, four bits at a time."""
    places = torch.arange(rows * columns, dtype=torch.int32)
    found = torch.zeros_like(places)
    for bits in range(0, max(rows * columns - 1, 0).bit_length(), 4):
        digits = (places >> bits & 15).view(rows, columns)
        packed = aten._convert_weight_to_int4pack_for_cpu(digits, 1)
        found |= _halves(packed).to(torch.int32) << bits
    return found.argsort()


def _halves(packed: torch.Tensor) -> torch.Tensor:
    """The two numbers of each byte, the lower first."""
    return torch.stack((packed & 15, packed >> 4), -1).flatten()


def open_up(model: nn.Module, paths: Container[str] | None = None) -> None:
    """Put in the place of the quantised weights of a model, of those at `paths` alone where they are given, what they
    stand for; what is tied stays tied."""
    plain = {
        id(one): nn.Parameter(dequantized(one), requires_grad=False)
        for path, one in quantized(model).items()
        if paths is None or path in paths
    }
    for registry in (module._parameters for module in model.modules()):
        registry |= {k: plain[id(one)] for k, one in registry.items() if id(one) in plain}


def held_bytes(one: torch.Tensor) -> int:
    """The bytes of a tensor as it is held: whole numbers, scales, points of zero."""
    if not is_quantized(one):
        return one.numel() * one.element_size()
    names, _ = one.__tensor_flatten__()  # type: ignore[attr-defined]
    return sum(held_bytes(getattr(one, name)) for name in names)


def backbone_bytes(model: nn.Module) -> int:
    """The bytes of a model's parameters as they are held, tied ones once; without those of deltas."""
    return sum(held_bytes(p) for k, p in model.named_parameters() if not k.startswith("deltas."))


class _Linear(torch.autograd.Function):
    """A product with a quantised weight by its own kernel; on the way back, with what it stands for. Nothing is kept
    between the two but the weight: not every kernel has a derivative, and others keep a copy of the whole matrix."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        ctx.weight = weight
        # Of its own type, whatever autocast makes of x; without gradient, as torch.compile looks for one in here.
        added = None if bias is None else bias.detach().to(weight.dtype)
        result: torch.Tensor = kernel(x.detach().to(weight.dtype), weight, added).to(x.dtype)
        return result

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        of_x, _, of_bias = ctx.needs_input_grad
        weight = dequantized(ctx.weight).to(grad.dtype) if of_x else None
        return (
            None if weight is None else grad @ weight,
            None,
            grad.flatten(0, -2).sum(0) if of_bias else None,
        )


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """As torch's linear, of a weight that may be quantised."""
    if not is_quantized(weight):
        return kernel(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


# torch.compile calls these as they are: it would look for a derivative inside.
torch.compiler.allow_in_graph(dequantized)  # type: ignore[no-untyped-call]
torch.compiler.allow_in_graph(linear)  # type: ignore[no-untyped-call]

# What runs in the place of an op that reads a quantised weight, and where the weight stands among its arguments; any
# other op reads what the weight stands for.
READERS: Mapping[Any, tuple[int, Callable[..., torch.Tensor]]] = {aten.linear.default: (1, linear)}


def applied(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An op on values of which some may be quantised weights."""
    place, run = READERS.get(op, (-1, op))
    given = [
        dequantized(one) if i != place and isinstance(one, torch.Tensor) else one
        for i, one in enumerate(args)
    ]
    return run(*given, **kwargs)


def require_open(model: nn.Module) -> None:
    """Raise QuantizedError where a model holds weights that only another package's modules can read."""
    for path, one in model.named_parameters():
        package = SEALED.get(type(one).__name__)
        if package is not None:
            raise QuantizedError(
                f"'{path}' of this {type(model).__name__} is held by {package} ({type(one).__name__}), whose kernels "
                "are no part of a graph; load the model with torchao's int8 or int4 weights instead "
                "(quantization_config=TorchAoConfig(Int8WeightOnlyConfig())), or without quantisation"
            )
