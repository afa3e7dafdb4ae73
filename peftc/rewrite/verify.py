"""Verify: what must hold of a Program or a Folding after each pass, as a table; and numeric parity."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from peftc.graph.program import Program, aten
from peftc.plan.algebra import constant_form
from peftc.rewrite.folding import Folding

Row = tuple[str, Callable[[Program], Iterable[str]]]


def _untagged(program: Program) -> Iterator[str]:
    """An op that was neither traced nor inserted came from nowhere."""
    for node in program.graph.nodes:
        known = "torch_fn" in node.meta or "delta" in node.meta
        if node.op == "call_function" and not known:
            yield node.name


def _valueless(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.op == "call_function" and "delta" in node.meta and node.meta.get("val") is None:
            yield node.name


def _asserts(program: Program) -> Iterator[str]:
    for node in program.graph.nodes:
        if node.target is aten._assert_tensor_metadata.default:
            yield node.name


def _fixed(program: Program) -> Iterator[str]:
    """What computes with the sizes of the example may ask for them, and then the graph is one for these alone."""
    known = {(one.name, one.axis) for one in program.bounds if one.least == one.most}
    for node in program.graph.find_nodes(op="placeholder"):
        slot = program.slots[node.name]
        value = node.meta.get("val") if slot.kind == "input" else None
        for axis, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            named = isinstance(size, torch.SymInt) and size.node.maybe_as_int() is not None
            if named and (slot.name, axis) not in known:
                yield f"axis {axis} of {slot.name}"


PROGRAM: tuple[Row, ...] = (
    ("assertion left by export", _asserts),
    ("inserted without a tag", _untagged),
    ("inserted without a value", _valueless),
    ("size that became a number", _fixed),
)


def check(subject: object) -> tuple[str, ...]:
    """Everything that must hold of a Program or a Folding after any pass, and does not."""
    if isinstance(subject, Program):
        subject.graph.lint()
        return tuple(f"{name}: {node}" for name, find in PROGRAM for node in find(subject))
    assert isinstance(subject, Folding)
    return tuple(_folded(subject))


def _folded(folding: Folding) -> Iterator[str]:
    for path, weight in folding.weights.items():
        if not torch.isfinite(weight).all():
            yield f"'{path}' is not finite"
    for edit in folding.edits:
        if constant_form(edit) is not edit:
            yield f"{edit.name} still has a constant part"
        yield from (
            f"{p.path} has no value" for p in edit.parameters if p.path not in folding.tensors
        )


def difference(left: Mapping[str, Any], right: Mapping[str, Any]) -> float:
    """max |left - right| over the tensors that both outputs name."""
    names = [k for k, v in left.items() if isinstance(v, torch.Tensor) and k in right]
    assert names, "the outputs have no tensor in common"
    worst: Sequence[float] = [
        (left[k].double() - right[k].double()).abs().max().item() for k in names
    ]
    return max(worst)


def magnitude(output: Mapping[str, Any]) -> float:
    return max(v.abs().max().item() for v in output.values() if isinstance(v, torch.Tensor))
