"""LoRA-like deltas written as an adapter of Hugging Face PEFT, which vLLM and others load."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from peftc.graph.quantized import dequantized
from peftc.interchange import kernels as peft_kernels
from peftc.interchange.read import PREFIX, WEIGHTS, Tensors
from peftc.interchange.settings import CONFIG, InterchangeError
from peftc.language.expr import Call, Expr, Name, names, number
from peftc.model.compiled import CompiledModel
from peftc.plan.algebra import inlined, numbers
from peftc.plan.edit import Edit
from peftc.sites.view import TURNED, View, compute
from peftc.store.directory import write_directory


@dataclass(frozen=True)
class LowRank:
    """`h + scale * (x @ down @ up)` at one site, or `W + scale * transpose(down @ up)`.

    `down` and `up` are paths of delta tensors; `rate` is how much of x is dropped in training.
    """

    edit: Edit
    scale: float
    down: str
    up: str
    rate: float = 0.0


def low_rank(edit: Edit) -> LowRank:
    """The form PEFT calls LoRA, read off the expression. Raises InterchangeError when it is another."""
    if "experts" in edit.site.dims:
        raise InterchangeError(
            f"{edit.name} is of experts, and PEFT's layout of such (target_parameters) is not written here; merge them"
        )
    paths, assigned = {p.name: p.path for p in edit.parameters}, tuple(inlined(edit)[1].items())
    match assigned:
        case ((port, Call("add", (Name(old), change))),) if old == port:
            scale, product = _factor(change, edit)
            match port, product:
                case ("h", Call("matmul", (Call("matmul", (x, Name(down))), Name(up)))):
                    rate = _rate(x, edit)
                case ("W", Call("transpose", (Call("matmul", (Name(down), Name(up))),))):
                    rate = 0.0
                case _:
                    raise _no_form(edit)
            if rate is not None and {down, up} <= paths.keys() and "W" in edit.site.weights:
                return LowRank(edit, scale, paths[down], paths[up], rate)
    raise _no_form(edit)


def _no_form(edit: Edit) -> InterchangeError:
    return InterchangeError(f"{edit.name} is not LoRA-like: PEFT has no form for it")


def _rate(x: Expr, edit: Edit) -> float | None:
    """How much of the input is dropped: 0 of x itself; None of another value."""
    match x:
        case Name("x"):
            return 0.0
        case Call("dropout", (Name("x"), rate)):
            return float(number(rate, numbers(edit)))
    return None


def _factor(change: Expr, edit: Edit) -> tuple[float, Expr]:
    values = numbers(edit)
    match change:
        case Call("mul", (factor, product)) if set(names(factor)) <= set(values):
            return float(number(factor, values)), product
    return 1.0, change


def export_peft(model: CompiledModel, directory: str | Path) -> tuple[str, ...]:
    """Write the LoRA-like deltas of `model` as a PEFT adapter, for vLLM and others; returns the adapted modules.

    A is written [r, in] and B [out, r], as PEFT stores them. Deltas at slices of one fused projection become one
    adapter whose rank is the sum of theirs; factors that sites share are written for each. Raises
    InterchangeError when a delta has another form, inputs are dropped at several rates, or `directory` is not
    empty; KernelError at a convolution that PEFT computes otherwise. Then nothing is written.
    """
    groups: dict[str, list[LowRank]] = {}
    for edit in model.plan.edits:
        found = low_rank(edit)
        module, _, name = edit.site.weights["W"].path.rpartition(".")
        if name != "weight":
            raise InterchangeError(
                f"{edit.name}: '{module}.{name}' is not the weight of a module of its own, and PEFT adapts modules; "
                "merge it"
            )
        groups.setdefault(module, []).append(found)
    if not groups:
        raise InterchangeError("there are no deltas that PEFT could hold")
    tensors: Tensors = {}
    for module, group in groups.items():
        down, up = _pair(model, group)
        _, *kernel = model.get_parameter(f"{module}.weight").shape
        if len(kernel) > 1:
            peft_kernels.require(module, model.get_submodule(module))
            down = down.reshape(-1, *kernel)
        ones = (1,) * (len(kernel) - 1)
        tensors[f"{PREFIX}{module}.lora_A.weight"] = down
        tensors[f"{PREFIX}{module}.lora_B.weight"] = up.reshape(*up.shape, *ones)
    for one in model.plan.unfrozen:
        tensors[PREFIX + one.path] = model.get_parameter(one.path).detach().clone()
    config = _lora_config(model, groups)

    def fill(folder: Path) -> None:
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})

    path = Path(directory)
    if path.exists() and any(path.iterdir()):
        raise InterchangeError(f"{path} exists and is not empty; choose another directory")
    write_directory(path, fill)
    return tuple(groups)


def _pair(model: CompiledModel, group: list[LowRank]) -> tuple[torch.Tensor, torch.Tensor]:
    """(A [r, in], B [out, r]) of a module, with the slices' factors side by side and their scale in B."""
    values = model.deltas.values()
    downs = [values[one.down].detach().T for one in group]
    ups = []
    for one in group:
        up, weight = values[one.up].detach().T, one.edit.site.weights["W"]
        stored = dequantized(model.get_parameter(weight.path))
        features = View(weight.view.form).read(compute, stored).shape[0]
        nothing = up.new_zeros(features, up.shape[1])
        full = View(columns=weight.view.columns).write(compute, nothing, up)
        ups.append(full if _same_scale(group) else full * one.scale)
    return torch.cat(downs).contiguous(), torch.cat(ups, 1).contiguous()


def _same_scale(group: list[LowRank]) -> bool:
    return len({one.scale for one in group}) == 1


def _lora_config(model: CompiledModel, groups: Mapping[str, list[LowRank]]) -> dict[str, Any]:
    values = model.deltas.values()
    ranks = {
        path: sum(values[one.down].shape[1] for one in group) for path, group in groups.items()
    }
    alphas = {
        path: ranks[path] * (group[0].scale if _same_scale(group) else 1.0)
        for path, group in groups.items()
    }
    first = next(iter(groups))
    owners = sorted({one.path.rpartition(".")[0] for one in model.plan.unfrozen})
    return {
        "peft_type": "LORA",
        "base_model_name_or_path": model.config.name_or_path or None,
        "r": ranks[first],
        "lora_alpha": alphas[first],
        "rank_pattern": {p: r for p, r in ranks.items() if r != ranks[first]},
        "alpha_pattern": {p: a for p, a in alphas.items() if a != alphas[first]},
        "target_modules": list(groups),
        "modules_to_save": owners or None,
        "fan_in_fan_out": any(
            group[0].edit.site.weights["W"].view.form == TURNED for group in groups.values()
        ),
        "lora_dropout": _common_rate(groups),
        "bias": "none",
        "inference_mode": True,
    }


def _common_rate(groups: Mapping[str, list[LowRank]]) -> float:
    """PEFT has one rate for an adapter."""
    rates = {one.rate: one.edit.name for group in groups.values() for one in group}
    if len(rates) > 1:
        said = ", ".join(f"{rate} at {name}" for rate, name in rates.items())
        raise InterchangeError(
            f"PEFT drops inputs at one rate, and these deltas at several: {said}"
        )
    return next(iter(rates))
