"""An ONNX Runtime session that binds torch tensors in place and never falls back in silence."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from peftc.errors import PeftcError

CPU = ("CPUExecutionProvider",)
CUDA = "CUDAExecutionProvider"
# What is asked for by the device that graphs run on.
PROVIDERS: Mapping[str, Sequence[str]] = {"cpu": CPU, "cuda": (CUDA,)}


class RuntimeFault(PeftcError):
    """A bundle that ONNX Runtime cannot load or run as asked."""


@dataclass(frozen=True)
class Session:
    """`device` is where inputs and outputs live: "cpu", or "cuda" with the CUDA provider."""

    session: Any
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    device: str

    @staticmethod
    def open(
        path: Path, providers: Sequence[str] = CPU, allow_cpu_fallback: bool = False
    ) -> Session:
        """Load a graph. Raises RuntimeFault when the file is damaged or a provider is not there."""
        try:
            import onnxruntime as ort
        except ImportError as error:
            fix = 'pip install "peftc[cpu]" or "peftc[gpu]"'
            raise RuntimeFault(f"running a bundle needs ONNX Runtime: {fix}") from error
        wanted = [*providers, *(p for p in CPU if p not in providers)]
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what fails is raised, with the same words
        missing = [p for p in providers if p not in ort.get_available_providers()]
        if missing and not allow_cpu_fallback:
            raise RuntimeFault(f"ONNX Runtime here has no {missing[0]}; peftc[gpu] brings CUDA's")
        try:
            session = ort.InferenceSession(
                str(path), options, providers=[p for p in wanted if p not in missing]
            )
        except Exception as error:
            raise RuntimeFault(f"{path} cannot be loaded: {str(error)[:300]}") from error
        silent = [p for p in providers if p not in session.get_providers()]
        if silent and not allow_cpu_fallback:
            raise RuntimeFault(
                f"{silent[0]} did not start, and ONNX Runtime would run on the CPU; see peftc doctor"
            )
        device = "cuda" if CUDA in session.get_providers() else "cpu"
        names = tuple(one.name for one in session.get_inputs())
        return Session(session, names, tuple(one.name for one in session.get_outputs()), device)

    def shape(self, name: str) -> tuple[int | str, ...]:
        """The axes of an input: sizes, and names of the dynamic ones."""
        return next(tuple(one.shape) for one in self.session.get_inputs() if one.name == name)

    def run_as_it_is(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """`run` of numbers in any floating type; they come back on the CPU in float32."""
        types = {one.name: _TYPES.get(one.type) for one in self.session.get_inputs()}
        given = {k: v.to(types.get(k)) if v.is_floating_point() else v for k, v in feeds.items()}
        found = self.run(given)
        return {k: v.cpu().float() if v.is_floating_point() else v for k, v in found.items()}

    def run(self, feeds: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Outputs by name. Unknown inputs are an error; an empty past is bound as it is."""
        from onnxruntime import OrtValue

        unknown = [name for name in feeds if name not in self.inputs]
        missing = [name for name in self.inputs if name not in feeds]
        if unknown or missing:
            wrong = f"takes no '{unknown[0]}'" if unknown else f"needs '{missing[0]}'"
            raise RuntimeFault(f"the graph {wrong}; it takes {', '.join(self.inputs)}")
        odd = [f"{name}: {one.dtype}" for name, one in feeds.items() if one.dtype not in _KINDS]
        if odd:
            raise RuntimeFault(f"token ids and masks are int64, not {odd[0]}")
        binding = self.session.io_binding()
        kept = []
        for name, tensor in feeds.items():
            tensor = tensor.detach().to(self.device).contiguous()
            buffer = tensor if tensor.numel() else tensor.new_empty(1)  # no null pointers
            kept.append(buffer)
            dtype = _KINDS[tensor.dtype]
            binding.bind_input(
                name,
                self.device,
                tensor.device.index or 0,
                dtype,
                tuple(tensor.shape),
                buffer.data_ptr(),
            )
        for name in self.outputs:
            binding.bind_output(name, self.device)
        if self.device == "cuda":
            torch.cuda.current_stream().synchronize()  # ONNX Runtime reads on a stream of its own
        try:
            self.session.run_with_iobinding(binding)
        except Exception as error:
            raise RuntimeFault(
                f"the graph cannot run on these inputs: {str(error)[:300]}"
            ) from error
        values: list[OrtValue] = binding.get_outputs()
        found = {n: _to_torch(v) for n, v in zip(self.outputs, values, strict=True)}
        del kept
        return found


def providers() -> dict[str, bool]:
    """The providers that ONNX Runtime lists, and whether a session with each really has it: without a GPU, the wheel
    for GPUs lists CUDA and runs on the CPU. Raises RuntimeFault where ONNX Runtime or onnx is not there or broken."""
    try:
        import onnxruntime as ort
        from onnx import TensorProto, helper

        listed = ort.get_available_providers()
    except (ImportError, AttributeError) as error:
        raise RuntimeFault(f"ONNX Runtime cannot be used here: {error}") from error
    x, y = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in "xy")
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["y"])], "one", [x], [y])
    opsets = [helper.make_opsetid("", 20)]
    model = helper.make_model(graph, ir_version=10, opset_imports=opsets).SerializeToString()
    options = ort.SessionOptions()
    options.log_severity_level = 4
    found = {}
    for name in listed:
        try:
            with warnings.catch_warnings(action="ignore"):  # the answer is what is asked for here
                found[name] = name in ort.InferenceSession(model, options, [name]).get_providers()
        except Exception:  # whatever a provider raises that lacks its device
            found[name] = False
    return found


def _to_torch(value: Any) -> torch.Tensor:
    tensor: torch.Tensor = torch.utils.dlpack.from_dlpack(value._ortvalue.to_dlpack())
    return tensor


# Element types of ONNX.
_KINDS = {torch.float32: 1, torch.int64: 7, torch.bool: 9, torch.float16: 10, torch.bfloat16: 16}
_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
}
