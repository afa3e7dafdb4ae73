"""Routed rows: how a product with the matrices of experts knows the expert of each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from peftc.graph.program import aten

Call = Callable[..., Any]
_ALIGNED = 16  # bytes


@dataclass(frozen=True)
class Routed:
    """`how` rows are laid out. `grouped`: in the order of the experts, and `by` [experts] says where the rows of each
    end; `op` multiplies them so. `gathered`: `by` [rows] has their experts' numbers. `batched`: [experts, rows, in].
    `product` is the node that this is of."""

    how: str
    by: fx.Node | None
    product: fx.Node
    op: Any = None

    def times(self, call: Call, x: Any, matrices: Any, name: str) -> Any:
        """Each row of x times the matrix of its expert, of [experts, in, out]: only what was routed is computed."""
        if self.how == "grouped":
            return self._grouped(call, x, matrices, name)
        if self.how == "batched":
            return call(aten.matmul.default, x, matrices, name=name)
        chosen = self.each(call, matrices, name)
        row = call(aten.unsqueeze.default, x, 1, name=f"{name}_row")
        product = call(aten.bmm.default, row, chosen, name=f"{name}_product")
        return call(aten.squeeze.dim, product, 1, name=name)

    def _grouped(self, call: Call, x: Any, matrices: Any, name: str) -> Any:
        """The product in the order of the experts; torch's own takes rows of whole `_ALIGNED` bytes, so that a small rank
        gets zeros behind it."""
        value = matrices.meta["val"]
        n_in, n_out = value.shape[-2:]
        step = _ALIGNED // value.element_size() if self.op is aten._grouped_mm.default else 1
        more_in, more_out = -n_in % step, -n_out % step
        if more_in:
            x = call(aten.constant_pad_nd.default, x, [0, more_in], name=f"{name}_wide")
        if more_in or more_out:
            sizes = [0, more_out, 0, more_in]
            matrices = call(aten.constant_pad_nd.default, matrices, sizes, name=f"{name}_whole")
        product = call(self.op, x, matrices, self.by, name=name)
        if not more_out:
            return product
        return call(aten.slice.Tensor, product, -1, 0, n_out, name=f"{name}_part")

    def each(self, call: Call, values: Any, name: str) -> Any:
        """For each row what is of its expert, of [experts, ...]."""
        if self.how == "batched":
            return call(aten.unsqueeze.default, values, 1, name=f"{name}_rows")
        return call(aten.index_select.default, values, 0, self._numbers(call), name=f"{name}_rows")

    def _numbers(self, call: Call) -> Any:
        """The number of each row's expert."""
        if self.how == "gathered":
            return self.by
        assert self.by is not None
        ends = self.by.meta["val"]
        count = call(aten.sym_size.int, self.product, 0, name="rows")
        options = dict(dtype=ends.dtype, device=ends.device)
        places = call(aten.arange.default, count, name="places", **options)
        return call(aten.searchsorted.Tensor, self.by, places, right=True, name="experts")

    @staticmethod
    def spread(call: Call, values: Any, chosen: Sequence[int], count: int, name: str) -> Any:
        """[chosen, ...] as [count, ...], with zeros for the experts that are not chosen."""
        none = call(
            aten.new_zeros.default, values, [1, *values.meta["val"].shape[1:]], name=f"{name}_none"
        )
        places = {expert: place for place, expert in enumerate(chosen)}
        parts = [
            call(aten.slice.Tensor, values, 0, places[e], places[e] + 1, name=f"{name}_{e}")
            if e in places
            else none
            for e in range(count)
        ]
        return call(aten.cat.default, parts, 0, name=f"{name}_spread")
