"""Sharing: what a compiled model and its backbone have in common, and what a backbone must be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn
from weakref import WeakKeyDictionary, ref

from torch import nn
from transformers import PreTrainedModel

from peftc.errors import CaptureError, PeftcError
from peftc.graph.layers import submodule
from peftc.graph.placement import is_added

# What a compiled model has for itself, whatever its body has.
_OWN = frozenset({*vars(nn.Module()), "forward", "plan", "deltas", "form"}) - {"training"}
# Of the body's own, and the backbone's, read and written through the compiled model.
SHARED = ("_parameters", "_buffers", "_non_persistent_buffers_set")


class AttachError(PeftcError):
    """A model that no deltas can be attached to."""


@dataclass(frozen=True)
class Origin:
    """How a backbone came: what required grad."""

    required_grad: Mapping[str, bool]

    @staticmethod
    def of(backbone: PreTrainedModel) -> Origin:
        return Origin({path: p.requires_grad for path, p in backbone.named_parameters()})

    def restore(self, backbone: PreTrainedModel) -> None:
        for path, weight in backbone.named_parameters():
            weight.requires_grad_(self.required_grad.get(path, weight.requires_grad))


# Which backbone runs under which compiled model: a second one would freeze what the first trains.
ATTACHED: WeakKeyDictionary[PreTrainedModel, ref[Sharing]] = WeakKeyDictionary()


class Sharing(PreTrainedModel):
    """A model that has parameters, buffers and configuration in common with its `backbone`: they are the same objects,
    seen and set from both sides.

    Modules, their modes, hooks and attributes, and the loss are its own: those of `body`, a double of the backbone, as
    which it began. Any other attribute that the body has is read and set there. Its hooks and a `forward` set on the
    instance are nobody else's.
    """

    @property
    def backbone(self) -> PreTrainedModel:
        """The model that was compiled. It computes without the deltas, in a mode of its own: a reference."""
        backbone: PreTrainedModel = self.__dict__["_backbone"]
        return backbone

    @property
    def body(self) -> PreTrainedModel:
        """The model whose forward is traced: the bare one in the mode of this."""
        body: PreTrainedModel = self.__dict__["_body"]
        return body

    @property
    def training(self) -> bool:
        """The mode."""
        return bool(self.body.training)

    @training.setter
    def training(self, mode: bool) -> None:
        if "_body" in self.__dict__:  # nn.Module sets it before there is one
            self.body.training = mode

    @property
    def loss_function(self) -> Any:
        """The body's, which its forward calls."""
        return self.body.loss_function

    @loss_function.setter
    def loss_function(self, loss: Any) -> None:
        self.body.loss_function = loss

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in _OWN or name.startswith("__") or "_body" not in self.__dict__:
                raise
            return getattr(self.body, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN and not isinstance(getattr(type(self), name, None), property):
            own = name in self.__dict__
            if isinstance(value, nn.Module) or name in self.body._modules:
                setattr(self.body, name, value)
            elif name in vars(self.body) and not own:
                setattr(self.body, name, value)
                return
        super().__setattr__(name, value)

    def get_submodule(self, target: str) -> nn.Module:
        """As torch's, for modules of any name."""
        try:
            return submodule(self, target)
        except KeyError:
            return super().get_submodule(target)

    def get_parameter(self, target: str) -> nn.Parameter:
        """As torch's, for parameters of any name."""
        owner, _, name = target.rpartition(".")
        found = self.get_submodule(owner)._parameters.get(name)
        return super().get_parameter(target) if found is None else found

    def _replicate_for_data_parallel(self) -> NoReturn:
        raise CaptureError(
            "torch.nn.DataParallel splits a model between threads, and a compiled model's graphs belong to one "
            "device; use DistributedDataParallel (torchrun, accelerate launch)"
        )


def require_bare(model: PreTrainedModel) -> None:
    """Raise AttachError unless `model` is a bare backbone: not compiled or attached already, and with nothing on
    the instance in the place of its class's code, which a compiled model would not run."""
    name = type(model).__name__
    if isinstance(model, Sharing):
        raise AttachError("the model is compiled already; combine specs in a list: [spec, spec]")
    if is_attached(model):
        raise AttachError(
            f"this {name} is the backbone of a compiled model; combine specs in a list, or peftc.detach the "
            "compiled model first, or compile a copy"
        )
    for path, module in model.named_modules():
        place = f"{name}.{path}" if path else name
        if module._compiled_call_impl is not None:
            raise AttachError(
                f"{place} was given `.compile()`, which hides its forward from tracing; compile the model that "
                "peftc.compile returns instead"
            )
    own = [
        k
        for k, v in vars(model).items()
        if callable(v) and callable(getattr(type(model), k, None)) and not is_added(model, k)
    ]
    if own:
        raise AttachError(
            f"'{own[0]}' of this {name} was replaced on the instance, and a compiled model runs the class's; "
            f"restore it (`del model.{own[0]}`; after accelerate, `unwrap_model(model, keep_fp32_wrapper=False)` "
            "and a fresh model), or subclass the model"
        )


def is_attached(backbone: PreTrainedModel) -> bool:
    holder = ATTACHED.get(backbone)
    return holder is not None and holder() is not None
