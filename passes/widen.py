"""Widen: a parallel adapter with the activation of the feed-forward beside it becomes hidden units of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from peftc.language.expr import Call, Expr, Name
from peftc.plan.algebra import inlined, numbers, replaced
from peftc.plan.edit import Edit
from peftc.rewrite.affine import Affine, NotAffine, affine
from peftc.rewrite.folding import Folding


@dataclass(frozen=True)
class Widen:
    """`h + f(x @ down + b) @ up` behind `h = f(x @ W1 + b1) @ W2 + b2` is `f(x @ [W1 down] + [b1 b]) @ [W2 up] + b2`:
    no op is left of it. What stays says why; where a configuration has no feed-forward of such a width, all stay."""

    name: str = "widen"

    def run(self, folding: Folding) -> int:
        if folding.refitted is None:
            return 0
        groups: dict[str, list[Edit]] = {}
        for edit in folding.edits:
            if edit.site.hidden is not None:
                groups.setdefault(edit.site.weights["W"].path, []).append(edit)
        found: dict[str, torch.Tensor] = {}
        widened: dict[tuple[int, str], str] = {}
        for path, edits in groups.items():
            try:
                found |= _widened(edits, folding)
            except NotAffine as reason:
                for edit in edits:
                    folding.reasons[edit.key] = str(reason)
            else:
                widened |= {edit.key: path for edit in edits}
        if not widened:
            return 0
        folding.like = folding.refitted({path: value.shape for path, value in found.items()})
        if folding.like is None:
            none = "no configuration of this model has feed-forwards as wide as they would be"
            folding.reasons |= dict.fromkeys(widened, none)
            return 0
        for path, value in found.items():
            folding.put(path, value)
        folding.folded |= widened
        folding.by |= dict.fromkeys(widened, self.name)
        folding.edits[:] = [edit for edit in folding.edits if edit.key not in widened]
        return len(widened)


def _widened(edits: Sequence[Edit], folding: Folding) -> dict[str, torch.Tensor]:
    """The parameters of one feed-forward with all its edits in it. Raises NotAffine."""
    weights, hidden = edits[0].site.weights, edits[0].site.hidden
    assert hidden is not None
    first, last, bias = weights["up"], weights["W"], weights.get("b")
    for one in (first, last):
        if one.path in folding.tied or one.also:
            raise NotAffine(f"'{one.path}' is read elsewhere too")
    for other in folding.edits:
        shared = {first.path, last.path} & {one.path for one in other.site.weights.values()}
        if shared and other not in edits:
            raise NotAffine(f"{other.name} stays at the same feed-forward")
    paths = {first: hidden.bias, last: "" if bias is None else bias.path}
    inner, outer = (
        Affine(weight.read(folding.now(weight.path)).T, folding.now(path) if path else None)
        for weight, path in paths.items()
    )
    for edit in edits:
        inner, outer = _with(edit, hidden.op, inner, outer, folding.tensors)
    found = {}
    for (weight, path), now in zip(paths.items(), (inner, outer), strict=True):
        found[weight.path] = weight.write(folding.now(weight.path), now.matrix.T)
        if path and now.offset is not None:
            found[path] = now.offset
        elif now.offset is not None:
            raise NotAffine("the delta adds a bias and the feed-forward has none")
    return found


def _with(
    edit: Edit, op: str, inner: Affine, outer: Affine, tensors: Mapping[str, torch.Tensor]
) -> tuple[Affine, Affine]:
    """The two linears around `op` with an edit's hidden units behind theirs. Raises NotAffine where it is something
    else."""
    assigned = inlined(edit)[1]
    if assigned.keys() != {"h"}:
        raise NotAffine(f"it rewrites '{', '.join(assigned)}'")
    scope = {one.name: tensors[one.path] for one in edit.parameters}, numbers(edit)
    calls = dict.fromkeys(_called(assigned["h"], op))
    x = Affine(_eye(edit.site.dims["in"]))
    try:
        units = [affine(one.args[0], {"x": x}, *scope) for one in calls]
    except NotAffine as reason:
        raise NotAffine(f"'{op}' is not affine, nor what it is of a map of x") from reason
    # The result is a map of h, as it was, and of the units.
    names: dict[Expr, Name] = {one: Name(f"unit {i}") for i, one in enumerate(calls)}
    sizes = [edit.site.dims["out"], *(one.matrix.shape[1] for one in units)]
    blocks = map(Affine, torch.split(_eye(sum(sizes)), sizes, 1))
    maps = dict(zip(("h", *(one.id for one in names.values())), blocks, strict=True))
    try:
        result = affine(replaced(assigned["h"], names), maps, *scope)
    except NotAffine as reason:
        own = "" if calls else f", and its feed-forward's own is '{op}'"
        raise NotAffine(f"{reason}{own}") from reason
    kept, up = torch.split(result.matrix, [sizes[0], sum(sizes[1:])])
    if not torch.equal(kept, _eye(sizes[0])):
        outer = Affine(outer.matrix @ kept, None if outer.offset is None else outer.offset @ kept)
    return (
        Affine(torch.cat([one.matrix for one in (inner, *units)], 1), _offset((inner, *units))),
        Affine(torch.cat([outer.matrix, up]), _sum(outer.offset, result.offset)),
    )


def _offset(maps: Sequence[Affine]) -> torch.Tensor | None:
    """The offsets side by side; None where no map has one."""
    if all(one.offset is None for one in maps):
        return None
    return torch.cat([one.matrix[0] * 0 if one.offset is None else one.offset for one in maps])


def _sum(one: torch.Tensor | None, other: torch.Tensor | None) -> torch.Tensor | None:
    return other if one is None else one if other is None else one + other


def _eye(size: int) -> torch.Tensor:
    return torch.eye(size, dtype=torch.float64)


def _called(expression: Expr, op: str) -> list[Call]:
    """The outermost calls of an op."""
    if not isinstance(expression, Call):
        return []
    if expression.op == op:
        return [expression]
    return [one for arg in expression.args for one in _called(arg, op)]
