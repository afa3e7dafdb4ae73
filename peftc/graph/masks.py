"""Masks: a graph has no attention mask where the model itself would make none.

Eager code drops the mask of a batch without padding, and asks for values to know. A trace has no values: it is
told that every token counts, and what follows from that stands in the graph as a premise until it is proven to
be one of the inputs' masks. A call whose masks are another takes the graph with explicit masks.
"""

from __future__ import annotations

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch._dynamo import _trace_wrapped_higher_order_op as trace_wrapped
from transformers import masking_utils
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from peftc.graph.arguments import argument
from peftc.graph.aten import CUT, MOVE, hint
from peftc.graph.program import Program, aten, is_call

# The kind of attention whose masks may be left out: the fused op knows causality by a switch.
FUSED = "sdpa"
_PREMISE = "every token counts"
# Ops that give ones of ones; of `cat` and padding see below.
_KEEP = (*MOVE, *CUT, aten.expand.default, aten.all.default, aten.cat.default)
_ONES = (aten.ones.default, aten.ones_like.default, aten.new_ones.default)


@dataclass
class Decision:
    """What a trace decided: whether it `met` a mask that a batch without padding does without."""

    met: bool = False


@contextlib.contextmanager
def deciding(drop: bool) -> Iterator[Decision]:
    """While a model is traced, by this thread: masks are left out where eager code leaves them out of a batch in
    which every token counts, if `drop`; else only noted."""
    decision, thread = Decision(), threading.get_ident()
    original = ALL_MASK_ATTENTION_FUNCTIONS[FUSED]

    def mask(*args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or not _may_drop(original, args, kwargs):
            return original(*args, **kwargs)
        decision.met = True
        if not drop:
            return original(*args, **kwargs)
        padding = kwargs.get("attention_mask")
        if padding is not None:
            aten._assert_async.msg(padding.all(), _PREMISE)
        return None

    ALL_MASK_ATTENTION_FUNCTIONS[FUSED] = mask
    try:
        with _at_once():
            yield decision
    finally:
        del ALL_MASK_ATTENTION_FUNCTIONS[FUSED]
        if ALL_MASK_ATTENTION_FUNCTIONS[FUSED] is not original:  # a user's own stood there
            ALL_MASK_ATTENTION_FUNCTIONS[FUSED] = original


@contextlib.contextmanager
def _at_once() -> Iterator[None]:
    """While masks of a model's own are made for all places at once, and read from tables by the op for it."""
    ways: tuple[tuple[Any, str, Any], ...] = (
        (vars(masking_utils), "_vmap_expansion_sdpa", _broadcast),
        (vars(trace_wrapped), "mod_index", aten.index.Tensor),
    )
    before = [names.get(name) for names, name, _ in ways]
    for names, name, way in ways:
        names[name] = way
    try:
        yield
    finally:
        for (names, name, _), own in zip(ways, before, strict=True):
            names[name] = own


def _broadcast(mask: Callable[..., Any]) -> Callable[..., Any]:
    """A mask of each place by its numbers (of the sequence, the head, the query and the key), for all places at once. A
    model's own is computed one place at a time, by `vmap`, which torch's export leaves in the graph half done."""

    def whole(*numbers: torch.Tensor) -> torch.Tensor:
        sizes = [one.shape[0] for one in numbers]
        placed = [
            one.view(*(-1 if j == i else 1 for j in range(4))) for i, one in enumerate(numbers)
        ]
        found: torch.Tensor = mask(*placed).expand(sizes)
        return found

    return whole


def _may_drop(original: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> bool:
    """Whether eager code makes no mask here when no token is padding: one query sees all keys, as many queries as
    keys are causal by the op's own switch, and where all see all there is nothing to mask. Windows are masks."""
    try:
        given = inspect.signature(original).bind(*args, **kwargs)
    except TypeError:
        return False
    given.apply_defaults()
    said = given.arguments
    queries, keys, padding = (said.get(k) for k in ("q_length", "kv_length", "attention_mask"))
    if queries is None or keys is None or said.get("local_size") is not None:
        return False
    if padding is not None and hint(padding.shape[-1]) != hint(keys):
        return False
    causal = said.get("allow_is_causal_skip", False)
    # Lengths of one name are one size, and those of two names two, in every trace.
    aligned = (isinstance(queries, int) and queries == 1) or hint(queries) == hint(keys)
    return bool((causal and aligned) or said.get("allow_is_bidirectional_skip", False))


def proven(program: Program) -> bool:
    """Whether all premises of a graph follow from its masks being ones; they are taken out."""
    for node in program.graph.find_nodes(op="call_function", target=aten._assert_async.msg):
        if node.args[1] == _PREMISE:
            if not _is_ones(node.args[0], program):
                return False
            program.graph.erase_node(node)
    return True


def _is_ones(node: Any, program: Program) -> bool:
    """Whether a tensor has nothing but ones if the masks do."""
    if slot := program.slot(node):
        mask = slot.kind == "input" and argument(slot.name).role == "mask"
        return mask and node.meta["val"].ndim == 2
    if is_call(node, *_ONES):
        return True
    padded = is_call(node, aten.constant_pad_nd.default) and node.args[2:] == (1,)
    tensors = [one for one in node.all_input_nodes if isinstance(one.meta["val"], torch.Tensor)]
    kept = padded or is_call(node, *_KEEP)
    return kept and bool(tensors) and all(_is_ones(one, program) for one in tensors)
