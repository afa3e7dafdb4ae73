"""What the tests of the passes work on: one layer of a model, and a spec of each shape."""

from __future__ import annotations

import copy
from functools import cache
from typing import Any

from conftest import tiny

from passes import Insert, Normalize
from peftc.driver import plan as make
from peftc.graph.arguments import dummy_inputs, forward_flags
from peftc.graph.call import Call
from peftc.graph.capture import capture
from peftc.graph.program import Program
from peftc.graph.rows import NONE, Room
from peftc.language.spec import Spec

LORA = """
deltas:
  - at: attention.q
    where: {layers: 0}
    params:
      down: {shape: [in, 2], init: kaiming_uniform}
      up: {shape: [2, out], init: zeros}
    delta: x @ down @ up
    compose: h + 2.0 * delta
"""
PREFIX = """
deltas:
  - at: attention.heads
    where: {layers: 0}
    params:
      tokens: {shape: [3, d], init: normal}
      up: {shape: [d, kv], init: linear(d)}
    let:
      P: split_heads(tanh(tokens @ up), kv_heads)
    rewrite: {k: "prepend(P, k)", v: "prepend(P, v)"}
"""
ADAPTER = """
deltas:
  - at: ffn
    where: {layers: 0}
    params:
      down: {shape: [out, 2], init: normal}
      up: {shape: [2, out], init: normal}
    delta: gelu(h @ down) @ up
"""
SPECS = {"lora": LORA, "prefix": PREFIX, "adapter": ADAPTER}


def traced(family: str, room: Room = NONE) -> Program:
    model = tiny(family, num_hidden_layers=1)
    return capture(
        model, Call.of(model, "forward", dummy_inputs(model)), forward_flags(model), room
    )


once = cache(traced)


def inserted(spec: Spec, *more: Any) -> Program:
    """One layer of BERT with the deltas of `spec` in it, and what `more` passes make of it."""
    plan = make(tiny("bert", num_hidden_layers=1), spec)
    one = program()
    for step in (Normalize(), Insert(plan.edits), *more):
        step.run(one)
    return one


def program(family: str = "bert", room: Room = NONE) -> Program:
    """One layer as it was traced, with place for rows in front where there are some."""
    return traced(family, room) if room else copy.deepcopy(once(family))
