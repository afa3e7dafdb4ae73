"""Checkpoints of Hugging Face PEFT, read into a spec and deltas."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from peftc import driver
from peftc.errors import PeftcError, Place
from peftc.graph.facts import token_table
from peftc.interchange import forms, kernels, patterns, settings
from peftc.interchange import rows as peft_rows
from peftc.interchange.forms import Formula
from peftc.interchange.rows import ROWS
from peftc.interchange.settings import CONFIG, Config, InterchangeError
from peftc.language.expr import Number
from peftc.language.spec import Entry, Init, Param, Spec, Where, numbered, scopes
from peftc.model.compiled import CompiledModel, detach

WEIGHTS = "adapter_model.safetensors"
PREFIX = "base_model.model."
# VeRA's projections, cut to each module's size.
_SHARED = ("base_model.vera_A", "base_model.vera_B")
Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Module:
    """One adapted module: its path, its delta in our words, its tensors in our layout."""

    path: str
    op: str
    formula: Formula
    tensors: Mapping[str, torch.Tensor]
    frozen: tuple[str, ...] = ()

    @property
    def kind(self) -> tuple[object, ...]:
        """What modules that share an entry of the spec have in common."""
        shapes = tuple((name, tuple(value.shape)) for name, value in self.tensors.items())
        return (self.path.rpartition(".")[2], self.op, self.formula, shapes)


@dataclass(frozen=True)
class Adapter:
    """A checkpoint of a PEFT adapter: its specs, and the tensors that fill what is compiled of them."""

    specs: list[Spec]
    rows: torch.Tensor | None
    modules: list[Module]
    whole: Tensors

    @staticmethod
    def read(directory: str | Path, backbone: PreTrainedModel) -> Adapter:
        path = Path(directory)
        config, tensors = settings.read(path), _tensors(path)
        rows = tensors.pop(ROWS, None)
        modules, whole = _modules(config, tensors, backbone)
        specs = [] if rows is None else [peft_rows.spec(config, rows, backbone)]
        if modules or whole:
            specs.append(_spec(config, path / CONFIG, modules, whole, backbone))
        if not specs:
            raise InterchangeError(f"{path / WEIGHTS} holds no tensor")
        return Adapter(specs, rows, modules, whole)

    def fill(self, model: CompiledModel) -> None:
        """Write the tensors to those of the delta set in use."""
        if self.rows is not None:
            peft_rows.fill(model, self.rows)
        _fill(model, self.modules, self.whole)


def import_peft(directory: str | Path, backbone: PreTrainedModel) -> CompiledModel:
    """The checkpoint of a PEFT adapter in `directory` as a compiled model on `backbone`, whose weights are shared.

    Reads LoRA (rank and alpha patterns, rsLoRA, dropout; of convolutions too), DoRA, IA3, VeRA, LoHa, LoKr,
    `modules_to_save` and biases, prompt and p-tuning, and prefix tuning of models with one stack, from
    safetensors alone. `modules_to_save` are copied into the backbone. Raises InterchangeError for a setting,
    a tensor or a pattern that cannot be read exactly; then the backbone is as it was.
    """
    adapter = Adapter.read(directory, backbone)
    model = driver.compile(backbone, adapter.specs)
    try:
        adapter.fill(model)
    except PeftcError:
        detach(model)
        raise
    return model


def add_peft(model: CompiledModel, directory: str | Path, name: str) -> None:
    """The checkpoint of a PEFT adapter in `directory` as another delta set of `model`, called `name`, not in use yet; what
    `import_peft` reads.
    Raises as it does, and SetError for a name that cannot be; the model is then as it was."""
    with model.base():
        adapter = Adapter.read(directory, model.backbone)
    model.add(adapter.specs, name)
    try:
        with model.using(name):
            adapter.fill(model)
    except PeftcError:
        model.remove(name)
        raise


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
    config: Config, tensors: Tensors, backbone: PreTrainedModel
) -> tuple[list[Module], Tensors]:
    """The adapted modules, and the parameters that were saved whole."""
    found: dict[str, Tensors] = {}
    whole: Tensors = {}
    shared = {key: tensors[key] for key in _SHARED if key in tensors}
    weights = dict(backbone.named_parameters(remove_duplicate=False))
    saved = settings.whole_modules(config)
    for key, value in tensors.items():
        path = _path(key)
        name = next((one for one in forms.TENSORS if path.endswith(f".{one}")), None)
        if key in shared or ".original_module." in key:  # the backbone's own, as it was
            continue
        if name is not None:
            found.setdefault(path.removesuffix(f".{name}"), {})[name] = value
        elif _is_whole(path, saved, config, backbone):
            if path not in weights:
                raise InterchangeError(f"the backbone has no parameter '{path}'")
            if weights[path].shape != value.shape:
                raise InterchangeError(
                    f"'{path}' is {list(value.shape)}, and the backbone's {list(weights[path].shape)}; load the backbone "
                    "with the sizes that the adapter was trained with, such as num_labels"
                )
            if not _is_its_own(path, value, weights):
                whole[path] = value
        else:
            raise InterchangeError(
                f"'{key}' is no tensor of a {config['peft_type']} adapter that is known here, and "
                f"'modules_to_save' does not name it"
            )
    modules = []
    for path, one in found.items():
        if f"{path}.weight" not in weights:
            raise InterchangeError(f"the backbone has no linear '{path}'")
        modules.append(_module(config, path, one, shared, backbone.get_submodule(path)))
    return modules, whole


def _path(key: str) -> str:
    """The path in the backbone that a key speaks of; PEFT wraps what it adapts and what it saves."""
    path = key.removeprefix(PREFIX).removeprefix("base_model.").removesuffix(".default")
    return path.replace(".modules_to_save.default.", ".").replace(".base_layer.", ".")


def _is_whole(path: str, saved: tuple[str, ...], config: Config, backbone: PreTrainedModel) -> bool:
    """Whether PEFT saves a parameter of the backbone itself: of a module so named, a bias, or an embedding."""
    owner, _, last = path.rpartition(".")
    if last == "bias" and config.get("bias", "none") != "none":
        return True
    parts = owner.split(".")
    owners = [".".join(parts[: i + 1]) for i in range(len(parts))]
    if any(one.endswith(name) for one in owners for name in saved):
        return True
    tables = (token_table(backbone), backbone.get_output_embeddings())
    return any(
        module is table for n, module in backbone.named_modules() if n == owner for table in tables
    )


def _is_its_own(path: str, value: torch.Tensor, weights: Mapping[str, torch.Tensor]) -> bool:
    """Whether a tied weight is the backbone's, saved along; PEFT's copy of one is tied to nothing."""
    weight = weights[path]
    others = [one for one, tied in weights.items() if tied is weight and one != path]
    if others and not torch.equal(value, weight.detach().to(value)):
        raise InterchangeError(
            f"'{path}' was trained apart from '{others[0]}', to which the backbone ties it; "
            "load the backbone with tie_word_embeddings=False"
        )
    return bool(others)


def _module(config: Config, path: str, found: Tensors, shared: Tensors, owner: nn.Module) -> Module:
    form = forms.of(path, found)
    if bool(config.get("use_dora")) != ("lora_magnitude_vector" in found):
        raise InterchangeError(f"{CONFIG}: 'use_dora' does not fit the tensors of '{path}'")
    tensors = form.laid_out(found)
    scale = _scale(config, path, tensors) if form.scaled else 1.0
    rate, weight = settings.rate(config), owner.get_parameter("weight")
    if weight.ndim > 2:
        kernels.require_product(path, found)
        formula = forms.of_kernels(path, form, scale, rate, owner, found)
        return Module(path, "conv", formula, tensors)
    formula = forms.of_linear(path, form, scale, rate)
    if "vera_lambda_d" in found:
        projections = _projections(path, shared, found, weight)
        return Module(path, "linear", formula, {**tensors, **projections}, tuple(projections))
    return Module(path, "linear", formula, tensors)


def _projections(path: str, shared: Tensors, found: Tensors, weight: torch.Tensor) -> Tensors:
    """The part of VeRA's projections that a linear of this size reads: down [in, r], up [r, out]."""
    if len(shared) < len(_SHARED):
        raise InterchangeError(
            "the adapter was saved without its random projections; save it with save_projection=True"
        )
    down, up = (shared[name] for name in _SHARED)
    n_out = len(found["vera_lambda_b"])
    n_in = weight.numel() // n_out  # its layout may be [in, out]
    if n_in * n_out != weight.numel() or n_in > down.shape[1] or n_out > up.shape[0]:
        raise InterchangeError(f"'{path}' is {list(weight.shape)}, and its scale is of {n_out}")
    return {"down": down[:, :n_in].T.contiguous(), "up": up[:n_out].T.contiguous()}


