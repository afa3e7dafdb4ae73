"""Fused: attention and norms as ONNX Runtime's own ops for a provider, where such a graph loads and computes the same."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from peftc.errors import PeftcError
from peftc.export.graph import ExportError, Graph, quiet
from peftc.export.parity import check
from peftc.export.precision import Precision
from peftc.export.weights import write_models

# The providers that there are fusions for. They know the decomposed attention of opsets before 23.
FUSED, OPSET = ("cpu", "cuda"), 20
_DOMAIN = "com.microsoft"


def fused(
    make: Callable[[], Any],
    provider: str,
    model: PreTrainedModel,
    graph: Graph,
    precision: Precision,
    directory: Path,
) -> tuple[Any, str]:
    """What `make` gives, an onnx_ir Model, with transformers' fusions for a provider, and the ops that these made; or
    as it was, where the fused graph does not load or is out of the bounds of `precision`, and why. It is tried in
    `directory`."""
    one = make()
    try:
        _fuse(one, provider)
        found = ops_of(one)
        if not found:
            return one, "nothing to fuse"
        kept = {k: v.const_value for k, v in one.graph.initializers.items()}
        with tempfile.TemporaryDirectory(dir=directory) as folder:
            write_models({graph.role: one}, Path(folder))
            check(model, graph, Path(folder) / f"{graph.role}.onnx", precision)
        for name, value in kept.items():
            one.graph.initializers[name].const_value = value
        return one, ", ".join(f"{count} {op}" for op, count in sorted(found.items()))
    except PeftcError as error:
        return make(), f"as it was: {str(error)[:200]}"


def _fuse(model: Any, provider: str) -> None:
    from transformers.exporters.onnxruntime_fusions import fuse_for_onnxruntime

    with quiet():
        try:
            fuse_for_onnxruntime(model, provider)
        except Exception as error:  # whatever a rewriter of graphs raises that meets another form
            raise ExportError(f"{type(error).__name__}: {error}") from error


def ops_of(model: Any) -> Mapping[str, int]:
    """ONNX Runtime's own ops in a graph, with how many there are."""
    found: dict[str, int] = {}
    for node in model.graph:
        if node.domain == _DOMAIN:
            found[node.op_type] = found.get(node.op_type, 0) + 1
    return found


def provider_of(name: str | None) -> str | None:
    """Raises ExportError where there are no fusions for it."""
    if name is not None and name not in FUSED:
        raise ExportError(f"no fusions for '{name}'; there are for {', '.join(FUSED)}")
    return name
