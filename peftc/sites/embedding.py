"""Token embeddings: a table, the ids that are looked up in it, and the rows that may stand in front of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from peftc.graph.arguments import argument
from peftc.graph.aten import EMBEDDING, MOVE, TURN, static_shape
from peftc.graph.program import Read, Value, aten, is_call, scope_of
from peftc.sites.dataflow import before
from peftc.sites.index import Index
from peftc.sites.site import NoSite, Place, Site
from peftc.sites.view import Weight


def find(index: Index) -> Iterator[Site | NoSite]:
    """Tables that are read by the ids of an input. One that two stacks share is a site in each."""
    for node in index.calls(*EMBEDDING):
        table, ids = index.stored(node.args[0]), _token_input(index, node.args[1])  # type: ignore[arg-type]
        if table is None or not ids:
            continue
        if _is_turned(node.args[1]):
            reason = "its ids are laid out with the tokens in front of the batch"
            yield NoSite(("embedding",), scope_of(node), reason)
            continue
        scope, size = scope_of(node), static_shape(node)[-1]
        vocab = static_shape(node.args[0])[0]
        dims = {"in": size, "out": size, "d": size, "vocab": vocab}
        weights = {"W": Weight(table.path, also=index.also(table.path, node.target))}
        yield Site("embedding", scope, dims, weights, ids=ids)


def _token_input(index: Index, node: object) -> str | None:
    """The input of token ids that `node` is, moved at most."""
    name = index.program.input(before(node, *MOVE))
    return name if name and argument(name).role == "ids" else None


def _is_turned(node: object) -> bool:
    turns = (*TURN, aten.permute.default)
    return is_call(before(node, *(op for op in MOVE if op not in turns)), *turns)


def locate(index: Index, site: Site) -> tuple[Place, ...]:
    """The lookups in this module by this table: tied tables are several sites. A graph that continues from a
    cache finds the rows in front of the tokens there."""
    holds = site.ids in index.program.wide
    return tuple(
        Place({"ids": Read(node, 1), "h": Value(node), "W": Read(node, 0)}, holds, _behind)
        for node in index.calls(*EMBEDDING)
        if scope_of(node) == site.scope and _table(index, node) == site.weights["W"].path
    )


def _table(index: Index, node: fx.Node) -> str | None:
    table = index.stored(node.args[0])  # type: ignore[arg-type]
    return None if table is None else table.path


def _behind(call: Callable[..., Any], h: fx.Node, rows: int) -> Any:
    """The embeddings without those of the ids that keep the place of the rows in front."""
    # aten.slice means "to the end" by the largest stop
    return call(aten.slice.Tensor, h, -2, rows, sys.maxsize, name="tokens")


def used(index: Index, site: Site) -> Iterator[str]:
    """The ids, or what stands for them, where this graph reads either."""
    read = {site.ids, site.ids.replace("_ids", "s_embeds")}
    yield from sorted(read & index.program.inputs)
