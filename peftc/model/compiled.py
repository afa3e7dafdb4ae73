"""The compiled model: a Hugging Face model of the same class whose forward runs rewritten graphs."""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftc.graph.arguments import CaptureError
from peftc.graph.cache import flatten_cache
from peftc.graph.capture import TRACING
from peftc.graph.layers import lend, take_back
from peftc.graph.program import Program
from peftc.graph.state import Fingerprint
from peftc.model.caches import fill, prepared
from peftc.model.programs import Programs, Transform
from peftc.model.running import Runner, run_program
from peftc.model.saving import save
from peftc.model.sharing import ATTACHED, SHARED, Origin, Sharing, is_attached, require_bare
from peftc.model.tensors import Activations, Deltas, started
from peftc.plan.plan import Plan
from peftc.store.sparse import unpacked

__all__ = ["CompiledModel", "attach", "bare_copy", "detach", "run_program"]

# Arguments that ask for a cache or name the output type; the entries decide both themselves.
_CONTROL = ("use_cache", "return_dict", "past_key_values", "encoder_outputs")
# Arguments of Hugging Face's `save_pretrained` that have no meaning for one small file.
_HARMLESS = frozenset(
    {
        *("max_shard_size", "safe_serialization", "token", "save_peft_format"),
        "save_original_format",
    }
)


@dataclass(frozen=True)
class Checkpointing:
    """How layers are computed again on the way back: by `run`, each of `every` so many."""

    run: Callable[..., Any]
    every: int

    @staticmethod
    def of(backbone: PreTrainedModel) -> Checkpointing | None:
        """How a backbone was told to do it, before it was compiled."""
        module: Any
        for module in backbone.modules():
            if getattr(module, "gradient_checkpointing", False):
                return Checkpointing(module._gradient_checkpointing_func, 1)
        return None


