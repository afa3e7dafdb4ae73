"""One linear while the edits around it fold: what it reads, its weight and bias, and its result, as maps of x.

In a graph the edits of a linear act where the values flow, whatever their order in the spec: what changes the
input, then the weight, then the result; an edit of the result that reads x sees it as it was at its turn.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from peftc.language.expr import Expr, calls, names
from peftc.language.ops import OPS
from peftc.plan.algebra import inlined, numbers
from peftc.plan.edit import Edit
from peftc.rewrite.affine import Affine, NotAffine, affine
from peftc.rewrite.evaluate import Tensors, evaluate
from peftc.sites.kinds import KINDS
from peftc.sites.view import Columns

_STORED = {"W", "b"}
_THROUGH = "a convolution reads its input through a kernel, or in groups"


@dataclass(frozen=True)
class Change:
    """An edit in the words of the linear that it changes: `assign` and `reads` name x, W, b and h there. `stays` says
    why it cannot be in the weight whatever its values are, or is ""."""

    edit: Edit
    assign: Mapping[str, Expr]
    reads: frozenset[str]
    names: Mapping[str, str]
    columns: Columns | None
    stays: str = ""

    @staticmethod
    def of(edit: Edit) -> Change:
        """Raises NotAffine where the edit changes nothing of a linear."""
        folds, assigned = KINDS[edit.site.at].folds, inlined(edit)[1]
        roles = folds.ports if folds is not None else {}
        op = next((one.op for one in assigned.values() if hasattr(one, "op")), "it")
        reason = f"'{op}' rewrites '{', '.join(assigned)}', which is no linear's result"
        if folds is None or "W" not in edit.site.weights or not assigned.keys() & roles.keys():
            raise NotAffine(reason)
        read = {roles[name] for one in assigned.values() for name in names(one) if name in roles}
        assign = {roles[port]: one for port, one in assigned.items() if port in roles}
        stays = "" if assigned.keys() <= roles.keys() else reason
        columns = edit.site.weights["W"].view.columns
        return Change(edit, assign, frozenset(read), roles, columns, stays)

    @property
    def by(self) -> str:
        """The kind of map, see `peftc.sites.kinds.Folds`: in groups, a projection is a convolution as any."""
        found = KINDS[self.edit.site.at].folds
        assert found is not None
        return "kernels" if "groups" in self.edit.site.dims else found.by

    def overlaps(self, other: Change) -> bool:
        """Whether both are of the same features of the result: slices of a fused projection are not."""
        if self.columns is None or other.columns is None:
            return True
        mine, theirs = self.columns.index().tolist(), other.columns.index().tolist()
        return not set(mine).isdisjoint(theirs)

    def waits_for(self, stays: Change, first: bool) -> bool:
        """Whether this cannot be in the weight while `stays`, which stands before it if `first`, is in the graph:
        where it would be seen too early, or would see too little."""
        if "x" in self.reads and "x" in stays.assign and not first:
            return True
        return any(self._waits(role, stays, first) for role in self.assign)

    def _waits(self, role: str, stays: Change, first: bool) -> bool:
        """`waits_for`, as far as one of the values that it assigns goes."""
        changes, reads = bool(_STORED & stays.assign.keys()), bool(_STORED & stays.reads)
        if role == "x":
            seen = "x" in stays.reads and not first
            return "x" in stays.assign or seen or changes or reads
        if not self.overlaps(stays):
            return False
        if role == "h":
            return changes or reads or ("h" in stays.assign and first)
        return first if changes else reads


@dataclass(frozen=True)
class LinearMap:
    """A linear on the way: `x` as a map of its own input (None while it is just that), `weight` as specs see it,
    and `results`, the changes of h that wait for the end, each with what it saw. `by` is the kind of map, see
    `peftc.sites.kinds.Folds`."""

    by: str
    weight: torch.Tensor
    bias: torch.Tensor | None
    x: Affine | None = None
    results: tuple[tuple[Change, LinearMap], ...] = ()

    def changed(self, change: Change, tensors: Tensors) -> LinearMap:
        """This with one change more. Raises NotAffine."""
        scope = self._scope(change, tensors)
        new = self
        if "x" in change.assign:
            if self.by != "linear":
                raise NotAffine(_THROUGH)
            x = affine(change.assign["x"], {_name(change, "x"): self._input()}, *scope)
            if x.offset is not None and self.bias is None:
                raise NotAffine("the delta adds a bias and the linear has none")
            new = replace(new, x=x)
        if "W" in change.assign:
            value = _known(change.assign["W"], *scope)
            new = replace(new, weight=_put(self.weight, value, change.columns))
        if "b" in change.assign:
            value = _known(change.assign["b"], *scope)
            new = replace(new, bias=_put(self.bias, value, change.columns))
        if "h" in change.assign:
            new = replace(new, results=(*new.results, (change, self)))
        return new

    def result(self, tensors: Tensors) -> Affine:
        """h as a map of the linear's own input. Raises Stays with the change that is not affine."""
        h = self._base()
        for change, seen in self.results:
            try:
                part = seen._applied(change, _cut(h, change.columns), tensors)
                if part.offset is not None and self.bias is None:
                    raise NotAffine("the delta adds a bias and the linear has none")
            except NotAffine as reason:
                raise Stays(change, str(reason)) from reason
            h = _joined(h, part, change.columns)
        return h

    def _applied(self, change: Change, h: Affine, tensors: Tensors) -> Affine:
        expression, maps = change.assign["h"], {_name(change, "h"): h}
        if self.by == "linear":
            maps[_name(change, "x")] = self._input()
        elif self.by == "table":
            # Ids are one-hot rows, which only `lookup` reads: no matrix of vocab x vocab for them.
            maps[_name(change, "x")] = Affine(torch.eye(1, dtype=torch.float64))
        elif _name(change, "x") in names(expression):
            raise NotAffine(_THROUGH)
        result = affine(expression, maps, *self._scope(change, tensors))
        mixed = [one.op for one in calls(expression) if OPS[one.op].affine == "matmul"]
        if self.by == "kernels" and mixed and change.edit.site.dims["groups"] > 1:
            raise NotAffine(f"'{mixed[0]}' mixes the groups of the convolution")
        return result

    def _scope(
        self, change: Change, tensors: Tensors
    ) -> tuple[dict[str, torch.Tensor], dict[str, float | int]]:
        """What an expression of the change reads besides values: its own tensors, W and b; numbers."""
        env = {p.name: tensors[p.path] for p in change.edit.parameters}
        for port, value in (("W", self.weight), ("b", self.bias)):
            if value is not None and port in change.names.values():
                index = slice(None) if change.columns is None else change.columns.index()
                env[_name(change, port)] = value[index]
        return env, numbers(change.edit)

    def _input(self) -> Affine:
        size = self.weight.shape[-1]
        return self.x or Affine(torch.eye(size, dtype=torch.float64))

    def stored(self, matrix: torch.Tensor) -> torch.Tensor:
        """A map's matrix as the weight that specs see, and back: a linear's is [out, in]."""
        return matrix if self.by in ("table", "vector") else matrix.T

    def _base(self) -> Affine:
        """The linear of what it reads, before anything changes its result."""
        matrix = self.stored(self.weight)
        if self.x is None:
            return Affine(matrix, self.bias)
        offset = None if self.x.offset is None else self.x.offset @ matrix
        if self.bias is not None:
            offset = self.bias if offset is None else self.bias + offset
        return Affine(self.x.matrix @ matrix, offset)


