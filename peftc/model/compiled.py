"""The compiled model: a Hugging Face model of the same class whose forward runs rewritten graphs."""

from __future__ import annotations

import copy
import functools
import inspect
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn
from weakref import ref

import torch
from huggingface_hub import HfApi
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer
from transformers.masking_utils import create_masks_for_generate

from peftc.errors import UncachedError
from peftc.graph.capture import TRACING
from peftc.graph.entries import encoded
from peftc.graph.layers import lend, take_back
from peftc.graph.program import Program
from peftc.graph.quantized import keep_as_stored
from peftc.graph.state import Fingerprint
from peftc.model.caches import fill, is_empty, is_static, past, prepared, widened
from peftc.model.card import card
from peftc.model.double import double
from peftc.model.inner import Base, Encoder, base_of, connect, split
from peftc.model.programs import Programs
from peftc.model.running import Runner, run_program
from peftc.model.saving import learned, save
from peftc.model.sets import Compiler, Made, SetError, Sets
from peftc.model.sharing import ATTACHED, SHARED, Origin, Sharing, is_attached, require_bare
from peftc.model.tensors import Deltas
from peftc.model.traced import find
from peftc.plan.plan import Plan
from peftc.rewrite.evaluate import penalty_value
from peftc.store.deltas import DEFAULT
from peftc.store.sparse import unpacked

__all__ = ["CompiledModel", "attach", "bare_copy", "detach", "run_program"]

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


class _AfterPrompt(BaseStreamer):
    """A streamer that a generation which began anew tells of what is behind the prompt."""

    def __init__(self, streamer: BaseStreamer) -> None:
        self.streamer, self.told = streamer, False

    def put(self, value: torch.Tensor) -> None:
        if self.told:
            self.streamer.put(value)
        self.told = True

    def end(self) -> None:
        self.streamer.end()