class CompiledModel(Sharing):
    """Mixed in front of a Hugging Face class by `attach`; never built directly.

    It has parameters, buffers, modules, mode, configuration and loss in common with `backbone`: they are the same
    objects, seen and set from both sides. Any other attribute that the backbone has is read and set there. Its own
    are `deltas` (the new tensors), `plan` (what was inserted), `form` ("training", or "stored" once the constants
    of the deltas have been evaluated), its hooks, its graphs, and a `forward` set on it, as accelerate does.
    Copies and pickles hold no graphs: they capture anew.
    """

    plan: Plan
    deltas: Deltas
    form: str
    example: Mapping[str, torch.Tensor] | None = None
    _programs: Programs
    _transform: Transform
    _origin: Origin
    _checkpointing: Checkpointing | None = None

    def train(self, mode: bool = True) -> Any:
        """Switch the mode of the deltas and of the backbone; what was computed of parameters is forgotten."""
        self._programs.forget()
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own forward: same arguments, same output type."""
        given = dict(zip(self._programs.facts.arguments, args, strict=False)) | kwargs
        wanted = {k: v for k, v in given.items() if v is not None}
        output = self._cached(wanted) if wanted.get("use_cache") else self._plain(wanted)
        return_dict = wanted.get("return_dict", self._programs.facts.returns_dict)
        return output if return_dict else output.to_tuple()

    def _set_gradient_checkpointing(
        self,
        enable: bool = True,
        gradient_checkpointing_func: Callable[..., Any] = checkpoint,
        every_n_layers: int = 1,
    ) -> None:
        """What transformers calls to switch activation checkpointing on and off: every n-th layer is computed again
        on the way back."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant"):
            raise ValueError(
                "a compiled model recomputes its layers without reentering; leave use_reentrant out, or False"
            )
        if enable and not self._programs.layers:
            raise ValueError(f"{type(self).__name__} has no list of layers to compute again")
        chosen = Checkpointing(gradient_checkpointing_func, every_n_layers)
        self.__dict__["_checkpointing"] = chosen if enable else None

    @property
    def is_activation_checkpointing(self) -> bool:
        """Whether layers are computed again while training."""
        return self._checkpointing is not None

    @property
    def is_gradient_checkpointing(self) -> bool:
        """As `is_activation_checkpointing`."""
        return self._checkpointing is not None

    def enable_input_require_grads(self) -> None:
        """Nothing: gradients reach the deltas of a compiled model in any case."""

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder with its deltas, as `generate` wants it."""
        return _Encoder(self) if modality is None else super().get_encoder(modality)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        stored: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the deltas alone: spec, fingerprint of the backbone, safetensors. See `peftc.model.saving`.

        `state_dict` gives the tensors where the model's own are parts (FSDP); only the main process writes.
        Raises TypeError for an argument that would change what is written elsewhere and has no meaning here.
        """
        odd = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v not in (None, False))
        if odd:
            raise TypeError(
                f"save_pretrained of a compiled model takes no '{odd[0]}': it writes one small file of deltas"
            )
        if is_main_process:
            save(self, Path(save_directory), stored=stored, tensors=state_dict)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, of what `save_pretrained` wrote too: Trainer resumes from sparse tensors."""
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        return super().load_state_dict(unpacked(state_dict, shapes), strict, assign)

    def program(self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> Program:
        """The rewritten graph for an entry and this kind of inputs, captured when first asked for."""
        return self._programs.program(entry, inputs, flags)

    def adopt(
        self,
        program: Program,
        inputs: Mapping[str, Any],
        flags: Mapping[str, Any],
        seen: Fingerprint,
    ) -> None:
        """Use a graph that was captured for planning, instead of capturing it again."""
        self._programs.adopt(program, inputs, flags, seen)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_programs"}

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self.backbone),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _connect(self)

    def _run(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        compiling = torch.compiler.is_compiling()
        ready = _ready if compiling else Programs.ready
        runner, stored = ready(self._programs, entry, inputs, flags)
        if not compiling and (self._programs.hooked or self._recomputes()):
            fields = self._by_layers(runner, stored, inputs)
        else:
            fields = runner.run(stored, inputs)
        return runner.program.output_type, fields

    def _recomputes(self) -> bool:
        """Whether layers are computed again on the way back."""
        return self._checkpointing is not None and self.training and torch.is_grad_enabled()

    def _by_layers(
        self, runner: Runner, stored: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Run a graph in the backbone's layers, so that what follows these follows it."""
        layers = self._programs.layers
        lend(layers)
        chosen = self._checkpointing if self._recomputes() else None
        again = dict.fromkeys([*layers][:: chosen.every], chosen.run) if chosen else {}
        return runner.run_layers(stored, inputs, layers, again.get)

    def _plain(self, wanted: Mapping[str, Any]) -> Any:
        tensors, flags = _split(wanted)
        if "encoder_outputs" in wanted:
            tensors["encoder_hidden_states"] = wanted["encoder_outputs"][0]
        flags |= self._programs.facts.flags
        output_type, fields = self._run("forward", tensors, flags)
        return output_type(**fields)

    def _cached(self, wanted: Mapping[str, Any]) -> Any:
        """One generation step: `prefill` while the cache is empty, `decode` from then on."""
        tensors, flags = _split(wanted)
        seq2seq = self._programs.facts.encoder_decoder
        cache: Any = prepared(wanted.get("past_key_values"), seq2seq)
        first = cache.get_seq_length() == 0
        encoded = {}
        if seq2seq:
            hidden = self._encoded(wanted, tensors)
            source = (self.main_input_name, "inputs_embeds")
            tensors = {k: v for k, v in tensors.items() if k not in source}
            encoded = {"encoder_last_hidden_state": hidden}
            if first:
                tensors["encoder_hidden_states"] = hidden
        if not first:
            tensors |= flatten_cache(cache)
        output_type, fields = self._run("prefill" if first else "decode", tensors, flags)
        present = {k: fields.pop(k) for k in list(fields) if k.startswith("past.")}
        kept = {}
        if present or not first:
            fill(cache, present)
            kept = {"past_key_values": cache}
        return output_type(**fields, **kept, **encoded)

    def _encoded(self, wanted: Mapping[str, Any], tensors: Mapping[str, Any]) -> torch.Tensor:
        if "encoder_outputs" in wanted:
            hidden: torch.Tensor = wanted["encoder_outputs"][0]
            return hidden
        names = (self.main_input_name, "attention_mask", "inputs_embeds")
        encoder = self.get_encoder()
        output = encoder(**{k: tensors[k] for k in names if k in tensors})
        first: torch.Tensor = output.last_hidden_state
        return first


