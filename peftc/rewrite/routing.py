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
from peftc.sites.routed import Routed


@dataclass
class RoutedBuilder(Builder):
    """Knows which values are `rows` of tokens, and which are `apart`, [experts, ...]."""

    routed: Routed | None = None
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
            assert self.routed is not None
            node = self.routed.times(super().call, args[0], args[1], name)
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
        assert self.routed is not None
        node: fx.Node = self.routed.each(super().call, value, name)
        return node

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
            assert self.routed is not None
            rows = self.routed.each(make, whole, "chosen")
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
                node = Routed.spread(super().call, node, chosen, count, one.name)
            self.apart.add(node)
            found[one.name] = node
        return found

    def keep(self, values: Iterable[fx.Node]) -> None:
        """Values of the graph that are of each expert: weights."""
        self.apart.update(values)

    def see(self, values: Iterable[fx.Node]) -> None:
        """Values of the graph that are rows."""
        self.rows.update(values)
