"""Lowering where rows are routed: a formula of one expert, for the rows of all of them.

What is `per: expert` stands as [experts, ...]. Such values among themselves are computed for all experts at once; a row
times one of them is multiplied by the matrix of its expert, as the model multiplies it, and is added to or scaled by
its expert's vector.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import fx

from peftc.graph.program import aten
from peftc.plan.edit import Edit
from peftc.rewrite.lower import Builder
from peftc.rewrite.pipeline import PassError
from peftc.sites.site import Routed

_ALIGNED = 16  # bytes


@dataclass
class RoutedBuilder(Builder):
    """Knows which values are `rows` of tokens, `routed` as it says, and which are `apart`, [experts, ...]."""

    routed: Routed = field(kw_only=True)
    rows: set[fx.Node] = field(default_factory=set)
    apart: set[fx.Node] = field(default_factory=set)

    def call(self, fn: Any, *args: Any, name: str = "", **kwargs: Any) -> fx.Node:
        """A node of `fn`, of rows, of what is of each expert, or of neither."""
        given = [one for one in args if isinstance(one, fx.Node)]
        if self.rows.isdisjoint(given):
            apart = not self.apart.isdisjoint(given)
            lined = self._lined(args, given) if apart else args
            node = super().call(fn, *lined, name=name, **kwargs)
            if apart:
                self.apart.add(node)
            return node
        if fn is aten.matmul.default and self._is_apart(args[1]):
            if args[0] not in self.rows:
                raise PassError(
                    f"'{name}' multiplies the matrices of experts by rows on their right"
                )
            node = self._times(args[0], args[1], name)
        else:
            each = [self._each(one, name) if self._is_apart(one) else one for one in args]
            node = super().call(fn, *each, name=name, **kwargs)
        self.rows.add(node)
        return node

    def _is_apart(self, one: Any) -> bool:
        return isinstance(one, fx.Node) and one in self.apart

    def _lined(self, args: Sequence[Any], given: Sequence[fx.Node]) -> list[Any]:
        """Operands of one expert's ranks: [experts, r] meets [experts, a, r] as [experts, 1, r]."""
        ranks = [one.meta["val"].ndim - (one in self.apart) for one in given]
        return [self._deep(one, max(ranks)) if self._is_apart(one) else one for one in args]

    def _deep(self, value: fx.Node, rank: int) -> fx.Node:
        for _ in range(rank + 1 - value.meta["val"].ndim):
            value = super().call(aten.unsqueeze.default, value, 1, name="deep")
        return value

    def _each(self, value: fx.Node, name: str) -> fx.Node:
        """What is of each row's expert."""
        if value.meta["val"].ndim != 2:
            raise PassError(f"'{name}': rows meet the matrices of experts in a product alone")
        return self._of_each(value, name)

    def _times(self, x: fx.Node, matrices: fx.Node, name: str) -> fx.Node:
        """Each row of x times the matrix of its expert, of [experts, in, out]: only what was routed is computed."""
        call = super().call
        if self.routed.how == "grouped":
            return self._grouped(x, matrices, name)
        if self.routed.how == "batched":
            return call(aten.matmul.default, x, matrices, name=name)
        chosen = self._of_each(matrices, name)
        row = call(aten.unsqueeze.default, x, 1, name=f"{name}_row")
        product = call(aten.bmm.default, row, chosen, name=f"{name}_product")
        return call(aten.squeeze.dim, product, 1, name=name)

    def _grouped(self, x: fx.Node, matrices: fx.Node, name: str) -> fx.Node:
        """The product in the order of the experts; torch's own takes rows of whole `_ALIGNED` bytes, so that a small rank
        gets zeros behind it."""
        call, op, value = super().call, self.routed.op, matrices.meta["val"]
        n_in, n_out = value.shape[-2:]
        step = _ALIGNED // value.element_size() if op is aten._grouped_mm.default else 1
        more_in, more_out = -n_in % step, -n_out % step
        if more_in:
            x = call(aten.constant_pad_nd.default, x, [0, more_in], name=f"{name}_wide")
        if more_in or more_out:
            sizes = [0, more_out, 0, more_in]
            matrices = call(aten.constant_pad_nd.default, matrices, sizes, name=f"{name}_whole")
        product = call(op, x, matrices, self.routed.by, name=name)
        if not more_out:
            return product
        return call(aten.slice.Tensor, product, -1, 0, n_out, name=f"{name}_part")

    def _of_each(self, values: fx.Node, name: str) -> fx.Node:
        """For each row what is of its expert, of [experts, ...]."""
        call = super().call
        if self.routed.how == "batched":
            return call(aten.unsqueeze.default, values, 1, name=f"{name}_rows")
        return call(aten.index_select.default, values, 0, self._numbers(), name=f"{name}_rows")

    def _numbers(self) -> fx.Node:
        """The number of each row's expert."""
        call, ends = super().call, self.routed.by
        assert ends is not None  # but for rows in a batch
        if self.routed.how == "gathered":
            return ends
        options = dict(dtype=ends.meta["val"].dtype, device=ends.meta["val"].device)
        count = call(aten.sym_size.int, self.routed.product, 0, name="rows")
        places = call(aten.arange.default, count, name="places", **options)
        return call(aten.searchsorted.Tensor, ends, places, right=True, name="experts")

    def only(self, edit: Edit, new: fx.Node, old: fx.Node, name: str) -> fx.Node:
        """`new` in the rows of the chosen experts, `old` in all others; `new` where none are chosen."""
        chosen = edit.entry.where.experts
        if chosen is None:
            return new
        make = super().call
        options = dict(dtype=old.meta["val"].dtype, device=old.meta["val"].device)
        parts = [
            make(aten.full.default, [1, 1], float(one in chosen), name="chosen", **options)
            for one in range(edit.site.dims["experts"])
        ]
        whole = make(aten.cat.default, parts, 0, name="chosen")
        if new in self.apart:  # weights
            rows = make(aten.unsqueeze.default, whole, 1, name="chosen")
        else:
            rows = self._of_each(whole, "chosen")
        mask = make(aten.gt.Scalar, rows, 0.5, name="mask")
        return make(aten.where.self, mask, new, old, name=name)

    def learn(self, edit: Edit, env: dict[str, Any]) -> dict[str, Any]:
        """The parameters of an edit, those of chosen experts with zeros for the others."""
        found = dict(env)
        for one in edit.parameters:
            node = found.get(one.name)
            if not one.experts or not isinstance(node, fx.Node):
                continue
            chosen = edit.entry.where.experts
            if chosen is not None:
                count = edit.site.dims["experts"]
                node = self._spread(node, chosen, count, one.name)
            self.apart.add(node)
            found[one.name] = node
        return found

    def _spread(self, values: fx.Node, chosen: Sequence[int], count: int, name: str) -> fx.Node:
        """[chosen, ...] as [count, ...], with zeros for the experts that are not chosen."""
        call, one = super().call, [1, *values.meta["val"].shape[1:]]
        none = call(aten.new_zeros.default, values, one, name=f"{name}_none")
        places = {expert: place for place, expert in enumerate(chosen)}
        parts = [
            call(aten.slice.Tensor, values, 0, places[e], places[e] + 1, name=f"{name}_{e}")
            if e in places
            else none
            for e in range(count)
        ]
        return call(aten.cat.default, parts, 0, name=f"{name}_spread")

    def keep(self, values: Iterable[fx.Node]) -> None:
        """Values of the graph that are of each expert: weights."""
        self.apart.update(values)

    def see(self, values: Iterable[fx.Node]) -> None:
        """Values of the graph that are rows."""
        self.rows.update(values)