# Finding a graph is bookkeeping: torch.compile sees the graph, and not how it was found.
_ready = torch.compiler.disable(Programs.ready)  # type: ignore[no-untyped-call]


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


class _Encoder(nn.Module):
    def __init__(self, model: CompiledModel) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are the model's
        self.main_input_name = model.main_input_name

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        model: CompiledModel = self.__dict__["model"]
        given = dict(zip((self.main_input_name, "attention_mask"), args, strict=False)) | kwargs
        tensors, flags = _split({k: v for k, v in given.items() if v is not None})
        output_type, fields = model._run("encode", tensors, flags)
        output: BaseModelOutput = output_type(**fields)
        return output


def attach(
    backbone: PreTrainedModel,
    plan: Plan,
    transform: Transform,
    form: str = "training",
    activations: Activations | None = None,
    values: Mapping[str, torch.Tensor] | None = None,
) -> CompiledModel:
    """A compiled model over `backbone`. Weights are shared, not copied; only deltas require grad.

    Deltas start as `values` where they are known, by path; nothing is drawn then. `activations` gives what deltas
    start as that start as words. Raises AttachError where `require_bare` does; the backbone is then as it was.
    """
    require_bare(backbone)
    deltas = Deltas()
    kind = (backbone.device, backbone.dtype)
    for parameter, value in started(plan.edits, backbone.get_parameter, *kind, activations, values):
        deltas.place(parameter.path, value, parameter.trainable)
    deltas.train(backbone.training)
    model = _blank(type(backbone))
    own = {"plan": plan, "form": form, "_origin": Origin.of(backbone), "_transform": transform}
    model.__dict__.update(own, _backbone=backbone)
    model.__dict__.update({name: vars(backbone)[name] for name in SHARED})
    model.__dict__["_checkpointing"] = Checkpointing.of(backbone)
    model._modules.update(backbone._modules, deltas=deltas)
    _connect(model)
    free = {one.path for one in plan.unfrozen}
    for path, weight in backbone.named_parameters():
        weight.requires_grad_(path in free)
    return model


def bare_copy(model: CompiledModel) -> PreTrainedModel:
    """A copy of the backbone, with the `requires_grad` flags that it came with."""
    backbone = copy.deepcopy(model.backbone)
    model.__dict__["_origin"].restore_flags(backbone)
    take_back(backbone)
    return backbone


def _blank(cls: Any) -> CompiledModel:
    """A compiled model of a class, without a backbone yet."""
    compiled = _compiled_class(cls)
    model: CompiledModel = compiled.__new__(compiled)
    nn.Module.__init__(model)
    return model


def _connect(model: CompiledModel) -> None:
    backbone = model.backbone
    model.__dict__["_programs"] = Programs(
        backbone, model.deltas, model.plan.room, model.__dict__["_transform"]
    )
    if not is_attached(backbone):
        ATTACHED[backbone] = ref(model)


@functools.cache
def _compiled_class(cls: Any) -> Any:
    """A subclass with the same name; its forward shows the signature that Trainer and generate read."""

    def forward(self: CompiledModel, *args: Any, **kwargs: Any) -> Any:
        return CompiledModel.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    body = {
        "__module__": cls.__module__,
        "forward": forward,
        "supports_gradient_checkpointing": True,
    }
    return type(cls.__name__, (CompiledModel, cls), body)


def detach(model: CompiledModel) -> PreTrainedModel:
    """The backbone as it was: no deltas, the `requires_grad` flags, modes and loss that it came with.

    Parameters that the spec unfroze keep what they learned.
    """
    backbone = model.backbone
    with TRACING:
        model.__dict__["_origin"].restore(backbone)
        take_back(backbone)
        ATTACHED.pop(backbone, None)
    return backbone
