"""Precision: the numbers that a bundle computes with, what its outputs may differ by for it, and how it gets there."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel

from peftc.export.graph import ExportError, quiet
from peftc.export.weights import laid_out
from peftc.rewrite.tolerance import SHARES
from peftc.runtime.session import CPU, CUDA, RuntimeFault, providers

Model = TypeVar("Model", bound=PreTrainedModel)
# The weights that share a scale.
BLOCK = 32


@dataclass(frozen=True)
class Precision:
    """A row of PRECISIONS or of QUANTIZED. `share` of an output's largest value is the largest difference from torch in
    float32, `divergence` the mean KL in nats from its distribution over labels or words, and at least `agreement` of
    its likeliest ones are the same; `why` these, and no smaller."""

    name: str
    dtype: torch.dtype
    share: float
    divergence: float
    agreement: float
    why: str
    bits: int | None = None


PRECISIONS: Mapping[str, Precision] = {
    one.name: one
    for one in (
        Precision(
            "fp32",
            torch.float32,
            SHARES[torch.float32],
            1e-4,
            0.98,
            "sums in another order; what agrees less is a tie",
        ),
        Precision(
            "fp16",
            torch.float16,
            SHARES[torch.float16],
            1e-2,
            0.95,
            "32 roundings to 11 bits",
        ),
        Precision(
            "bf16",
            torch.bfloat16,
            SHARES[torch.bfloat16],
            1e-1,
            0.85,
            "32 roundings to 8 bits",
        ),
    )
}
# Of float32 graphs, whose matrices become whole numbers in blocks of BLOCK.
QUANTIZED: Mapping[str, Precision] = {
    one.name: one
    for one in (
        Precision(
            "int8",
            torch.float32,
            2**-3,
            1e-2,
            0.9,
            "a weight is one of 256 a block, and so is what it multiplies",
            8,
        ),
        Precision(
            "int4",
            torch.float32,
            1.0,
            5e-2,
            0.6,
            "a weight is one of 16 a block; a single output may be far off, most are not",
            4,
        ),
    )
}


def precision_of(name: str, quantize: str | None) -> Precision:
    """The row that is asked for. Raises ExportError where there is none, and where nothing here could check it."""
    if name not in PRECISIONS:
        raise ExportError(f"no precision '{name}'; there are {', '.join(PRECISIONS)}")
    if quantize is None:
        found = PRECISIONS[name]
        if found.dtype == torch.bfloat16 and not _on_a_gpu():
            raise ExportError(
                "ONNX Runtime computes bfloat16 on a GPU alone, and here is none to check it on; take fp16 or fp32"
            )
        return found
    if quantize not in QUANTIZED:
        raise ExportError(f"no quantisation '{quantize}'; there are {', '.join(QUANTIZED)}")
    if name != "fp32":
        raise ExportError(f"{quantize} is of graphs in fp32; leave precision {name} out")
    return QUANTIZED[quantize]


def providers_for(precision: Precision) -> tuple[str, ...]:
    """Where a bundle is checked."""
    return (CUDA, *CPU) if precision.dtype == torch.bfloat16 else CPU


def _on_a_gpu() -> bool:
    try:
        return providers().get(CUDA, False)
    except RuntimeFault:
        return False


def on_the_cpu(model: Model, dtype: torch.dtype) -> Model:
    """A model whose weights have a type, on the CPU: itself, or a copy. Buffers that no checkpoint holds, such as the
    frequencies of rotary positions, stay as they are, as where a checkpoint is loaded in that type."""
    if model.dtype == dtype and model.device.type == "cpu":
        return model
    made: Model = copy.deepcopy(model).cpu()
    own = getattr(made, "body", made)
    saved = set(own.state_dict())
    with torch.no_grad():
        for one in made.parameters():
            one.data = one.data.to(dtype) if one.is_floating_point() else one.data
        for path, buffer in own.named_buffers():
            if path in saved and buffer.is_floating_point():
                buffer.data = buffer.data.to(dtype)
    made.config.dtype = dtype
    return made


def quantized(model: Any, bits: int) -> Any:
    """An onnx_ir Model whose matrices are whole numbers, by ONNX Runtime's own quantizer; tables of embeddings too,
    where it has them (4 bits)."""
    import onnx_ir as ir
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    _turn_weights(model.graph)
    with quiet():
        quantizer = MatMulNBitsQuantizer(
            ir.to_proto(model),
            bits=bits,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=4,  # activations in 8 bits where the CPU multiplies these
            op_types_to_quantize=("MatMul", "Gather") if bits == 4 else ("MatMul",),
        )
        quantizer.process()
    return ir.from_proto(quantizer.model.model)


def _turn_weights(graph: Any) -> None:
    """Weights that are turned as they are read, as the table that is the head too, become weights of their own: the
    quantizer takes no others."""
    import onnx_ir as ir

    for node in [one for one in graph if one.op_type == "Transpose"]:
        (source,), (turned,) = node.inputs, node.outputs
        if source.const_value is None or source.name not in graph.initializers:
            continue
        array = source.const_value.numpy().transpose(node.attributes["perm"].as_ints())
        tensor = ir.tensor(laid_out(array), name=turned.name)
        weight = ir.Value(
            name=turned.name, const_value=tensor, shape=ir.Shape(array.shape), type=turned.type
        )
        ir.convenience.replace_all_uses_with(turned, weight)
        graph.remove(node, safe=True)
        graph.register_initializer(weight)
