"""The site table: which places a spec can name, the ports and dims they offer. New places are one row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from peftc.language.expr import Shape

_ATTENTION_DIMS = ("in", "out", "d", "heads", "kv_heads", "head_dim", "kv")
_LINEAR_DIMS = ("in", "out", "d")
_LINEAR: Mapping[str, Shape] = {
    "x": ("...", "in"),
    "h": ("...", "out"),
    "W": ("out", "in"),
    "b": ("out",),
}


@dataclass(frozen=True)
class SiteType:
    """`ports` are values that an expression may read; `assigns` those that it may replace, `grows` those
    that may get rows in front."""

    name: str
    ports: Mapping[str, Shape]
    assigns: tuple[str, ...]
    dims: tuple[str, ...]
    doc: str
    grows: tuple[str, ...] = ()


def _linear(name: str, doc: str, dims: tuple[str, ...] = _LINEAR_DIMS) -> SiteType:
    return SiteType(name, _LINEAR, ("x", "h", "W", "b"), dims, doc)


def _projection(side: str, what: str) -> SiteType:
    """A linear of an attention sub-layer, which also sees that sub-layer's `input`."""
    ports = {**_LINEAR, "input": ("...", "d")}
    doc = f"the {what} projection; input is the sub-layer's"
    return SiteType(f"attention.{side}", ports, ("x", "h", "W", "b"), _ATTENTION_DIMS, doc)


_KEYS: Shape = ("...", "kv_heads", "keys", "head_dim")
_QUERIES: Shape = ("...", "heads", "queries", "head_dim")
_ROWS = (
    SiteType(
        "attention",
        {"x": ("...", "in"), "h": ("...", "out")},
        ("h",),
        _ATTENTION_DIMS,
        "a sub-layer: x its input, h the output projection's result, before dropout and residual",
    ),
    *(
        _projection(side, what)
        for side, what in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    ),
    SiteType(
        "attention.heads",
        {"q": _QUERIES, "k": _KEYS, "v": _KEYS, "h": _QUERIES},
        ("q", "k", "v", "h"),
        _ATTENTION_DIMS,
        "scaled dot-product attention: per head queries, keys, values and result",
        grows=("k", "v"),
    ),
    SiteType(
        "ffn",
        {"x": ("...", "in"), "h": ("...", "out"), "residual": ("...", "out")},
        ("h",),
        _LINEAR_DIMS,
        "a feed-forward: x the first projection's input, h the last one's result; residual is added to h",
    ),
    _linear("ffn.up", "the first projection of a feed-forward"),
    _linear("ffn.gate", "the gating projection of a gated feed-forward"),
    _linear("ffn.down", "the last projection of a feed-forward"),
    _linear("ffn.linear", "every projection of a feed-forward, two or three"),
    SiteType("ffn.hidden", {"h": ("...", "out")}, ("h",), _LINEAR_DIMS, "after the activation"),
    SiteType(
        "embedding",
        {"ids": ("...", "tokens"), "h": ("...", "tokens", "out"), "W": ("vocab", "out")},
        ("h", "W"),
        (*_LINEAR_DIMS, "vocab"),
        "token embeddings: h the rows of W that ids name",
        grows=("h",),
    ),
    SiteType(
        "norm",
        {"h": ("...", "out"), "W": ("out",), "b": ("out",)},
        ("h", "W", "b"),
        _LINEAR_DIMS,
        "a layer norm or RMS norm: its result, scale and shift",
    ),
    _linear("head", "a linear of the task head: outside the pretrained body"),
    _linear("linear", "any linear, by {op: linear, scope: glob over module paths}"),
    SiteType(
        "conv",
        {
            "x": ("...", "inputs", "channels"),
            "h": ("...", "outputs", "out"),
            "W": ("out", "in"),
            "b": ("out",),
        },
        ("x", "h", "W", "b"),
        (*_LINEAR_DIMS, "channels", "groups"),
        "any convolution, by {op: conv, scope: glob}: x and h with their channels last, "
        "in = channels / groups * kernel: what one output sees",
    ),
)
# Sites that a spec names by {op: ..., scope: ...}, not by where they are in a model.
BY_OP = ("linear", "conv")
SITES: Mapping[str, SiteType] = {row.name: row for row in _ROWS}