def _scale(config: Config, path: str, tensors: Tensors) -> float:
    """alpha / r, or alpha / sqrt(r); both may have patterns over module paths."""
    said = config.get("lora_alpha", config.get("alpha"))
    alpha = patterns.first(settings.patterns(config, "alpha_pattern"), path, said)
    rank = patterns.first(settings.patterns(config, "rank_pattern"), path, config.get("r"))
    if "lora_alpha" in config:
        rank = tensors["down"].shape[1]
    numbers = all(isinstance(one, int | float) and math.isfinite(one) for one in (alpha, rank))
    if not numbers or rank <= 0:
        raise InterchangeError(f"{CONFIG} gives no usable alpha and r for '{path}'")
    return float(alpha) / float(math.sqrt(rank) if config.get("use_rslora") else rank)


def _spec(
    config: Config, file: Path, modules: list[Module], whole: Tensors, backbone: PreTrainedModel
) -> Spec:
    name = str(config["peft_type"]).lower() if modules else "modules_to_save"
    groups: dict[tuple[object, ...], list[Module]] = {}
    for module in modules:
        groups.setdefault(module.kind, []).append(module)
    paths, place = [path for path, _ in backbone.named_modules()], Place(str(file), 1, 1)
    entries = [
        _entry(name, group[0], scope, place)
        for group in groups.values()
        for scope in scopes([module.path for module in group], paths)
    ]
    entries += _unfrozen(name, whole, place)
    return Spec(
        name, f"Imported from a PEFT adapter ({name})", {}, numbered([[one] for one in entries])
    )


