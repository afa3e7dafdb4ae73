"""FoldAffine: a delta that is an affine map of its linear's input becomes part of weight and bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from peftc.language.expr import names
from peftc.plan.algebra import inlined
from peftc.plan.edit import Edit
from peftc.rewrite.affine import Affine, NotAffine
from peftc.rewrite.folding import Folding, Key
from peftc.rewrite.linear_map import Change, LinearMap, Stays
from peftc.rewrite.tying import own_path
from peftc.sites.kinds import KINDS
from peftc.sites.site import Site
from peftc.sites.view import Weight


@dataclass(frozen=True)
class FoldAffine:
    """LoRA, IA3, VeRA and the like, one linear at a time: decided by the op table, not by method. What stays says
    why, and so does what would be seen too early or too late because of it."""

    name: str = "fold_affine"

    def run(self, folding: Folding) -> int:
        groups: dict[str, list[Change]] = {}
        for edit in folding.edits:
            try:
                change = Change.of(edit)
                groups.setdefault(_target(change, folding), []).append(change)
            except NotAffine as reason:
                folding.reasons[edit.key] = str(reason)
        before = len(folding.edits)
        for path, changes in groups.items():
            _fold(path, changes, folding)
        folding.by |= {key: self.name for key in folding.folded if key not in folding.by}
        folding.edits[:] = [edit for edit in folding.edits if edit.key not in folding.folded]
        return before - len(folding.edits)


def _target(change: Change, folding: Folding) -> str:
    """The weight that a change would be part of; of a tied one that can be untied, the site's own."""
    weight = change.edit.site.weights["W"]
    own = own_path(change.edit)
    if weight.path in folding.tied:
        if own not in folding.separable:
            raise NotAffine(f"'{weight.path}' is tied to another parameter")
        return own
    if weight.also:
        raise NotAffine(f"'{weight.also}' reads this weight too")
    return weight.path


def _fold(path: str, changes: Sequence[Change], folding: Folding) -> None:
    """Put every change of one linear that can be there into its weight and bias."""
    site = max((one.edit.site for one in changes), key=lambda one: "b" in one.weights)
    if "experts" in site.dims:
        _fold_each(path, changes, site, folding)
        return
    weight, bias = _whole(site.weights["W"], path), site.weights.get("b")
    start = LinearMap(
        changes[0].by,
        weight.read(folding.read(path).detach().double()),
        None if bias is None else folding.read(bias.path).detach().double(),
    )
    stays = {one.edit.key: one.stays for one in changes if one.stays}
    stays |= {
        one.edit.key: f"{reader.name} reads the input that it changes"
        for one in changes
        if "x" in one.assign and (reader := _reader(one.edit, folding))
    }
    while True:
        _wait(changes, stays)
        try:
            made = _composed([one for one in changes if one.edit.key not in stays], start, folding)
        except Stays as one:
            stays[one.change.edit.key] = one.reason
        else:
            break
    folding.reasons |= stays
    folding.folded |= {one.edit.key: path for one in changes if one.edit.key not in stays}
    if len(stays) == len(changes):
        return
    stored = folding.read(path).detach().double()
    folding.put(path, weight.write(stored, start.stored(made.matrix)))
    if bias is not None:  # of a result that nothing is added to any more, it is zero
        nothing = torch.zeros(made.matrix.shape[-1], dtype=torch.float64)
        folding.put(bias.path, nothing if made.offset is None else made.offset)


def _fold_each(path: str, changes: Sequence[Change], site: Site, folding: Folding) -> None:
    """`_fold` of the weights of experts, [experts, ...]: each is a linear of its own, with what is of it."""
    weight, bias = _whole(site.weights["W"], path), site.weights.get("b")
    matrices = weight.read(folding.read(path).detach().double()).clone()
    offsets = None if bias is None else folding.read(bias.path).detach().double().clone()
    stays: dict[Key, str] = {}
    for expert, matrix in enumerate(matrices):
        start = LinearMap(
            "linear", matrix.clone(), None if offsets is None else offsets[expert].clone()
        )
        mine = [one for one in changes if _is_of(one.edit, expert)]
        own = replace(folding, tensors=_tensors_of(mine, expert, folding.tensors))
        try:
            made = _composed(mine, start, own)
        except Stays as one:
            stays[one.change.edit.key] = one.reason
            break
        matrices[expert] = start.stored(made.matrix)
        if offsets is not None and made.offset is not None:
            offsets[expert] = made.offset
    if stays:  # whatever is around it would be seen by it
        reason = next(iter(stays.values()))
        folding.reasons |= {one.edit.key: stays.get(one.edit.key, reason) for one in changes}
        return
    folding.folded |= {one.edit.key: path for one in changes}
    folding.put(path, weight.write(folding.read(path).detach().double(), matrices))
    if bias is not None and offsets is not None:
        folding.put(bias.path, offsets)


def _is_of(edit: Edit, expert: int) -> bool:
    chosen = edit.entry.where.experts
    return chosen is None or expert in chosen


def _tensors_of(
    changes: Sequence[Change], expert: int, tensors: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The tensors as one expert sees them."""
    found = dict(tensors)
    for change in changes:
        chosen = change.edit.entry.where.experts
        place = expert if chosen is None else chosen.index(expert)
        found |= {p.path: tensors[p.path][place] for p in change.edit.parameters if p.experts}
    return found


def _reader(edit: Edit, folding: Folding) -> Edit | None:
    """An edit behind this one that reads what this one's linear reads, at another site. It sees no more of the
    change once that is in the weight, and it cannot be in a weight itself: what it reads is another linear's."""
    path, order = edit.site.weights["W"].path, [one.key for one in folding.edits]
    for other in folding.edits[order.index(edit.key) + 1 :]:
        read = {name for one in inlined(other)[1].values() for name in names(one)}
        for port, role in KINDS[other.site.at].operands.items():
            if port in read and other.site.weights[role].path == path:
                return other
    return None


def _whole(weight: Weight, path: str) -> Weight:
    """The weight without the cut that a slice of a fused projection makes."""
    return Weight(path, type(weight.view)(weight.view.form))


def _wait(changes: Sequence[Change], stays: dict[Key, str]) -> None:
    """Add to what stays all that depends on it."""
    moved = True
    while moved:
        moved = False
        for i, one in enumerate(changes):
            for j, other in enumerate(changes):
                if one.edit.key in stays or other.edit.key not in stays:
                    continue
                if one.waits_for(other, j < i):
                    what = "an earlier" if j < i else "a later"
                    stays[one.edit.key] = f"{what} delta of the same linear stays"
                    moved = True


def _composed(changes: Sequence[Change], start: LinearMap, folding: Folding) -> Affine:
    """The linear with all changes in it. Raises Stays with the first that is not affine."""
    now = start
    for one in changes:
        try:
            now = now.changed(one, folding.tensors)
        except NotAffine as reason:
            raise Stays(one, str(reason)) from reason
    return now.result(folding.tensors)
