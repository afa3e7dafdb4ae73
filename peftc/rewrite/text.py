"""Program -> text: a short, stable form for people and goldens; and diffs of it."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from torch import fx
from torch.utils import _pytree as pytree

from peftc.graph.program import Program, scope_of
from peftc.rewrite.folding import Folding


def program_text(program: Program) -> str:
    """One line for each node: `%name = op(args)  @ scope  # delta`."""
    lines = []
    for node in program.graph.nodes:
        slot = program.slot(node)
        if slot is not None:
            if node.users:
                lines.append(f"%{node.name} = {slot.kind} {slot.name}")
        elif node.op == "output":
            values = pytree.tree_leaves(node.args)
            lines.append("return " + ", ".join(_operand(v) for v in values))
        else:
            lines.append(_call_text(node))
    return "\n".join(lines) + "\n"


def _call_text(node: fx.Node) -> str:
    schema = getattr(node.target, "_schema", None)
    name = (
        schema.name.rpartition("::")[2] if schema else getattr(node.target, "__name__", node.target)
    )
    args = [_operand(arg) for arg in node.args]
    args += [f"{key}={_operand(value)}" for key, value in node.kwargs.items()]
    scope = f"  @ {scope_of(node)}" if scope_of(node) else ""
    delta = f"  # {node.meta['delta']}" if node.meta.get("delta") else ""
    return f"%{node.name} = {name}({', '.join(args)}){scope}{delta}"


def _operand(value: object) -> str:
    if isinstance(value, fx.Node):
        return f"%{value.name}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_operand(one) for one in value) + "]"
    return str(value)


def folding_text(folding: Folding) -> str:
    """The edits left with their tensors, and the weights rewritten so far."""
    lines = []
    for edit in folding.edits:
        sizes = ", ".join(f"{p.name} {list(p.shape)}" for p in edit.parameters)
        lines.append(f"edit {edit.name}: {sizes}")
    lines += [f"folded {path} {list(w.shape)}" for path, w in folding.weights.items()]
    return "\n".join(lines) + "\n"


def subject_text(subject: object) -> str:
    if isinstance(subject, Program):
        return program_text(subject)
    assert isinstance(subject, Folding)
    return folding_text(subject)


def diff(before: str, after: str, context: int = 0) -> str:
    """A unified diff without its file header."""
    lines: Sequence[str] = list(
        difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=context)
    )
    return "\n".join(line for line in lines[2:] if not line.startswith("@@")) + "\n"
