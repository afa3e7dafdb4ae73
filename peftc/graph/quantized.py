"""Quantised weights: parameters that hold whole numbers and their scales, and stand for the matrix that these make.

A graph is traced as if they were that matrix. One that runs gives the tensor itself to a linear, which computes with
its numbers, and what it stands for to any other reader. torchao's are of the shape and type of the matrix and made of
other tensors; bitsandbytes' of four bits are bytes in a column, whose scales an attribute holds.
"""

from __future__ import annotations

import functools
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear as kernel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass
from transformers import PreTrainedModel

from peftc.errors import PeftcError
from peftc.graph.program import Reader, aten


class QuantizedError(PeftcError):
    """A quantised weight that cannot be used as it is asked to."""


def is_quantized(one: torch.Tensor) -> bool:
    """Whether a tensor is made of others, of which it is no part, as DTensor is; or has its scales beside it."""
    made = is_traceable_wrapper_subclass(one) and not isinstance(one, DTensor)
    return made or is_four_bit(one)


def is_four_bit(one: object) -> bool:
    """Whether a weight is bitsandbytes' of four bits (nf4, fp4)."""
    return type(one).__name__ == "Params4bit"


def quantized(model: nn.Module) -> dict[str, torch.Tensor]:
    """The quantised weights of a model by path, tied ones once."""
    return {path: one for path, one in model.named_parameters() if is_quantized(one)}


def meant(one: Any) -> tuple[torch.Size, torch.dtype]:
    """The shape and type of what a weight stands for."""
    held = one.quant_state if is_four_bit(one) else one
    return held.shape, held.dtype


