"""Origins: which call of a Program each node of an ONNX graph came of, told through torch's own exporters.

They trace the graph once more, take its ops apart and fuse some: what a node was traced in, and nothing else, they carry
all the way. So that is where the address of its call goes; it is read before the metadata is stripped.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch.fx.traceback import annotate

from peftc.graph.address import ADDRESS, addresses
from peftc.graph.program import Program

_KEY = "peftc"
_SCOPES = "pkg.torch.onnx.name_scopes"


def address(program: Program) -> None:
    """Let each call of a graph know its address, and what a pass puts in its place that of the call."""
    for node, one in addresses(program).items():
        node.meta[ADDRESS] = one


def telling(node: fx.Node, target: Any) -> Any:
    """An op that tells who traces it which call it is."""
    if ADDRESS not in node.meta:
        return target
    edit = node.meta.get("edit")
    said = json.dumps([node.meta[ADDRESS], None if edit is None else [*edit]])

    def told(*args: Any, **kwargs: Any) -> Any:
        with annotate({_KEY: said}):
            return target(*args, **kwargs)

    return told


def carry(exported: Any) -> None:
    """Put what the nodes of an ExportedProgram were told into what their ONNX nodes will say."""
    for node in exported.graph_module.graph.nodes:
        said = (node.meta.get("custom") or {}).get(_KEY)
        if said is not None:
            node.meta["nn_module_stack"] = {"root": ("", "root"), _KEY: (said, "call")}


def read(model: Any) -> None:
    """Keep the origin of each node of an onnx_ir Model beside its metadata, which is neither stripped nor written."""
    for node in model.graph:
        scopes = node.metadata_props.get(_SCOPES)
        for one in ast.literal_eval(scopes) if scopes else ():
            if one.startswith("["):
                node.meta[_KEY] = json.loads(one)


Row = tuple[str, str, str, tuple[int, str] | None, str]


def rows(model: Any) -> Iterator[Row]:
    """(name, op, address, edit, what it gives) of each node, in order; the address is "" of what no call of the Program
    became. What it gives is `[batch, seq_len, 8]`, or a type where it is no tensor of floating numbers."""
    for node in model.graph:
        one, edit = node.meta.get(_KEY, ("", None))
        kind = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
        of = None if edit is None else (edit[0], edit[1])
        yield node.name or "", kind, one, of, _given(node.outputs[0]) if node.outputs else ""


def _given(value: Any) -> str:
    if value.dtype is None or not value.dtype.is_floating_point():
        return "" if value.dtype is None else str(value.dtype.name).lower()
    sizes = [] if value.shape is None else list(value.shape)
    said = [str(one if isinstance(one, int) else one.value) for one in sizes]
    return f"[{', '.join(said)}]"
