"""Keys: masks and sizes that know of the rows in front of an attention's keys."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from peftc.graph.aten import SDPA
from peftc.graph.program import Program, aten, is_call, op_name, scope_of
from peftc.sites.cores import Core, Mask
from peftc.sites.site import SiteError


def extend_keys(program: Program, core: Core, call: Callable[..., Any], rows: int) -> None:
    """Let every query see `rows` more keys in front; the other keys keep their mask. Raises SiteError."""
    for mask in core.masks:
        wide = _padded(program, mask, call, rows)
        mask.read.user.update_arg(mask.read.index, wide)
    # aten.scaled_dot_product_attention(q, k, v, attn_mask, dropout_p, is_causal, ...)
    if not core.masks and is_call(core.h, SDPA) and len(core.h.args) > 5 and core.h.args[5]:
        _explicit_causal(program, core.h, call, rows)
    for view, place in core.sized:
        _resize(program, view, place, call, rows)


def _resize(
    program: Program, view: fx.Node, place: int, call: Callable[..., Any], rows: int
) -> None:
    """Add to one of the sizes that a view is given; -1 follows by itself."""
    sizes = list(view.args[1])  # type: ignore[arg-type]
    old = sizes[place]
    if isinstance(old, int) and old >= 0:  # of a window
        sizes[place] = old + rows
        view.update_arg(1, sizes)
    elif isinstance(old, fx.Node):
        with program.graph.inserting_before(view):
            sizes[place] = call(operator.add, old, rows, name="keys")
        view.update_arg(1, sizes)


def _padded(program: Program, one: Mask, call: Callable[..., Any], rows: int) -> fx.Node:
    """The mask with `rows` keys on its left that it leaves as they are. Of a bias that counts from the last key they have
    the first key's: they stand where it stands, however many there are. Raises SiteError where it cannot."""
    mask, neutral = one.read.node, "first" if one.bias else one.visible
    value = mask.meta["val"]
    if value.ndim == 0 or value.shape[-1] == 1:
        return mask
    if neutral is None:
        op = one.read.user
        raise SiteError(
            f"'{op_name(op)}' masks the scores in {scope_of(op)}, and no value of its mask leaves one as it is: "
            "no rows can go in front of its keys"
        )
    for user in mask.users:
        if user.meta.get("extends") == (rows, neutral):
            return user
    with program.graph.inserting_before(mask.next):
        if one.bias:
            key = call(aten.slice.Tensor, mask, -1, 0, 1, name="first")
            copies = call(aten.expand.default, key, [*[-1] * (value.ndim - 1), rows], name="first")
            wide: fx.Node = call(aten.cat.default, [copies, mask], -1, name="mask")
        else:
            wide = call(aten.constant_pad_nd.default, mask, [rows, 0], neutral, name="mask")
    wide.meta["extends"] = (rows, neutral)
    return wide


def _explicit_causal(program: Program, sdpa: fx.Node, call: Callable[..., Any], rows: int) -> None:
    """`is_causal` aligns at the top left, so with keys in front it must become a mask [queries, keys]."""
    query, keys = sdpa.args[0], sdpa.args[1]
    with program.graph.inserting_before(sdpa):
        height = call(aten.sym_size.int, query, -2, name="queries")
        width = call(aten.sym_size.int, keys, -2, name="keys")
        device = query.meta["val"].device  # type: ignore[union-attr]
        ones = call(
            aten.ones.default, [height, width], dtype=torch.bool, device=device, name="ones"
        )
        mask = call(aten.tril.default, ones, rows, name="causal_mask")
    sdpa.update_arg(3, mask)
    sdpa.update_arg(5, False)
