"""FoldAffine: a delta that is an affine map of its linear's input becomes part of weight and bias."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from peftc.language.expr import Expr, calls, names
from peftc.language.ops import OPS
from peftc.plan.algebra import inlined, numbers
from peftc.plan.edit import Edit
from peftc.rewrite.affine import Affine, NotAffine, affine
from peftc.rewrite.evaluate import Tensors, evaluate
from peftc.rewrite.folding import Folding, Outcome
from peftc.rewrite.tying import own_path

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
            weight = _weight(edit, folding)
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


def _weight(edit: Edit, folding: Folding) -> str:
    """The weight that the delta would be part of; of a tied one that can be untied, the site's own."""
    path = edit.site.anchors.get(_PRODUCER.get(edit.site.at, "W"), "")
    return own_path(edit) if path in folding.tied and _separable(edit, folding) else path


def _separable(edit: Edit, folding: Folding) -> bool:
    return "W" in edit.site.anchors and own_path(edit) in folding.separable


def _fold(edit: Edit, weight: str, folding: Folding, blocked: bool) -> None:
    assigned = inlined(edit)[1]
    ports = set(assigned)
    if not weight or not (ports <= {"W", "b"} or ports in ({"h"}, {"x"})):
        op = next((one.op for one in assigned.values() if hasattr(one, "op")), "it")
        raise NotAffine(f"'{op}' rewrites '{', '.join(assigned)}', which is no linear's result")
    if weight in folding.tied and not _separable(edit, folding):
        raise NotAffine(f"'{weight}' is tied to another parameter")
    if blocked:
        raise NotAffine("an earlier delta of the same linear stays")
    env = {p.name: folding.tensors[p.path] for p in edit.parameters}
    base, read = _base(edit, weight, folding), (env, numbers(edit))
    if ports <= {"W", "b"}:
        _write(edit, weight, _reparametrised(edit, assigned, base, *read), folding)
    elif edit.site.at == "norm":
        raise NotAffine("a norm's result is no linear map of its input")
    elif edit.site.at == "conv":
        _write(edit, weight, _of_convolution(edit, assigned, base, *read), folding)
    elif ports == {"x"}:
        before = affine(assigned["x"], {"x": _identity(edit, base)}, *read)
        _write(edit, weight, _after(before, base), folding)
    else:
        maps = {"h": base}
        if "W" in edit.site.anchors:
            maps["ids" if edit.site.at == "embedding" else "x"] = _identity(edit, base)
        _write(edit, weight, affine(assigned["h"], maps, *read), folding)


def _identity(edit: Edit, base: Affine) -> Affine:
    """x itself. Ids are one-hot rows, which only `lookup` reads: no matrix of vocab x vocab for them."""
    size = 1 if edit.site.at == "embedding" else base.matrix.shape[0]
    return Affine(torch.eye(size, dtype=torch.float64))


def _after(before: Affine, base: Affine) -> Affine:
    """The linear `base` of what `before` makes of its input."""
    offset = None if before.offset is None else before.offset @ base.matrix
    if base.offset is not None:
        offset = base.offset if offset is None else base.offset + offset
    return Affine(before.matrix @ base.matrix, offset)


def _of_convolution(
    edit: Edit,
    assigned: Mapping[str, Expr],
    base: Affine,
    env: Tensors,
    sizes: Mapping[str, float | int],
) -> Affine:
    """A convolution whose result is changed at each position alike: its kernels, [in, out], are."""
    if "x" in assigned:
        raise NotAffine("a convolution reads its input through a kernel")
    result = affine(assigned["h"], {"h": base}, env, sizes)
    mixed = [one.op for one in calls(assigned["h"]) if OPS[one.op].affine == "matmul"]
    if mixed and edit.site.dims["groups"] > 1:
        raise NotAffine(f"'{mixed[0]}' mixes the groups of the convolution")
    return result


def _reparametrised(
    edit: Edit,
    assigned: Mapping[str, Expr],
    base: Affine,
    env: Tensors,
    sizes: Mapping[str, float | int],
) -> Affine:
    """New weight and bias as functions of the old ones; specs see a linear's weight as [out, in]."""
    turned = edit.site.at not in ("embedding", "norm")
    known = {**env, "W": base.matrix.T if turned else base.matrix}
    if base.offset is not None:
        known["b"] = base.offset
    for expression in assigned.values():
        unknown = [n for n in names(expression) if n not in known and n not in sizes]
        if unknown:
            raise NotAffine(f"it reads '{unknown[0]}'")
    new = {port: evaluate(one, known, sizes) for port, one in assigned.items()}
    matrix = new.get("W", known["W"])
    return Affine(matrix.T if turned else matrix, new.get("b", base.offset))


def _stored_as_map(edit: Edit) -> bool:
    """Whether the stored matrix is [in, out] itself: GPT-2's Conv1D, a table of embeddings; or a vector."""
    return edit.site.transposed or edit.site.at in ("embedding", "norm")


def _base(edit: Edit, weight: str, folding: Folding) -> Affine:
    """The linear as it is, `x @ W + b` with W [in, out], cut to the site's columns."""
    matrix = folding.weight(weight)
    matrix = matrix if _stored_as_map(edit) else matrix.flatten(1).T
    bias = _bias(edit, weight, folding)
    offset = folding.weight(bias) if bias else None
    if edit.site.columns:
        part = edit.site.columns.index()
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
    stored = folding.weight(weight).clone()
    matrix = stored if _stored_as_map(edit) else stored.flatten(1).T
    part = edit.site.columns.index() if edit.site.columns else slice(None)
    matrix[..., part] = result.matrix
    folding.weights[weight] = (matrix if _stored_as_map(edit) else matrix.T).reshape(stored.shape)
    if bias is not None and result.offset is not None:
        offset = folding.weight(bias).clone()
        offset[part] = result.offset
        folding.weights[bias] = offset