def dequantized(one: torch.Tensor, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a weight stands for, as an ordinary tensor, without gradient, of its own type or of `dtype`; an ordinary
    one is itself."""
    if not is_quantized(one):
        return one
    whole = unpacked(one) if is_four_bit(one) else _made_whole(one)
    return whole if dtype is None else whole.to(dtype)


def _made_whole(one: Any) -> torch.Tensor:
    """What a weight that is made of others stands for."""
    names, _ = one.__tensor_flatten__()
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


def open_up(model: PreTrainedModel, paths: Container[str] | None = None) -> None:
    """Put in the place of the quantised weights of a model, of those at `paths` alone where they are given, what they
    stand for; what is tied stays tied."""
    plain = {
        id(one): nn.Parameter(
            dequantized(one, model.dtype if is_four_bit(one) else None), requires_grad=False
        )
        for path, one in quantized(model).items()
        if paths is None or path in paths
    }
    opened = []
    for path, module in model.named_modules():
        registry = module._parameters
        registry |= {k: plain[id(one)] for k, one in registry.items() if id(one) in plain}
        if _is_packed(module) and not is_four_bit(registry["weight"]):
            vars(module).pop("quant_state", None)
            module.__class__ = nn.Linear
            opened.append(path)
    if opened:
        _leave_out(model, opened)


def require_straight(model: nn.Module, paths: Iterable[str]) -> None:
    """Raise QuantizedError where one of these weights was quantised the other way round than its class has it."""
    for path in sorted(paths):
        module = model.get_submodule(path.rpartition(".")[0])
        if getattr(vars(module).get("source_cls"), "__name__", "") == "Conv1D":
            raise QuantizedError(
                f"'{path}' of this {type(model).__name__} is that of a Conv1D, which was turned to be quantised: no "
                "checkpoint has it so; keep the deltas apart, or merge them into the model as you load it without "
                "quantisation"
            )


def _leave_out(model: PreTrainedModel, paths: Iterable[str]) -> None:
    """Let a checkpoint of a model say that these modules are not bitsandbytes'."""
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        names = [*(quantizer.modules_to_not_convert or ()), *paths]
        quantizer.modules_to_not_convert = names
        model.config.quantization_config.llm_int8_skip_modules = names


def held_bytes(one: torch.Tensor) -> int:
    """The bytes of a tensor as it is held: whole numbers, scales, points of zero."""
    if not is_quantized(one):
        return one.numel() * one.element_size()
    if is_four_bit(one):
        beside = one.quant_state.as_dict().values()  # type: ignore[attr-defined]
        parts = [one.data, *(part for part in beside if isinstance(part, torch.Tensor))]
        return sum(part.numel() * part.element_size() for part in parts)
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
    if is_four_bit(weight):
        return packed_linear(x, weight, bias)
    result: torch.Tensor = _Linear.apply(x, weight, bias)  # type: ignore[no-untyped-call]
    return result


# torch.compile calls these as they are: it would look for a derivative inside.
torch.compiler.allow_in_graph(dequantized)  # type: ignore[no-untyped-call]
torch.compiler.allow_in_graph(linear)  # type: ignore[no-untyped-call]


def packed_linear(
    x: torch.Tensor,
    weight: Any,
    bias: torch.Tensor | None = None,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """As bitsandbytes' Linear4bit, which computes in `dtype`; its kernel keeps no matrix for the way back."""
    import bitsandbytes

    given = x if dtype is None else x.to(dtype)
    added = None if bias is None else bias.to(given.dtype)
    # Turned, as releases before 0.50 want it; those after take it either way.
    result: torch.Tensor = bitsandbytes.matmul_4bit(
        given, weight.t(), weight.quant_state, bias=added
    )
    return result.to(x.dtype)


def unpacked(weight: Any, dtype: torch.dtype | None = None) -> torch.Tensor:
    """What a weight of four bits stands for, in a type of its own or in `dtype`; an ordinary one is itself."""
    if not is_four_bit(weight):
        return weight  # type: ignore[no-any-return]
    import bitsandbytes

    with torch.no_grad():
        whole: torch.Tensor = bitsandbytes.functional.dequantize_4bit(
            weight.data, weight.quant_state
        )
        return whole if dtype is None else whole.to(dtype)


def readers(model: nn.Module) -> dict[str, Reader]:
    """What reads each quantised weight of a model, by its path. torch.compile looks into what reads bitsandbytes'."""
    found = dict.fromkeys(quantized(model), Reader(linear, dequantized))
    for path, module in model.named_modules():
        if _is_packed(module) and f"{path}.weight" in found:
            found[f"{path}.weight"] = Reader(packed_linear, unpacked, module.compute_dtype)
    return found


# Where the weight stands among the arguments of an op that a linear of a quantised weight replaces; any other op reads
# what the weight stands for.
PLACES: Mapping[Any, int] = {aten.linear.default: 1}


def applied(op: Any, *args: Any, **kwargs: Any) -> Any:
    """An op on values of which some may be quantised weights."""
    place = PLACES.get(op, -1)
    given = [
        dequantized(one) if i != place and isinstance(one, torch.Tensor) else one
        for i, one in enumerate(args)
    ]
    return (op if place < 0 else linear)(*given, **kwargs)


def _is_packed(module: nn.Module) -> bool:
    """Whether a module is bitsandbytes' linear of four bits."""
    return any(kind.__name__ == "Linear4bit" for kind in type(module).__mro__)


def as_linears(model: nn.Module) -> None:
    """Let modules of bitsandbytes compute as torch's linear, of what stands in the place of their weights."""
    for module in filter(_is_packed, model.modules()):
        vars(module)["forward"] = functools.partial(nn.Linear.forward, cast(nn.Linear, module))


def keep_as_stored(model: nn.Module) -> None:
    """Let no forward in evaluation pack the weights of a model for a kernel: on some CPUs bitsandbytes does that in
    place, with scales in bfloat16, and a checkpoint of it is another model."""
    for module in filter(_is_packed, model.modules()):
        vars(module)["support_avx512bf16_for_cpu"] = False


def require_open(model: nn.Module) -> None:
    """Raise QuantizedError where a model holds weights that no graph can compute with."""
    for path, module in model.named_modules():
        for name, one in module._parameters.items():
            for reason in _sealed(module, one):
                raise QuantizedError(
                    f"'{path}.{name}' of this {type(model).__name__} is held by bitsandbytes ({type(one).__name__}) "
                    f"{reason}"
                )


def _sealed(module: nn.Module, one: Any) -> Iterator[str]:
    """Why a weight of bitsandbytes cannot be used, and what to do."""
    if type(one).__name__ == "Int8Params":
        yield (
            "and multiplied by activations rounded to 8 bits, so it stands for no matrix; load the model with "
            "BitsAndBytesConfig(load_in_4bit=True), or torchao's int8 weights "
            "(quantization_config=TorchAoConfig(Int8WeightOnlyConfig()))"
        )
    elif is_four_bit(one) and getattr(one, "quant_state", None) is None:
        yield "and not packed yet; move the model to its device first: model.to('cpu')"
    elif is_four_bit(one) and not _is_packed(module):
        yield f"in a {type(module).__name__}; only weights of its Linear4bit can be used"
    elif is_four_bit(one) and getattr(one.quant_state, "packing_format_for_cpu", False):
        yield (
            "and was packed anew, with scales in bfloat16, by a forward in evaluation mode on this CPU; load the model "
            "again, and compile it first"
        )
