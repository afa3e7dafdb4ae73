"""The site table: which places a spec can name, and the ports they offer. A new kind is a row, and its file in
`peftc/sites`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

from peftc.language.expr import Shape

# What a port is, whatever its name: logic asks the role.
INPUT, RESULT, RESIDUAL, IDS = "input", "result", "residual", "ids"
QUERIES, KEYS, VALUES = "queries", "keys", "values"
WEIGHT, BIAS = "weight", "bias"
STORED = (WEIGHT, BIAS)  # what a model keeps; all others are values that flow


@dataclass(frozen=True)
class Port:
    """A value that an expression may read and, where `assign` says so, replace.

    `rows` names what may get rows in front: ports of one site with the same word grow together, such as keys
    and values. Axes of `shape` are dims of the site; "..." stands for the axes before them.
    """

    shape: Shape
    role: str
    assign: bool = True
    rows: str = ""


class Drawn(NamedTuple):
    """How people draw a sub-layer: its `place` among those of a layer, in most models, its title, and what is between its
    projections."""

    place: int
    title: str
    core: str


@dataclass(frozen=True)
class SiteType:
    """A kind of site. `dims` are the sizes that specs may use; `counted` says whether the papers count what
    trains here; a site `by_op` is named {op: ..., scope: ...}, not by where it is in a model.
    `several` stands for any of the projections of its sub-layer. Of a whole sub-layer, `drawn` says how it looks in
    pictures; of what stands between two, `between` is its title."""

    name: str
    ports: dict[str, Port]
    dims: tuple[str, ...]
    doc: str
    counted: bool = True
    by_op: bool = False
    several: bool = False
    drawn: Drawn | None = None
    between: str = ""

    @property
    def sublayer(self) -> str:
        """The kind of the sub-layer that it is, or is part of."""
        return self.name.partition(".")[0]

    @property
    def part(self) -> str:
        """What it is of its sub-layer; "" where it is the whole."""
        return self.name.partition(".")[2]

    @property
    def projects(self) -> bool:
        """Whether it is one projection of a sub-layer, by its own name."""
        return bool(self.part) and "W" in self.ports and not self.several

    @property
    def assigns(self) -> tuple[str, ...]:
        """The ports that a spec may replace."""
        return tuple(name for name, port in self.ports.items() if port.assign)

    @property
    def grows(self) -> tuple[str, ...]:
        """The ports that may get rows in front."""
        return tuple(name for name, port in self.ports.items() if port.rows)

    @property
    def shapes(self) -> dict[str, Shape]:
        """The shape of each port, in names of dims."""
        return {name: port.shape for name, port in self.ports.items()}

    def having(self, *roles: str) -> tuple[str, ...]:
        """The names of the ports of these roles."""
        return tuple(name for name, port in self.ports.items() if port.role in roles)


_LINEAR_DIMS = ("in", "out", "d")
_HEAD_DIMS = ("heads", "kv_heads", "head_dim", "value_dim", "kv")
_ATTENTION_DIMS = (*_LINEAR_DIMS, *_HEAD_DIMS)
_WEIGHTS = {"W": Port(("out", "in"), WEIGHT), "b": Port(("out",), BIAS)}
_LINEAR = {"x": Port(("...", "in"), INPUT), "h": Port(("...", "out"), RESULT), **_WEIGHTS}


def _linear(name: str, doc: str, **more: Any) -> SiteType:
    return SiteType(name, _LINEAR, _LINEAR_DIMS, doc, **more)


def _projection(side: str, what: str) -> SiteType:
    """A linear of an attention sub-layer, which also sees that sub-layer's `input`."""
    ports = {**_LINEAR, "input": Port(("...", "d"), INPUT, assign=False)}
    doc = f"the {what} projection; input is the sub-layer's"
    return SiteType(f"attention.{side}", ports, _ATTENTION_DIMS, doc)


