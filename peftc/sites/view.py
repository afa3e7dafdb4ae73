"""Views: one way from what a model holds to what a spec sees, and back.

A spec's `W` is [out, in], its `x` and `h` have their features last. GPT-2 stores W turned, a fused projection
has several of them side by side, a convolution has kernels and channels in front. Inserting, folding,
initialising, pruning, importing and exporting all go through `View.read` and `View.write`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from peftc.graph.program import Read, Value, aten

# Makes a node of an op, as `Builder.call`, or computes it, as `compute`.
Call = Callable[..., Any]


def compute(op: Callable[..., Any], *args: Any, name: str = "", **kwargs: Any) -> Any:
    """The value of an op, where a graph would get a node called `name`."""
    return op(*args, **kwargs)


@dataclass(frozen=True)
class Columns:
    """The features [start, stop) in each of `groups` groups of `period` features: a slice of a fused
    projection, contiguous (one group) or interleaved by heads. The values of GPT-2's `c_attn` of width 8
    are (groups=1, start=16, stop=24, period=24); GPT-NeoX's, with 2 heads of 4, (2, 8, 12, 12)."""

    groups: int
    start: int
    stop: int
    period: int

    @property
    def count(self) -> int:
        return self.groups * (self.stop - self.start)

    def index(self) -> torch.Tensor:
        """The features, in order."""
        first = torch.arange(self.groups)[:, None] * self.period
        return (first + torch.arange(self.start, self.stop)).flatten()


@dataclass(frozen=True)
class Form:
    """Another layout of the same elements: an op with its arguments, and its inverse; perhaps of a layout that is
    another already (`of`)."""

    op: Any
    args: tuple[Any, ...]
    inverse: Any
    inverse_args: tuple[Any, ...]
    name: str
    of: Form | None = None

    def into(self, call: Call, value: Any, name: str) -> Any:
        """What is in the other layout."""
        first = value if self.of is None else self.of.into(call, value, name)
        return call(self.op, first, *self.args, name=f"{name}_{self.name}")

    def back(self, call: Call, value: Any, name: str) -> Any:
        """What was in the other layout."""
        first = call(self.inverse, value, *self.inverse_args, name=f"{name}_back")
        return first if self.of is None else self.of.back(call, first, name)


TURNED = Form(aten.transpose.int, (0, 1), aten.transpose.int, (0, 1), "turned")


def kernels(shape: tuple[int, ...]) -> Form:
    """A convolution's weight [out, *shape] as the matrix [out, channels / groups * kernel]."""
    return Form(aten.flatten.using_ints, (1,), aten.unflatten.int, (1, shape), "flat")


def channels_last(axes: int) -> Form:
    """[batch, channels, *axes] with the channels behind the `axes` spatial axes."""
    return Form(aten.movedim.int, (-axes - 1, -1), aten.movedim.int, (-1, -axes - 1), "last")


@dataclass(frozen=True)
class View:
    """Some `columns` along `axis` (0 of a weight or bias, -2 of experts' weights, -1 of a value) of a value in another
    `form`."""

    form: Form | None = None
    columns: Columns | None = None
    axis: int = 0

    def read(self, call: Call, whole: Any, name: str = "") -> Any:
        """What a spec sees of `whole`."""
        value = self._formed(call, whole, name)
        if self.columns is None:
            return value
        one, (first, second) = self.columns, self._pair
        if one.groups == 1:
            return call(aten.slice.Tensor, value, self.axis, one.start, one.stop, name=name)
        groups = self._grouped(call, value, one.period, f"{name}_groups")
        mine = call(aten.slice.Tensor, groups, second, one.start, one.stop, name=f"{name}_mine")
        return call(aten.flatten.using_ints, mine, first, second, name=name)

    def write(self, call: Call, whole: Any, part: Any, name: str = "") -> Any:
        """What `whole` becomes when what a spec sees of it becomes `part`."""
        full = part if self.columns is None else self._put(call, whole, part, name)
        return full if self.form is None else self.form.back(call, full, name)

    def _formed(self, call: Call, whole: Any, name: str) -> Any:
        return whole if self.form is None else self.form.into(call, whole, name)

    def _put(self, call: Call, whole: Any, part: Any, name: str) -> Any:
        assert self.columns is not None
        one, (first, second) = self.columns, self._pair
        old, bounds = self._formed(call, whole, name), (one.start, one.stop)
        scatter = aten.slice_scatter.default
        if one.groups == 1:
            return call(scatter, old, part, self.axis, *bounds, name=f"{name}_put")
        groups = self._grouped(call, old, one.period, f"{name}_groups")
        mine = self._grouped(call, part, one.stop - one.start, f"{name}_mine")
        both = call(scatter, groups, mine, second, *bounds, name=f"{name}_put")
        return call(aten.flatten.using_ints, both, first, second, name=f"{name}_whole")

    def _grouped(self, call: Call, value: Any, size: int, name: str) -> Any:
        assert self.columns is not None
        split = [self.columns.groups, size]
        return call(aten.unflatten.int, value, self.axis, split, name=name)

    @property
    def _pair(self) -> tuple[int, int]:
        """The two axes that `axis` becomes when it is split in groups."""
        return (self.axis - 1, self.axis) if self.axis < 0 else (0, 1)


PLAIN = View()


@dataclass(frozen=True)
class Weight:
    """A parameter of the backbone and how a spec sees it; `also` names another op that reads the same
    parameter (a tied embedding, a fused kernel), so that changing it here would change it there."""

    path: str
    view: View = PLAIN
    also: str = ""

    def read(self, stored: torch.Tensor) -> torch.Tensor:
        """What a spec sees of the stored tensor: a linear's W [out, in]."""
        value: torch.Tensor = self.view.read(compute, stored)
        return value

    def write(self, stored: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """The tensor to store when a spec sees `value`."""
        whole: torch.Tensor = self.view.write(compute, stored, value)
        return whole


@dataclass(frozen=True)
class Part:
    """A port inside another value of the graph: what a view shows of it."""

    whole: Read | Value
    view: View


# Where a port is in one graph.
Port = Read | Value | Part


def whole(port: Port) -> Read | Value:
    """The edge or value of the graph that a port is, or is part of."""
    return port.whole if isinstance(port, Part) else port


def root(port: Port) -> fx.Node:
    """The node that a port belongs to: the consumer of an operand, the producer of a result."""
    one = whole(port)
    return one.user if isinstance(one, Read) else one.node