def _entry(method: str, module: Module, scope: str, place: Place) -> Entry:
    params = tuple(
        Param(
            name,
            tuple(Number(size) for size in value.shape),
            Init("zeros"),
            "shape" if name in module.frozen else "site",
            name not in module.frozen,
        )
        for name, value in module.tensors.items()
    )
    said = module.formula
    return Entry(
        method=method,
        at=module.op,
        scope=scope,
        where=Where(),
        params=params,
        let=(),
        assign=said.assign,
        delta=said.delta,
        compose=said.compose,
        train=(),
        expect=None,
        arguments={},
        place=place,
    )


def _unfrozen(method: str, whole: Tensors, place: Place) -> Iterator[Entry]:
    """What was saved whole trains on: parameters of a module by their last names."""
    owners: dict[str, list[str]] = {}
    for path in whole:
        owner, _, last = path.rpartition(".")
        owners.setdefault(owner, []).append(last)
    for owner, own in owners.items():
        yield Entry(
            method=method,
            at="",
            scope=owner,
            where=Where(),
            params=(),
            let=(),
            assign=(),
            delta=None,
            compose=None,
            train=tuple(own),
            expect=None,
            arguments={},
            place=place,
        )


def _fill(model: CompiledModel, modules: list[Module], whole: Tensors) -> None:
    edits = {edit.site.scope: edit for edit in model.plan.edits}
    for module in modules:
        if module.path not in edits:
            misses = (one.reason for one in model.plan.misses if module.path in one.site)
            reason = next(misses, "no site is there")
            raise InterchangeError(f"'{module.path}' cannot have a delta here: {reason}")
    slots, weights = model.deltas.values(), dict(model.named_parameters(remove_duplicate=False))
    with torch.no_grad():
        for module in modules:
            for parameter in edits[module.path].parameters:
                slots[parameter.path].copy_(module.tensors[parameter.name])
        for path, value in whole.items():
            weights[path].copy_(value)
