"""Routers: the linear that scores experts, of which the best are taken."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import fx

from peftc.graph.aten import CUT, LINEAR, MOVE, SOFTMAX, is_pointwise
from peftc.graph.program import aten, is_call, scope_of
from peftc.sites.index import Index
from peftc.sites.linear import linear_site
from peftc.sites.site import NoSite, Site


def find(index: Index) -> Iterator[Site | NoSite]:
    """The linears of whose results, perhaps as probabilities or shifted, the largest are chosen."""
    for scores in index.once(scoring):
        yield linear_site(index, scores, "router", scope_of(scores))


def scoring(index: Index) -> Iterable[fx.Node]:
    """Those linears, each once, in graph order."""
    found = (_scores(node.args[0]) for node in index.calls(*_CHOOSE) if _is_along_last(node))
    return dict.fromkeys(filter(None, found))


_CHOOSE = (aten.topk.default, aten.max.dim, aten.argmax.default)


def _is_along_last(node: fx.Node) -> bool:
    """Whether scores of one token are compared."""
    scores: Any = node.args[0]
    # topk(scores, k, dim), max(scores, dim), argmax(scores, dim); topk's is the last
    place = 2 if node.target is aten.topk.default else 1
    axis = node.args[place] if len(node.args) > place else -1
    return axis in (-1, scores.meta["val"].ndim - 1)


def _scores(node: Any) -> Any:
    """The linear that `node` is an elementwise function of, or of a part of it, or its softmax."""
    if is_call(node, *LINEAR):
        return node
    if is_pointwise(node) or is_call(node, *MOVE, *CUT, *SOFTMAX):
        return next(filter(None, map(_scores, node.args)), None)
    return None
