"""FoldAffine: a delta that is an affine map of its linear's input becomes part of weight and bias."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from peftc.algebra import Affine, NotAffine, affine, inlined
from peftc.edit import Edit
from peftc.folding import Folding, Outcome

# The linear whose result a site's `h` is; its own anchor is `W`.
_PRODUCER = {"attention": "o", "ffn": "down"}


@dataclass(frozen=True)
class FoldAffine:
    """LoRA, IA3, VeRA and the like: decided by the op table, not by method. What stays says why."""

    name: str = "fold_affine"

    def run(self, folding: Folding) -> int:
        kept: list[Edit] = []
        blocked: set[str] = set()
        for edit in folding.edits:
            weight = edit.site.anchors.get(_PRODUCER.get(edit.site.at, "W"), "")
            try:
                _fold(edit, weight, folding, weight in blocked)
            except NotAffine as reason:
                kept.append(edit)
                blocked.add(weight)
                folding.outcomes.append(Outcome(edit.name, False, str(reason)))
            else:
                folding.outcomes.append(Outcome(edit.name, True, weight))
        count = len(folding.edits) - len(kept)
        folding.edits[:] = kept
        return count


def _fold(edit: Edit, weight: str, folding: Folding, blocked: bool) -> None:
    assigned = inlined(edit)[1]
    ports = ", ".join(assigned)
    if list(assigned) != ["h"] or not weight:
        op = next((one.op for one in assigned.values() if hasattr(one, "op")), "it")
        raise NotAffine(f"'{op}' rewrites '{ports}', which is no linear's result")
    if blocked:
        raise NotAffine("an earlier delta of the same linear stays")
    if weight in folding.tied:
        raise NotAffine(f"'{weight}' is tied to another parameter")
    base = _base(edit, weight, folding)
    maps = {"h": base}
    if "W" in edit.site.anchors:
        maps["x"] = Affine(torch.eye(base.matrix.shape[0], dtype=torch.float64))
    env = {p.name: folding.tensors[p.path] for p in edit.parameters}
    result = affine(assigned["h"], maps, env, {**edit.entry.arguments, **edit.site.dims})
    _write(edit, weight, result, folding)


def _base(edit: Edit, weight: str, folding: Folding) -> Affine:
    """The linear as it is, `x @ W + b` with W [in, out], cut to the site's columns."""
    matrix = folding.weight(weight)
    matrix = matrix if edit.site.transposed else matrix.T
    bias = _bias(edit, weight, folding)
    offset = folding.weight(bias) if bias else None
    if edit.site.columns:
        part = slice(*edit.site.columns)
        return Affine(matrix[:, part], None if offset is None else offset[part])
    return Affine(matrix, offset)


def _bias(edit: Edit, weight: str, folding: Folding) -> str | None:
    path = edit.site.anchors.get("b") or weight.removesuffix("weight") + "bias"
    try:
        folding.weight(path)
    except AttributeError:
        return None
    return path


def _write(edit: Edit, weight: str, result: Affine, folding: Folding) -> None:
    bias = _bias(edit, weight, folding)
    if result.offset is not None and bias is None:
        raise NotAffine("the delta adds a bias and the linear has none")
    matrix = folding.weight(weight).clone()
    matrix = matrix if edit.site.transposed else matrix.T
    columns = slice(*edit.site.columns) if edit.site.columns else slice(None)
    matrix[:, columns] = result.matrix
    folding.weights[weight] = matrix if edit.site.transposed else matrix.T
    if bias is not None and result.offset is not None:
        offset = folding.weight(bias).clone()
        offset[columns] = result.offset
        folding.weights[bias] = offset
