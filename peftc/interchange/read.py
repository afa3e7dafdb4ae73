"""Checkpoints of Hugging Face PEFT, read into a spec and deltas."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from peftc import driver
from peftc.errors import PeftcError
from peftc.interchange import kernels as peft_kernels
from peftc.interchange import rows as peft_rows
from peftc.interchange.rows import ROWS
from peftc.language.reader import parse_spec
from peftc.language.spec import Spec, scopes
from peftc.model.compiled import CompiledModel

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
MAX_CONFIG_BYTES = 4 << 20
PREFIX = "base_model.model."
_SHARED = (
    "base_model.vera_A",
    "base_model.vera_B",
)  # VeRA's projections, cut to each module's size
Tensors = dict[str, torch.Tensor]


class InterchangeError(PeftcError):
    """A PEFT checkpoint that cannot be read, or deltas that PEFT has no form for."""


@dataclass(frozen=True)
class Form:
    """How one kind of PEFT tensors reads in the spec language.

    `tensors` maps PEFT's name to (ours, how it is laid out there: `T` transposed, `column`, `flat` or as it
    is); `scaled` says that the delta is multiplied by the config's scale.
    """

    tensors: Mapping[str, tuple[str, str]]
    body: str
    scaled: bool = True

    def fits(self, found: Iterable[str]) -> bool:
        return set(found) == set(self.tensors)


_LORA = {"lora_A.weight": ("down", "T"), "lora_B.weight": ("up", "T")}
_KRON_1 = {"lokr_w1": ("small", "T")}
_KRON_2 = {"lokr_w1_a": ("small_up", "T"), "lokr_w1_b": ("small_down", "T")}
_FULL, _PAIR = {"lokr_w2": ("w", "T")}, {"lokr_w2_a": ("up", "T"), "lokr_w2_b": ("down", "T")}
_DORA = "rewrite: {W: magnitude * (W + s * transpose(down @ up)) / detach(norm(W + s * transpose(down @ up)))}"
FORMS = (
    Form(_LORA, "delta: x @ down @ up"),
    Form({**_LORA, "lora_magnitude_vector": ("magnitude", "column")}, _DORA),
    Form({"ia3_l": ("scale", "flat")}, "rewrite: {h: h * scale}", scaled=False),
    Form(
        {"vera_lambda_d": ("scale_r", ""), "vera_lambda_b": ("scale_out", "")},
        "delta: ((x @ down) * scale_r) @ up * scale_out",
        scaled=False,
    ),
    Form(
        {
            "hada_w1_a": ("up_1", "T"),
            "hada_w1_b": ("down_1", "T"),
            "hada_w2_a": ("up_2", "T"),
            "hada_w2_b": ("down_2", "T"),
        },
        "delta: x @ ((down_1 @ up_1) * (down_2 @ up_2))",
    ),
    Form({**_KRON_1, **_FULL}, "delta: x @ kron(small, w)"),
    Form({**_KRON_1, **_PAIR}, "delta: x @ kron(small, down @ up)"),
    Form({**_KRON_2, **_FULL}, "delta: x @ kron(small_down @ small_up, w)"),
    Form({**_KRON_2, **_PAIR}, "delta: x @ kron(small_down @ small_up, down @ up)"),
)
_READ = {
    "T": lambda value: value.flatten(1).T,
    "column": lambda value: value.reshape(-1, 1),
    "flat": lambda value: value.reshape(-1),
    "": lambda value: value,
}


@dataclass(frozen=True)
class Module:
    """One adapted module: its path, its delta in our words, its tensors in our layout."""

    path: str
    body: str
    scale: float | None
    tensors: Mapping[str, torch.Tensor]
    frozen: tuple[str, ...] = ()
    op: str = "linear"

    @property
    def kind(self) -> tuple[object, ...]:
        """What modules that share an entry of the spec have in common."""
        shapes = tuple((name, tuple(value.shape)) for name, value in self.tensors.items())
        return (self.path.rpartition(".")[2], self.body, self.scale, shapes)


def import_peft(directory: str | Path, backbone: PreTrainedModel) -> CompiledModel:
    """The checkpoint of a PEFT adapter as a compiled model on its backbone.

    Reads LoRA (rank and alpha patterns, rsLoRA; of convolutions too), DoRA, IA3, VeRA, LoHa, LoKr, `modules_to_save`, prompt
    and p-tuning, and prefix tuning of models with one stack, from safetensors alone. Raises
    InterchangeError for what it cannot read exactly.
    """
    path = Path(directory)
    config, tensors = _config(path), _tensors(path)
    rows = tensors.pop(ROWS, None)
    modules, whole = _modules(config, tensors, backbone)
    specs = [] if rows is None else [peft_rows.spec(config, rows, backbone)]
    if modules or whole:
        name = str(config.get("peft_type", "adapter")).lower() if modules else "modules_to_save"
        specs.append(_spec(name, modules, whole, backbone))
    model = driver.compile(backbone, specs)
    if rows is not None:
        peft_rows.fill(model, rows)
    _fill(model, modules, whole)
    return model


def _config(path: Path) -> Mapping[str, Any]:
    file = path / CONFIG
    if not file.is_file():
        raise InterchangeError(f"{path} has no {CONFIG}: not a PEFT adapter")
    if file.stat().st_size > MAX_CONFIG_BYTES:
        raise InterchangeError(f"{file} is larger than {MAX_CONFIG_BYTES >> 20} MiB")
    try:
        config: Any = json.loads(file.read_text())
    except ValueError as error:
        raise InterchangeError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise InterchangeError(f"{file} is not a PEFT configuration")
    return config


def _tensors(path: Path) -> Tensors:
    file = path / WEIGHTS
    if not file.is_file():
        fix = (
            "save it again with safe_serialization=True"
            if (path / "adapter_model.bin").is_file()
            else ""
        )
        raise InterchangeError(f"{path} has no {WEIGHTS}" + (f"; {fix}" if fix else ""))
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise InterchangeError(f"{file} is damaged: {error}") from error


def _modules(
    config: Mapping[str, Any], tensors: Tensors, backbone: PreTrainedModel
) -> tuple[list[Module], Tensors]:
    """The adapted modules, and the parameters that were saved whole."""
    known = {name for form in FORMS for name in form.tensors}
    found: dict[str, Tensors] = {}
    whole: Tensors = {}
    for key, value in tensors.items():
        if key in _SHARED:
            continue
        path = key.removeprefix(PREFIX).removeprefix("base_model.").removesuffix(".default")
        name = next((one for one in known if path.endswith(f".{one}")), None)
        if name is None and not re.search(r"\.(weight|bias)$", path):
            raise InterchangeError(
                f"'{key}' of a {config.get('peft_type')} adapter has no form here"
            )
        if name is None:
            whole[path] = value
        else:
            found.setdefault(path.removesuffix(f".{name}"), {})[name] = value
    shared = {k: v for k, v in tensors.items() if k in _SHARED}
    weights = dict(backbone.named_parameters())
    modules = []
    for path, one in found.items():
        if f"{path}.weight" not in weights:
            raise InterchangeError(f"the backbone has no linear '{path}'")
        modules.append(_module(config, path, one, shared, backbone.get_submodule(path)))
    return modules, whole


def _module(
    config: Mapping[str, Any], path: str, found: Tensors, shared: Tensors, owner: nn.Module
) -> Module:
    form = next((form for form in FORMS if form.fits(found)), None)
    if form is None:
        raise InterchangeError(
            f"'{path}' has the tensors {', '.join(sorted(found))}: no known form"
        )
    tensors = {ours: _READ[how](found[name]) for name, (ours, how) in form.tensors.items()}
    body = form.body
    if "ia3_l" in found and found["ia3_l"].shape[0] == 1:
        body = "rewrite: {x: x * scale}"
    weight, op = owner.get_parameter("weight"), "linear"
    if weight.ndim > 2:
        body, op = peft_kernels.body(path, owner, body, found), "conv"
    if "vera_lambda_d" in found:
        projections = _projections(shared, weight.shape)
        return Module(path, body, None, tensors | projections, ("down", "up"))
    scale = _scale(config, path, tensors) if form.scaled else None
    return Module(path, body, scale, {k: v.contiguous() for k, v in tensors.items()}, op=op)


def _projections(shared: Tensors, shape: torch.Size) -> Tensors:
    if len(shared) < len(_SHARED):
        raise InterchangeError(
            "the adapter was saved without its random projections; save it with save_projection=True"
        )
    down, up = (shared[name] for name in _SHARED)
    return {"down": down[:, : shape[1]].T, "up": up[: shape[0]].T}


def _scale(config: Mapping[str, Any], path: str, tensors: Mapping[str, torch.Tensor]) -> float:
    """alpha / r, or alpha / sqrt(r); both may have patterns over module paths."""
    alpha = config.get("lora_alpha", config.get("alpha"))
    alpha = _pattern(config.get("alpha_pattern"), path, alpha)
    rank = _pattern(config.get("rank_pattern"), path, config.get("r"))
    if "lora_alpha" in config:
        rank = tensors["down"].shape[1]
    if not isinstance(alpha, int | float) or not isinstance(rank, int | float) or rank <= 0:
        raise InterchangeError(f"{CONFIG} gives no usable alpha and r for '{path}'")
    return float(alpha) / (rank**0.5 if config.get("use_rslora") else rank)


def _pattern(patterns: Any, path: str, default: Any) -> Any:
    """PEFT's rule: a key is a regular expression for the end of a module's path."""
    for key, value in (patterns or {}).items():
        if path == key or path.endswith(f".{key}") or re.fullmatch(rf"(.*\.)?({key})", path):
            return value
    return default


def _spec(name: str, modules: list[Module], whole: Tensors, backbone: PreTrainedModel) -> Spec:
    lines = [f"# Imported from a PEFT adapter ({name})", f"name: {name}", "deltas:"]
    groups: dict[tuple[object, ...], list[Module]] = {}
    for module in modules:
        groups.setdefault(module.kind, []).append(module)
    paths = [name for name, _ in backbone.named_modules()]
    for group in groups.values():
        for scope in scopes([module.path for module in group], paths):
            lines += _entry(group[0], scope)
    owners: dict[str, list[str]] = {}
    for path in whole:
        owner, _, last = path.rpartition(".")
        owners.setdefault(owner, []).append(last)
    for owner, own in owners.items():
        lines += [f"  - at: {{op: linear, scope: {owner}}}", f"    train: [{', '.join(own)}]"]
    return parse_spec("\n".join(lines) + "\n", name)


def _entry(module: Module, scope: str) -> list[str]:
    lines = [f'  - at: {{op: {module.op}, scope: "{scope}"}}', "    params:"]
    for name, value in module.tensors.items():
        shared = ", per: shape, trainable: false" if name in module.frozen else ""
        lines.append(f"      {name}: {{shape: {list(value.shape)}, init: zeros{shared}}}")
    body = module.body
    if module.scale is not None:
        body = re.sub(r"\bs\b", repr(module.scale), body)
    lines.append(f"    {body}")
    if module.scale is not None and body.startswith("delta"):
        lines.append(f"    compose: h + {module.scale!r} * delta")
    return lines


def _fill(model: CompiledModel, modules: list[Module], whole: Tensors) -> None:
    sites = {edit.site.scope: edit for edit in model.plan.edits}
    slots = model.deltas.values()
    weights = dict(model.named_parameters())
    with torch.no_grad():
        for module in modules:
            for parameter in sites[module.path].parameters:
                slots[parameter.path].copy_(module.tensors[parameter.name])
        for path, value in whole.items():
            if path not in weights or weights[path].shape != value.shape:
                raise InterchangeError(
                    f"the backbone has no parameter '{path}' {list(value.shape)}"
                )
            weights[path].copy_(value)
