"""A Site: a place of a model that a spec can name, by what stays the same in every graph of the model."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from peftc.errors import PeftcError
from peftc.sites.cores import Core
from peftc.sites.view import Port, Weight


class SiteError(PeftcError):
    """A planned site that another entry of the model does not have in the same form."""


@dataclass(frozen=True)
class Hidden:
    """What a feed-forward computes between its two linears: one `op` of the op table, of the result of the first, whose
    bias is at the path `bias`, "" where it has none."""

    op: str
    bias: str


@dataclass(frozen=True)
class Site:
    """A place, named by parameter paths and its module path.

    `weights` maps a role to a parameter and how a spec sees it: the ports `W` and `b` are those of the linear,
    convolution, norm or table that makes `h` (of `ffn.hidden`: that reads it); other roles (`q` of an attention,
    `up` and `gate` of a feed-forward) are the parameters that the site is found by. `ids` is the input that an
    embedding reads; `dims` are the sizes that specs may use; `absent` has the ports that this site lacks, each
    with the reason. `hidden` is of a feed-forward whose activation is one op, `counts_back` of a core (see `Core`).
    """

    at: str
    scope: str
    dims: Mapping[str, int] = field(hash=False)
    weights: Mapping[str, Weight] = field(hash=False)
    kind: str = ""
    stack: str = ""
    ids: str = ""
    absent: Mapping[str, str] = field(default_factory=dict, hash=False)
    hidden: Hidden | None = None
    counts_back: bool = False

    @property
    def name(self) -> str:
        return f"{self.scope}:{self.at}"

    @property
    def layer(self) -> int | None:
        return layer_of(self.scope)

    @property
    def group(self) -> str:
        """What `per: kind` shares over: the stack and the kind of attention."""
        return "_".join(part for part in (self.stack, self.kind) if part)

    @property
    def is_slice(self) -> bool:
        """Whether its W is some of the columns of a fused projection."""
        return "W" in self.weights and self.weights["W"].view.columns is not None


@dataclass(frozen=True)
class NoSite:
    """Something that looks like a site of the kinds `at` and is none: a module or parameter, and why."""

    at: tuple[str, ...]
    path: str
    reason: str


@dataclass(frozen=True)
class Routed:
    """`how` rows are laid out. `grouped`: in the order of the experts, and `by` [experts] says where the rows of each
    end; `op` multiplies them so. `gathered`: `by` [rows] has their experts' numbers. `batched`: [experts, rows, in].
    `product` is the node that this is of."""

    how: str
    by: fx.Node | None
    product: fx.Node
    op: Any = None


@dataclass(frozen=True)
class Place:
    """A site in one graph: its ports.

    Where rows go in front of a port: `holds` says whether this graph gets them (a decoder that steps through a
    cache finds them there), `behind(call, value, rows)` gives the value that they go in front of, and `core` is the
    attention whose masks and sizes must know of them; a bias of it counts from the last key. `routed` says of experts'
    rows whose they are.
    """

    ports: Mapping[str, Port]
    holds: bool = True
    behind: Callable[..., Any] | None = None
    core: Core | None = None
    routed: Routed | None = None


def innermost(scopes: Iterable[str]) -> str:
    """The path of the innermost module that all of these are in."""
    shared: list[str] = []
    for parts in zip(*(scope.split(".") for scope in scopes)):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return ".".join(shared)


def layer_of(scope: str) -> int | None:
    """The first number in a module path."""
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", scope)
    return int(number[1]) if number else None