class CompiledModel(Sharing):
    """Mixed in front of a Hugging Face class by `attach`; never built directly.

    It has parameters, buffers and configuration in common with `backbone`: they are the same objects, seen and set
    from both sides. Its modules, with their modes, hooks and attributes, and its loss are its own, so that the
    backbone stays what it was, and may be a reference while the model trains. Its own are also `deltas` (the new
    tensors), `plan` (what was inserted), `form` ("training", or "stored" once the constants of the deltas have been
    evaluated), its graphs, and a `forward` set on it, as accelerate does. Copies and pickles hold no graphs: they
    capture anew.

    It may have several delta sets (`add`, `use`, `remove`), of which `plan` and `form` tell those in use, and
    `deltas` holds all. Without any in use, and inside `base`, it is the backbone that runs.
    """

    # What transformers asks before it trains a quantised model: whether something is there that trains.
    _hf_peft_config_loaded = True

    plan: Plan
    deltas: Deltas
    form: str
    _programs: Programs
    _sets: Sets
    _origin: Origin
    _checkpointing: Checkpointing | None = None
    _rows: int  # that stand in a cache before the tokens
    _disabled: tuple[str, ...] = ()
    _asked: bool = False  # for the penalty
    _uncached: bool = False  # it keeps more than a cache holds

    @property
    def example(self) -> Mapping[str, torch.Tensor] | None:
        """The batch that it was captured with, so that no later verb need be told again."""
        return self._sets.compiler.example

    @property
    def delta_sets(self) -> tuple[str, ...]:
        """The names of all delta sets, in the order in which they came."""
        return tuple(self._sets.all)

    @property
    def in_use(self) -> tuple[str, ...]:
        """The names of the delta sets in use, in the order in which they act."""
        return self._sets.names

    def add(self, spec: Any, name: str) -> None:
        """Add the deltas of a spec as a set of this name, not in use yet.

        `spec` is all that `peftc.compile` takes, or a directory of deltas that were made for this backbone. Raises
        SetError for a name that cannot be, PlanError, DeltaError; the model is then as it was.
        """
        with TRACING, self.base():
            self._sets.add(name, self._sets.compiler.made(self.body, spec))

    def include(self, name: str, made: Made) -> None:
        """`add` of what was planned already."""
        with TRACING:
            self._sets.add(name, made)

    def parts(self) -> dict[str, Plan]:
        """The plans of the delta sets in use, each by itself."""
        return {name: self._sets.all[name].plan for name in self.in_use}

    def use(
        self, names: str | Sequence[str] | None, *, train: str | Sequence[str] | None = None
    ) -> None:
        """Let these delta sets act, in this order, and no others; None is the bare backbone.

        Those in use train, or of them only those in `train`; what trains of all others is frozen. Nothing is traced
        again, but for another number of rows in front. Raises SetError, and PlanError for sets that cannot act
        together; the model is then as it was.
        """
        chosen = _listed(names)
        training = chosen if train is None else _listed(train)
        odd = [name for name in training if name not in chosen]
        if odd:
            raise SetError(f"the delta set '{odd[0]}' is to train, but is not in use")
        with TRACING:
            self._use(chosen)
            self._sets.train(training)

    @contextmanager
    def using(self, names: str | Sequence[str] | None) -> Iterator[None]:
        """Inside, these delta sets act and no others; what trains is untouched."""
        before = self._sets.names
        with TRACING:
            self._use(_listed(names))
        try:
            yield
        finally:
            with TRACING:
                self._use(before)

    def base(self) -> AbstractContextManager[None]:
        """Inside, the model is its bare backbone, bit for bit."""
        return self.using(None)

    def remove(self, name: str | Sequence[str]) -> None:
        """Forget delta sets that are not in use. Raises SetError."""
        with TRACING:
            self._sets.remove(_listed(name))

    def _use(self, names: Sequence[str]) -> None:
        used = self._sets.use(names)
        own = {"plan": used.plan, "form": used.form, "_programs": used.programs, "_rows": used.rows}
        self.__dict__.update(own)

    def penalty(self) -> torch.Tensor:
        """What the deltas in use add to the model's own loss in training, a number of their tensors alone: for a loss
        that is computed elsewhere, as by label smoothing. 0 where no spec has a `penalty`."""
        self.__dict__["_asked"] = True
        return penalty_value(self.plan.edits, self.deltas.values()).to(self.device)

    def train(self, mode: bool = True) -> Any:
        """Switch the mode; what was computed of parameters is forgotten."""
        self._sets.forget()
        return super().train(mode)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own forward: same arguments, same output type."""
        if not self._sets.names:
            return self.body(*args, **kwargs)
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

    def create_masks_for_generate(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        past_key_values: Any = None,
        **more: Any,
    ) -> torch.Tensor | None:
        """What `generate` gives for a static cache: a mask of two axes, of which the graph makes its own; in all steps
        one of one size."""
        if not self._sets.names:
            make = getattr(self.body, "create_masks_for_generate", create_masks_for_generate)
            given = {"inputs_embeds": inputs_embeds, "attention_mask": attention_mask, **more}
            return make(past_key_values=past_key_values, **given)  # type: ignore[no-any-return]
        if is_empty(past_key_values) or not is_static(past_key_values):
            return attention_mask
        if attention_mask is None:
            rows = inputs_embeds.shape[0]
            attention_mask = torch.ones(rows, 1, dtype=torch.long, device=inputs_embeds.device)
            return widened(attention_mask, past_key_values, self._rows, 1)
        return widened(attention_mask, past_key_values, self._rows)

    def _supports_mm_encoder_outputs(self) -> bool:
        """What `generate` asks before it encodes images: a graph takes them with the tokens."""
        bare: Any = super()
        return not self._sets.names and bool(bare._supports_mm_encoder_outputs())

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As the backbone's own; without a cache where that would not hold all that it keeps from step to step."""
        bare: Any = super()
        reason = None
        if not (self._uncached and self._sets.names):
            try:
                return bare.generate(*args, **kwargs)
            except UncachedError as error:
                reason = error
        if reason is not None and kwargs.get("streamer") is not None:
            kwargs["streamer"] = _AfterPrompt(kwargs["streamer"])
        found = bare.generate(*args, **{**kwargs, "use_cache": False})
        if reason is not None:  # not what was asked with, as it goes without
            self.__dict__["_uncached"] = True
            warnings.warn(f"generated without a cache: {reason}", stacklevel=2)
        return found

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        """The encoder with its deltas, as `generate` wants it."""
        if modality is not None:
            other: nn.Module = super().get_encoder(modality)
            return other
        if self._sets.names:
            return Encoder(self)
        bare: nn.Module = self.body.get_encoder()
        return bare

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | Path,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        *,
        stored: bool = False,
        name: str | Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write the deltas alone: spec, fingerprint of the backbone, safetensors. See `peftc.model.saving`.

        They are those of the set `name`, or of several; without it, of the sets in use. `state_dict` gives the
        tensors where the model's own are parts (FSDP); only the main process writes. Raises TypeError for an argument that would change what is written elsewhere and has no meaning here.
        """
        odd = sorted(k for k, v in kwargs.items() if k not in _HARMLESS and v not in (None, False))
        if odd:
            raise TypeError(
                f"save_pretrained of a compiled model takes no '{odd[0]}': it writes one small file of deltas"
            )
        if is_main_process:
            names = self._sets.known(self.in_use if name is None else _listed(name))
            save(self, Path(save_directory), names, stored=stored, tensors=state_dict)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        tags: list[str] | None = None,
        max_shard_size: Any = None,
        **commit: Any,
    ) -> Any:
        """Put what `save_pretrained` writes, and a model card, into a repository of a hub; `commit` is what
        `huggingface_hub.HfApi.upload_folder` takes of one. Gives what that does."""
        api = HfApi(token=token)
        name = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            backbone = self.config.name_or_path or type(self).__name__
            card(name, self.plan, backbone, tags).save(Path(folder) / "README.md")
            return api.upload_folder(repo_id=name, folder_path=folder, **commit)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """As torch's, of what `save_pretrained` wrote too: Trainer resumes from sparse tensors."""
        shapes = {name: tuple(value.shape) for name, value in self.state_dict().items()}
        return super().load_state_dict(unpacked(state_dict, shapes), strict, assign)

    def program(self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]) -> Program:
        """The rewritten graph for an entry and this kind of inputs, captured when first asked for."""
        return self._programs.program(entry, inputs, flags)

    def lean_program(self, inputs: Mapping[str, torch.Tensor]) -> Program:
        """The graph that a `forward` with these inputs runs in the mode of now."""
        runner, _ = self._programs.ready("forward", inputs, self._programs.facts.flags)
        return runner.program

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

    # What transformers has for adapters of PEFT, for delta sets.

    def add_adapter(self, adapter_config: Any, adapter_name: str | None = None) -> None:
        """`add` of a spec, and `use`."""
        name = DEFAULT if adapter_name is None else adapter_name
        self.add(adapter_config, name)
        self.use(name)

    def load_adapter(self, peft_model_id: Any, adapter_name: str | None = None, **odd: Any) -> None:  # type: ignore[override]
        """`add` of a directory of deltas, and `use`."""
        if odd:
            raise TypeError(f"load_adapter of a compiled model takes no '{next(iter(odd))}'")
        self.add_adapter(peft_model_id, adapter_name)

    def set_adapter(self, adapter_name: list[str] | str) -> None:
        """`use`."""
        self.use(adapter_name)

    def disable_adapters(self) -> None:
        """Use none, until `enable_adapters`."""
        self.__dict__["_disabled"] = self.in_use or self._disabled
        self._use(())

    def enable_adapters(self) -> None:
        """Use those again that were in use before `disable_adapters`."""
        if not self.in_use:
            self._use(self._disabled)

    def active_adapters(self) -> list[str]:
        """The names of the delta sets in use."""
        return list(self.in_use)

    def delete_adapter(self, adapter_names: list[str] | str) -> None:
        """`remove`; those in use are used no longer."""
        gone = self._sets.known(_listed(adapter_names))
        if set(gone) & set(self.in_use):
            self.use([name for name in self.in_use if name not in gone])
        self.remove(gone)

    def get_adapter_state_dict(
        self, adapter_name: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """The tensors of a delta set, or of those in use, by their names in the model."""
        names = self.in_use if adapter_name is None else self._sets.known([adapter_name])
        return dict(learned(self, names, state_dict))

    def enable_peft_hotswap(self, *_: Any, **__: Any) -> NoReturn:
        """Refused: delta sets are switched without it."""
        raise SetError("a compiled model needs no hotswap: `add` a delta set, and `use` it")

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self.backbone),), self.__getstate__()

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _connect(self)

    def run(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """The class of the output, and its fields, of an entry with the deltas in use."""
        if torch.compiler.is_compiling():
            return self._traced(entry, inputs, flags)
        runner, stored = self._programs.ready(entry, inputs, flags)
        if self._programs.hooked or self._recomputes():
            fields = self._by_layers(runner, stored, inputs)
        else:
            fields = runner.run(stored, inputs)
        return runner.program.output_type, fields

    def _traced(
        self, entry: str, inputs: Mapping[str, Any], flags: Mapping[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        """As `run`, for torch.compile, which shall see all at once, and export, which shall see one graph."""
        if self._programs.placed:
            return _unseen(self, entry, inputs, flags)  # type: ignore[no-any-return]
        if not torch.compiler.is_exporting():
            one = find(self._programs, entry, self.body, inputs, flags)
            if one is not None:
                return one.program.output_type, one.run(self, inputs)
        runner, stored = _ready(self._programs, entry, inputs, flags)
        return runner.program.output_type, runner.run(stored, inputs)

    def _recomputes(self) -> bool:
        """Whether layers are computed again on the way back."""
        return self._checkpointing is not None and self.training and torch.is_grad_enabled()

    def _by_layers(
        self, runner: Runner, stored: Sequence[torch.Tensor], inputs: Mapping[str, torch.Tensor]
    ) -> dict[str, Any]:
        """Run a graph in the backbone's layers, so that what follows these follows it."""
        layers, followed = self._programs.layers, self._programs.followed
        lend(followed)
        chosen = self._checkpointing if self._recomputes() else None
        again = dict.fromkeys([*layers][:: chosen.every], chosen.run) if chosen else {}
        return runner.run_layers(stored, inputs, followed, again.get)

    def uncached(self, entry: str, wanted: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
        """As `run`, of arguments as they are given."""
        tensors, flags = split(wanted)
        if "encoder_outputs" in wanted:
            tensors |= encoded(wanted["encoder_outputs"])
        return self.run(entry, tensors, flags | self._programs.facts.flags)

    def _plain(self, wanted: Mapping[str, Any]) -> Any:
        output_type, fields = self.uncached("forward", wanted)
        if not torch.compiler.is_compiling() and "loss" not in fields and self.plan.penalized:
            self._tell_of_penalty()
        return output_type(**fields)

    def _tell_of_penalty(self) -> None:
        """A loss that is computed elsewhere lacks the penalty, unless who computes it knows."""
        if self.training and torch.is_grad_enabled() and not self._asked:
            self.__dict__["_asked"] = True
            warnings.warn(
                f"{self.plan.spec.name} adds a penalty to the model's own loss, which was not asked for (no labels): "
                "add model.penalty() to yours, or train with peftc.training.trainer.Trainer",
                stacklevel=4,
            )

    def _cached(self, wanted: Mapping[str, Any]) -> Any:
        """One generation step: `prefill` while the cache is empty, `decode` from then on."""
        tensors, flags = split(wanted)
        facts = self._programs.facts
        cache: Any = prepared(wanted.get(facts.cache), self.config)
        first, static, rows = is_empty(cache), is_static(cache), self._rows
        behind = {}
        if facts.encoder_decoder:
            given = encoded(wanted.get("encoder_outputs") or self._encode(tensors))
            source = (self.main_input_name, "inputs_embeds")
            tensors = {k: v for k, v in tensors.items() if k not in source}
            behind = {"encoder_last_hidden_state": given["encoder_hidden_states"]}
            if first:
                tensors |= given
        entry = "prefill" if first else "decode_static" if static else "decode"
        if not first:
            tensors |= past(cache, tensors, rows)
        output_type, fields = self.run(entry, tensors, flags)
        present = {k: fields.pop(k) for k in list(fields) if k.startswith("past.")}
        kept = {}
        if present or not first:
            fill(cache, present, rows)
            kept = {facts.cache: cache}
        return output_type(**fields, **kept, **behind)

    def _encode(self, tensors: Mapping[str, Any]) -> Any:
        names = (self.main_input_name, "attention_mask", "inputs_embeds")
        return self.get_encoder()(**{k: tensors[k] for k in names if k in tensors})


# Finding a graph is bookkeeping: torch.compile sees the graph, and not how it was found. Nor how weights are fetched.
_ready = torch.compiler.disable(Programs.ready)  # type: ignore[no-untyped-call]
_unseen = torch.compiler.disable(CompiledModel.run)  # type: ignore[no-untyped-call]


def attach(
    backbone: PreTrainedModel, made: Made, compiler: Compiler, name: str = DEFAULT
) -> CompiledModel:
    """A compiled model over `backbone`, whose first delta set is `made`. Weights are shared, not copied; only what
    the spec trains requires grad. Raises AttachError where `require_bare` does; the backbone is then as it was.
    """
    require_bare(backbone)
    keep_as_stored(backbone)
    deltas, body = Deltas(), double(backbone)
    origin = Origin.of(backbone)
    sets = Sets(body, deltas, compiler, name, made)
    model = _blank(type(backbone))
    model.__dict__.update(_origin=origin, _sets=sets, _backbone=backbone, _body=body)
    model.__dict__.update({name: vars(body)[name] for name in SHARED})
    model.__dict__["_checkpointing"] = Checkpointing.of(body)
    model._modules.update(body._modules, **base_of(body), deltas=deltas)
    body.requires_grad_(False)
    sets.train([name])
    _connect(model)
    return model


def bare_copy(model: CompiledModel, shares: bool = False) -> PreTrainedModel:
    """A copy of the model without its deltas, with the `requires_grad` flags that its backbone came with. One that
    `shares` has parameters of its own on the same memory, which nobody may write to."""
    weights = model.body.parameters() if shares else ()
    memo = {id(one): nn.Parameter(one.detach(), one.requires_grad) for one in weights}
    copied = copy.deepcopy(model.body, memo)
    model.__dict__["_origin"].restore(copied)
    take_back(copied)
    return copied


def _blank(cls: Any) -> CompiledModel:
    """A compiled model of a class, without a backbone yet."""
    compiled = _compiled_class(cls)
    model: CompiledModel = compiled.__new__(compiled)
    nn.Module.__init__(model)
    return model


def _connect(model: CompiledModel) -> None:
    model._use(model.in_use)
    for module in model._modules.values():
        if isinstance(module, Base):
            connect(module, model)
    if not is_attached(model.backbone):
        ATTACHED[model.backbone] = ref(model)


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
    """The backbone of `model` as it was: no deltas, the `requires_grad` flags that it came with.

    Parameters that the spec unfroze keep what they learned.
    """
    backbone = model.backbone
    with TRACING:
        model.__dict__["_origin"].restore(backbone)
        ATTACHED.pop(backbone, None)
    return backbone


def _listed(names: str | Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        return ()
    return (names,) if isinstance(names, str) else tuple(names)
