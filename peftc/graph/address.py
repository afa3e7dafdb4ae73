"""Addresses: what a call of a graph is called in every graph of its model: its module, its op, which of these it is."""

from __future__ import annotations

import re
from collections import Counter

from torch import fx

from peftc.graph.program import Program, op_name, scope_of

# In the meta of a node.
ADDRESS = "address"


def addresses(program: Program) -> dict[fx.Node, str]:
    """`model.layers.0.mlp:linear.1` of the first linear of this module itself. What an edit inserted goes by its chosen
    name, so that it does not count among the calls that were traced."""
    counts: Counter[str] = Counter()
    found: dict[fx.Node, str] = {}
    for node in program.graph.nodes:
        if node.op in ("placeholder", "output"):
            continue
        place = f"{scope_of(node)}:{called(node)}"
        counts[place] += 1
        found[node] = f"{place}.{counts[place]}"
    return found


def called(node: fx.Node) -> str:
    """The op of a node that was traced, the chosen name of one that was inserted."""
    if "delta" in node.meta:
        return f"+{re.sub(r'_[0-9]+$', '', node.name)}"
    name = op_name(node)
    return name if name.isidentifier() else str(getattr(node.target, "__name__", name))
