"""The tensors that a delta brings: the key `params`."""

from __future__ import annotations

from typing import Any

import yaml

from peftc.language import expr as ex
from peftc.language.field import Draft, Field
from peftc.language.formulas import INITS
from peftc.language.ports import SITES
from peftc.language.spec import FORMULA, Init, Param

PER = ("site", "kind", "shape", "model", "expert")


def _shape(draft: Draft, node: yaml.Node) -> tuple[ex.Expr, ...]:
    sizes = {*draft.arguments, *SITES[draft.at].dims}
    found = [
        draft.formulas.size(dim, draft.names, sizes) for dim in draft.source.items(node, "'shape'")
    ]
    return tuple(one for one in found if one is not None)


def _init(draft: Draft, node: yaml.Node) -> Init:
    sizes, ports = {*draft.arguments, *SITES[draft.at].dims}, set(SITES[draft.at].ports)
    return draft.formulas.init(node, draft.names, sizes, ports)


def _per(draft: Draft, node: yaml.Node) -> str:
    per = draft.source.choice(node, "'per'", PER) or "site"
    if per == "expert" and "experts" not in SITES[draft.at].dims:
        kinds = ", ".join(name for name, row in SITES.items() if "experts" in row.dims)
        draft.source.fail(node, f"{draft.at} has no experts", f"of experts are {kinds}")
    return per


def _write_init(param: Param) -> str:
    init = param.init
    if init.name == FORMULA:
        return ex.show(init.args[0])
    return f"{init.name}({', '.join(map(ex.show, init.args))})" if init.args else init.name


PARAM = (
    Field(
        "shape",
        "its axes: sizes of the site, arguments, numbers",
        lambda: {"type": "array", "items": {"type": ["string", "integer"]}},
        _shape,
        lambda param: [ex.show(dim) for dim in param.shape],
        required=True,
    ),
    Field(
        "init",
        f"how it starts: {', '.join(INITS)}, or a formula of the site's ports",
        lambda: {"type": "string"},
        _init,
        _write_init,
        required=True,
    ),
    Field(
        "per",
        "what shares one tensor: the site alone, sites of a kind, of a shape, all; or each expert has its own",
        lambda: {"enum": list(PER), "default": "site"},
        _per,
        lambda param: None if param.per == "site" else param.per,
    ),
    Field(
        "trainable",
        "false freezes it as it starts",
        lambda: {"type": "boolean", "default": True},
        lambda draft, node: draft.source.choice(node, "'trainable'", ("true", "false")) != "false",
        lambda param: None if param.trainable else False,
    ),
)


def _param(draft: Draft, name: str, node: yaml.Node) -> Param:
    items = draft.source.mapping(node, f"'{name}'", [row.name for row in PARAM])
    for row in PARAM:
        if row.required and items and row.name not in items:
            draft.source.fail(node, f"parameter '{name}' has no '{row.name}'")
    said = {row.name: row.read(draft, items[row.name][1]) for row in PARAM if row.name in items}
    return Param(**{"name": name, "shape": (), "init": Init("zeros"), **said})


def read_params(draft: Draft, node: yaml.Node) -> dict[str, Any]:
    found = []
    for name, (key, inner) in draft.source.mapping(node, "'params'").items():
        if draft.formulas.fresh(key, name, draft.names):
            param = _param(draft, name, inner)
            draft.names.shapes[name] = tuple(_symbol(dim) for dim in param.shape)
            found.append(param)
    return {"params": tuple(found)}


def _symbol(dim: ex.Expr) -> ex.Dim:
    return int(dim.value) if isinstance(dim, ex.Number) else ex.show(dim)