class Stays(Exception):
    """A change that is no affine map, and why."""

    def __init__(self, change: Change, reason: str) -> None:
        super().__init__(reason)
        self.change, self.reason = change, reason


def _name(change: Change, role: str) -> str:
    """What the change's expressions call a role: `h` of `ffn.hidden` is the x of a linear."""
    return next((name for name, one in change.names.items() if one == role), "")


def _known(expression: Expr, env: Tensors, sizes: Mapping[str, float | int]) -> torch.Tensor:
    unknown = [name for name in names(expression) if name not in env and name not in sizes]
    if unknown:
        raise NotAffine(f"it reads '{unknown[0]}'")
    return evaluate(expression, env, sizes)


def _put(old: torch.Tensor | None, value: torch.Tensor, columns: Columns | None) -> torch.Tensor:
    assert old is not None  # the plan refuses a bias that is not there
    if columns is None:
        return value.expand_as(old).clone()
    new = old.clone()
    new[columns.index()] = value
    return new


def _cut(h: Affine, columns: Columns | None) -> Affine:
    if columns is None:
        return h
    part = columns.index()
    return Affine(h.matrix[:, part], None if h.offset is None else h.offset[part])


def _joined(h: Affine, part: Affine, columns: Columns | None) -> Affine:
    if columns is None:
        return part
    index, matrix, offset = columns.index(), h.matrix.clone(), h.offset
    matrix[:, index] = part.matrix
    if offset is not None:  # a linear without a bias keeps a change that adds one
        offset = offset.clone()
        offset[index] = 0.0 if part.offset is None else part.offset
    return Affine(matrix, offset)
