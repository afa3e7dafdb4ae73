"""Inner models: the encoder and the base of a compiled model, which compute with the deltas when called by
themselves too."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any
from weakref import ref

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from peftc.errors import CaptureError
from peftc.graph.cache import CACHES
from peftc.graph.facts import ModelFacts
from peftc.model.sharing import SHARED, Sharing

# Arguments that ask for a cache or name the output type; the entries decide both themselves.
_CONTROL = ("use_cache", "return_dict", "encoder_outputs", *CACHES)
# What may hold nothing; torch.compile knows no unions of types.
_HOLDS = (dict, list, tuple)
# Of a module's own, those that are one with the module that it stands for.
_ONE = frozenset(vars(nn.Module())) - {"training"}


def split(wanted: Mapping[str, Any]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors become inputs of the graph; switches and numbers are fixed in it. What holds nothing says nothing."""
    wanted = {k: v for k, v in wanted.items() if not (isinstance(v, _HOLDS) and not v)}
    tensors = {k: v for k, v in wanted.items() if isinstance(v, torch.Tensor)}
    flags = {k: v for k, v in wanted.items() if k not in tensors and k not in _CONTROL}
    odd = [k for k, v in flags.items() if not isinstance(v, bool | int | float | str)]
    if odd:
        raise CaptureError(
            f"argument '{odd[0]}' is a {type(flags[odd[0]]).__name__}; a compiled model takes tensors, "
            "numbers and switches"
        )
    return tensors, flags


class Encoder(nn.Module):
    """The encoder of a compiled model, as `generate` wants it."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.__dict__["model"] = model  # not a submodule: its parameters are the model's
        self.main_input_name = model.main_input_name

    def forward(self, *args: Any, **kwargs: Any) -> BaseModelOutput:
        given = dict(zip((self.main_input_name, "attention_mask"), args, strict=False)) | kwargs
        tensors, flags = split({k: v for k, v in given.items() if v is not None})
        output_type, fields = self.__dict__["model"].run("encode", tensors, flags)
        output: BaseModelOutput = output_type(**fields)
        return output


class Base(Sharing):
    """Mixed in front of the class of a compiled model's base, the model below its head: `model.model`, `model.bert`.

    It is the base of the body in all but its forward.
    """

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the base's own forward, without a cache. Raises CaptureError where one is asked for."""
        model: Any = self.__dict__["_model"]()
        if not model.in_use:
            return self.body(*args, **kwargs)
        names = inspect.signature(type(self.body).forward).parameters
        given = dict(zip([*names][1:], args, strict=False)) | kwargs
        wanted = {k: v for k, v in given.items() if v is not None}
        if wanted.get("use_cache") or not wanted.keys().isdisjoint(CACHES):
            raise CaptureError(
                f"the base of a compiled {type(model).__name__} keeps no cache when it is called by itself; call the "
                f"whole model, or leave use_cache and {ModelFacts.read(self.body).cache} out"
            )
        output_type, fields = model.uncached("base", wanted)
        output = output_type(**fields)
        return output if wanted.get("return_dict", True) else output.to_tuple()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "_model"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _blank, (type(self.body),), self.__getstate__()


def base_of(body: PreTrainedModel) -> dict[str, Base]:
    """What stands for the base of a body in the compiled model's modules, by its name there; nothing where the body has
    no head."""
    name = body.base_model_prefix
    inner = body._modules.get(name) if name else None
    if not isinstance(inner, PreTrainedModel):
        return {}
    base = _blank(type(inner))
    own = {k: v for k, v in vars(inner).items() if k in _ONE or k in SHARED}
    base.__dict__.update({**own, "_body": inner})
    return {name: base}


def connect(base: Base, model: PreTrainedModel) -> None:
    """Let a base run the graphs of this model, which holds it."""
    base.__dict__["_model"] = ref(model)


def _blank(cls: Any) -> Base:
    made = _class(cls)
    base: Base = made.__new__(made)
    return base


@functools.cache
def _class(cls: Any) -> Any:
    def forward(self: Base, *args: Any, **kwargs: Any) -> Any:
        return Base.forward(self, *args, **kwargs)

    forward.__signature__ = inspect.signature(cls.forward)  # type: ignore[attr-defined]
    return type(cls.__name__, (Base, cls), {"__module__": cls.__module__, "forward": forward})
