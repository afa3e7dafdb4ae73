"""The compiled model: a Hugging Face model of the same class whose forward runs rewritten graphs."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache, EncoderDecoderCache
from transformers.modeling_outputs import BaseModelOutput

from peftc.graph.arguments import CaptureError, forward_flags
from peftc.graph.capture import capture
from peftc.graph.entries import flatten_cache
from peftc.graph.program import Program
from peftc.model.saving import save
from peftc.model.tensors import Activations, Deltas, started
from peftc.plan.plan import Plan
from peftc.store.sparse import unpacked

Transform = Callable[[Program], None]

# Arguments that ask for a cache or name the output type; the entries decide both themselves.
_CONTROL = ("use_cache", "return_dict", "past_key_values", "encoder_outputs")


class CompiledModel(PreTrainedModel):
    """Mixed in front of a Hugging Face class by `attach`; never built directly.

    `plan` says what was inserted, `deltas` holds the new tensors, and everything else is the backbone's.
    `form` is "training", or "stored" once the constants of the deltas have been evaluated.
    """

    plan: Plan
    deltas: Deltas
    form: str
    _backbone: PreTrainedModel
    _programs: dict[tuple[Any, ...], Program]
    _transform: Transform

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own forward: same arguments, same output type."""
        names = [
            n for n in inspect.signature(type(self._backbone).forward).parameters if n != "self"
        ]
        given = dict(zip(names, args, strict=False)) | kwargs
        wanted = {k: v for k, v in given.items() if v is not None}
        return_dict = wanted.get("return_dict", getattr(self.config, "return_dict", True))
        output = self._cached(wanted) if wanted.get("use_cache") else self._plain(wanted)
        return output if return_dict else output.to_tuple()

    def train(self, mode: bool = True) -> Any:
        """Switch the mode of the deltas and of the backbone, whose modules are shared."""
        self._backbone.training = mode
        return super().train(mode)

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder with its deltas, as `generate` wants it."""
        return _Encoder(self) if modality is None else super().get_encoder(modality)

    def save_pretrained(self, save_directory: str | Path, **kwargs: Any) -> None:  # type: ignore[override]
        """Write the deltas alone: spec, fingerprint of the backbone, safetensors. See `peftc.model.saving`."""
        stored = bool(kwargs.get("stored", False))
        save(self, Path(save_directory), stored=stored)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, of what `save_pretrained` wrote too: Trainer resumes from sparse tensors."""
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        return super().load_state_dict(unpacked(state_dict, shapes), strict, assign)

    def program(self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> Program:
        """The rewritten graph for an entry and this kind of inputs, captured when first asked for."""
        key = self._key(entry, inputs, flags, self.training)
        if key not in self._programs:
            program = capture(self._backbone, entry, inputs, flags, self.plan.room)
            self._transform(program)
            self._programs[key] = program
        return self._programs[key]

    def adopt(self, program: Program, inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> None:
        """Use a graph that was captured for planning, instead of capturing it again."""
        self._transform(program)
        key = self._key(program.entry, inputs, flags, program.training)
        self._programs[key] = program

    def _key(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any], training: bool
    ) -> tuple[Any, ...]:
        signature = tuple((k, v.dtype, v.device, v.ndim) for k, v in sorted(inputs.items()))
        settings = tuple(sorted((k, repr(v)) for k, v in flags.items()))
        loss = id(self._backbone.loss_function)
        return (entry, training, self.dtype, signature, settings, loss)

    def _run(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        program = self.program(entry, inputs, flags)
        return program.output_type, run_program(self, program, inputs)

    def _plain(self, wanted: Mapping[str, Any]) -> Any:
        tensors, flags = _split(wanted)
        if "encoder_outputs" in wanted:
            tensors["encoder_hidden_states"] = wanted["encoder_outputs"][0]
        flags |= forward_flags(self._backbone)
        output_type, fields = self._run("forward", tensors, flags)
        return output_type(**fields)

    def _cached(self, wanted: Mapping[str, Any]) -> Any:
        """One generation step: `prefill` while the cache is empty, `decode` from then on."""
        tensors, flags = _split(wanted)
        cache = wanted.get("past_key_values")
        seq2seq = bool(self.config.is_encoder_decoder)
        if cache is None:
            cache = (
                EncoderDecoderCache(DynamicCache(), DynamicCache()) if seq2seq else DynamicCache()
            )
        _check_cache(cache)
        first = cache.get_seq_length() == 0
        hidden = None
        if seq2seq:
            hidden = self._encoded(wanted, tensors)
            source = (self.main_input_name, "inputs_embeds")
            tensors = {k: v for k, v in tensors.items() if k not in source}
            if first:
                tensors["encoder_hidden_states"] = hidden
        if not first:
            tensors |= flatten_cache(cache)
        output_type, fields = self._run("prefill" if first else "decode", tensors, flags)
        logits = fields.pop("logits")
        _fill_cache(cache, fields)
        extra = {"encoder_last_hidden_state": hidden} if seq2seq else {}
        return output_type(logits=logits, past_key_values=cache, **extra)

    def _encoded(self, wanted: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        if "encoder_outputs" in wanted:
            hidden: torch.Tensor = wanted["encoder_outputs"][0]
            return hidden
        names = (self.main_input_name, "attention_mask", "inputs_embeds")
        encoder = self.get_encoder()
        output = encoder(**{k: tensors[k] for k in names if k in tensors})
        first: torch.Tensor = output.last_hidden_state
        return first


def run_program(
    model: PreTrainedModel,
    program: Program,
    inputs: Mapping[str, torch.Tensor],
    by: Callable[..., Any] | None = None,
) -> dict[str, Any]:
    """Run a graph on the tensors that the module tree of `model` (compiled or plain) holds now."""
    deltas = getattr(model, "deltas", model)
    fetch = {
        "parameter": functools.partial(_get, model),
        "buffer": functools.partial(_get, model),
        "delta": functools.partial(_get, deltas),
    }
    outputs: dict[str, Any] = program.run(fetch, inputs, by)
    return outputs


def _split(wanted: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors become inputs of the graph; switches and numbers are fixed in it."""
    tensors = {k: v for k, v in wanted.items() if isinstance(v, torch.Tensor)}
    flags = {k: v for k, v in wanted.items() if k not in tensors and k not in _CONTROL}
    odd = [k for k, v in flags.items() if not isinstance(v, bool | int | float | str)]
    if odd:
        raise CaptureError(
            f"argument '{odd[0]}' is a {type(flags[odd[0]]).__name__}; a compiled model takes tensors, "
            "numbers and switches"
        )
    return tensors, flags


def _check_cache(cache: Cache) -> None:
    parts = (
        (cache.self_attention_cache, cache.cross_attention_cache)
        if isinstance(cache, EncoderDecoderCache)
        else (cache,)
    )
    for part in parts:
        if not isinstance(part, DynamicCache):
            raise CaptureError(
                f"a compiled model generates with DynamicCache, not {type(part).__name__}; "
                "leave `cache_implementation` unset"
            )


def _fill_cache(cache: Cache, present: Mapping[str, torch.Tensor]) -> None:
    for part in ("self", "cross"):
        one: Any = getattr(cache, f"{part}_attention_cache", cache)
        count = sum(k.startswith(f"past.{part}.") for k in present) // 2
        for i in range(count):
            key, value = present[f"past.{part}.{i}.key"], present[f"past.{part}.{i}.value"]
            if len(one.layers) > i and one.layers[i].is_initialized:
                one.layers[i].keys, one.layers[i].values = key, value
            else:
                one.update(key, value, i)
            if part == "cross":
                cache.is_updated[i] = True  # type: ignore[attr-defined]


class _Encoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self, model: CompiledModel) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are the model's

    def forward(self, **kwargs: Any) -> BaseModelOutput:
        wanted = {k: v for k, v in kwargs.items() if v is not None}
        tensors, flags = _split(wanted)
        output_type, fields = self.__dict__["model"]._run("encode", tensors, flags)
        output: BaseModelOutput = output_type(**fields)
        return output


def _get(root: nn.Module, path: str) -> torch.Tensor:
    owner, _, name = path.rpartition(".")
    module = _owner(root, owner)
    value: torch.Tensor = getattr(module, name)
    return value


def _owner(root: nn.Module, path: str) -> nn.Module:
    return root.get_submodule(path) if path else root


def attach(
    backbone: PreTrainedModel,
    plan: Plan,
    transform: Transform,
    form: str = "training",
    activations: Activations | None = None,
) -> CompiledModel:
    """A compiled model over `backbone`. Weights are shared, not copied; only deltas require grad.

    `activations` gives what deltas start as that start as words; without it they are zeros, to be filled.
    """
    cls: Any = type(backbone)
    model: CompiledModel = _compiled_class(cls).__new__(_compiled_class(cls))
    model.__dict__.update(backbone.__dict__)
    for registry in ("_modules", "_parameters", "_buffers"):
        model.__dict__[registry] = copy.copy(backbone.__dict__[registry])
    model.__dict__["_backbone"] = backbone
    model.__dict__["_programs"] = {}
    model.__dict__["_transform"] = transform
    model.__dict__["_required_grad"] = {n: p.requires_grad for n, p in backbone.named_parameters()}
    model.plan, model.form = plan, form
    model.deltas = Deltas()
    kind = (backbone.device, backbone.dtype)
    for parameter, value in started(plan.edits, backbone.get_parameter, *kind, activations):
        model.deltas.place(parameter.path, value, parameter.trainable)
    free = {one.path for one in plan.unfrozen}
    for path, weight in backbone.named_parameters():
        weight.requires_grad_(path in free)
    return model


@functools.cache
def _compiled_class(cls: Any) -> Any:
    """A subclass with the same name; its forward shows the signature that Trainer and generate read."""

    def forward(self: CompiledModel, *args: Any, **kwargs: Any) -> Any:
        return CompiledModel.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    body = {
        "__module__": cls.__module__,
        "forward": forward,
        "supports_gradient_checkpointing": False,
    }
    return type(cls.__name__, (CompiledModel, cls), body)


def detach(model: CompiledModel) -> PreTrainedModel:
    """The backbone as it was: no deltas, and the `requires_grad` flags it came with.

    Parameters that the spec unfroze keep what they learned.
    """
    backbone: PreTrainedModel = model.__dict__["_backbone"]
    for path, weight in backbone.named_parameters():
        weight.requires_grad_(model.__dict__["_required_grad"][path])
    return backbone