_ROWS = (
    SiteType(
        "attention",
        {
            "x": Port(("...", "in"), INPUT, assign=False),
            "h": Port(("...", "out"), RESULT),
        },
        _ATTENTION_DIMS,
        "a sub-layer: x its input, h the output projection's result, before dropout and residual",
        drawn=Drawn(0, "attention", "softmax(q kᵀ) v"),
    ),
    *(
        _projection(side, what)
        for side, what in (("q", "query"), ("k", "key"), ("v", "value"), ("o", "output"))
    ),
    *(
        _linear(f"attention.{side}_down", f"the first of two {what} projections, one after another")
        for side, what in (("q", "query"), ("k", "key"), ("v", "value"))
    ),
    SiteType(
        "attention.heads",
        {
            "q": Port(("...", "heads", "queries", "head_dim"), QUERIES),
            "k": Port(("...", "kv_heads", "keys", "head_dim"), KEYS, rows="keys"),
            "v": Port(("...", "kv_heads", "keys", "value_dim"), VALUES, rows="keys"),
            "h": Port(("...", "heads", "queries", "value_dim"), RESULT),
        },
        _ATTENTION_DIMS,
        "scaled dot-product attention: per head queries, keys, values and result",
    ),
    SiteType(
        "ffn",
        {
            "x": Port(("...", "in"), INPUT, assign=False),
            "h": Port(("...", "out"), RESULT),
            "residual": Port(("...", "out"), RESIDUAL, assign=False),
        },
        _LINEAR_DIMS,
        "a feed-forward: x the first projection's input, h the last one's result; residual is added to h",
        drawn=Drawn(2, "feed-forward", "activation"),
    ),
    _linear("ffn.up", "the first projection of a feed-forward"),
    _linear("ffn.gate", "the gating projection of a gated feed-forward"),
    _linear("ffn.down", "the last projection of a feed-forward"),
    _linear("ffn.linear", "every projection of a feed-forward, two or three", several=True),
    SiteType(
        "ffn.hidden", {"h": Port(("...", "out"), RESULT)}, _LINEAR_DIMS, "after the activation"
    ),
    SiteType(
        "embedding",
        {
            "ids": Port(("...", "tokens"), IDS, assign=False),
            "h": Port(("...", "tokens", "out"), RESULT, rows="tokens"),
            "W": Port(("vocab", "out"), WEIGHT),
        },
        (*_LINEAR_DIMS, "vocab"),
        "token embeddings: h the rows of W that ids name",
    ),
    SiteType(
        "norm",
        {
            "h": Port(("...", "out"), RESULT),
            "W": Port(("out",), WEIGHT),
            "b": Port(("out",), BIAS),
        },
        _LINEAR_DIMS,
        "a layer norm or RMS norm: its result, scale and shift",
        between="norm",
    ),
    SiteType(
        "mixer",
        {
            "x": Port(("...", "in"), INPUT, assign=False),
            "h": Port(("...", "out"), RESULT),
        },
        _LINEAR_DIMS,
        "a state space or linear attention: x its input, h the last projection's result",
        drawn=Drawn(1, "mixer", "scan"),
    ),
    _linear("mixer.in", "every projection of a mixer's input"),
    _linear("mixer.out", "the last projection of a mixer"),
    _linear("router", "the linear that scores experts"),
    *(
        SiteType(
            f"experts{part}",
            {
                "x": Port(("...", "in"), INPUT),
                "h": Port(("...", "out"), RESULT),
                "W": Port(("out", "in"), WEIGHT),
            },
            (*_LINEAR_DIMS, "experts"),
            f"{what} of a mixture's experts: the rows that were routed, a formula of one expert",
            drawn=None if part else Drawn(3, "experts", "activation"),
        )
        for part, what in (
            ("", "every projection"),
            (".up", "the first projection"),
            (".gate", "the gating projection"),
            (".down", "the last projection"),
        )
    ),
    _linear("head", "a linear of the task head: outside the pretrained body", counted=False),
    _linear("linear", "any linear, by {op: linear, scope: glob over module paths}", by_op=True),
    SiteType(
        "conv",
        {
            "x": Port(("...", "inputs", "channels"), INPUT),
            "h": Port(("...", "outputs", "out"), RESULT),
            **_WEIGHTS,
        },
        (*_LINEAR_DIMS, "channels", "groups"),
        "any convolution, by {op: conv, scope: glob}: x and h with their channels last, "
        "in = channels / groups * kernel: what one output sees",
        by_op=True,
    ),
)
SITES: dict[str, SiteType] = {row.name: row for row in _ROWS}


def site_dims() -> frozenset[str]:
    """Sizes of a site that may be equal on a real model, whatever they are called; the plan compares numbers."""
    axes = {axis for row in SITES.values() for port in row.ports.values() for axis in port.shape}
    sizes = {dim for row in SITES.values() for dim in row.dims}
    return frozenset(str(one) for one in axes | sizes) - {"..."}


def by_op() -> tuple[str, ...]:
    """Sites that a spec names by {op: ..., scope: ...}."""
    return tuple(row.name for row in SITES.values() if row.by_op)
