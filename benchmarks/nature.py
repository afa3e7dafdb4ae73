"""What a model's eager code computes, seen from the ops that it dispatches: an oracle that shares nothing with peftc."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from peftc.graph.arguments import forward_flags

_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear", "_grouped_mm", "mv", "addmv")
_FUSED = "scaled_dot_product"
_SOFTMAX = ("_softmax", "softmax", "_safe_softmax")
_NORMS = (
    "native_layer_norm",
    "_fused_rms_norm",
    "rms_norm",
    "native_group_norm",
    "native_batch_norm",
)
_NONLINEAR = (
    "relu", "gelu", "silu", "tanh", "sigmoid", "elu", "leaky_relu", "hardtanh", "mish", "erf", "pow", "exp",
    "softplus", "hardswish", "hardsigmoid", "celu", "threshold", "clamp", "clamp_min", "glu", "log_sigmoid_forward",
)  # fmt: skip
_REDUCE = ("mean", "var_mean", "var", "amax", "argmax", "topk", "sort", "convolution")
# What a value is, followed through views, sums and pointwise ops.
PARAMETER, LINEAR, ACTIVATED, MIXED, PROBABLE = (
    "parameter",
    "linear",
    "activated",
    "mixed",
    "probable",
)


@dataclass(frozen=True)
class Nature:
    """The module where each thing was met first, "" where it was not.

    `attention`: a softmax whose result is multiplied with values. `feed_forward`: two products with parameters around
    a nonlinearity, whose result is added to what went past them. `table`: rows looked up by the ids that were given.
    """

    attention: str = ""
    feed_forward: str = ""
    table: str = ""

    @staticmethod
    def of(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Nature:
        """What one forward in evaluation mode dispatches."""
        with torch.no_grad(), _Watch(model, inputs) as watch:
            model(**inputs, **forward_flags(model))
        return Nature(**watch.found)


class _Watch(TorchDispatchMode):
    def __init__(self, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self.found: dict[str, str] = {}
        self._alive: list[torch.Tensor] = []  # so that no id is another's
        self._tags: dict[int, frozenset[str]] = {}
        for weight in model.parameters():
            self._tag(weight, {PARAMETER})
        self._ids = {one.data_ptr() for one in inputs.values() if not one.is_floating_point()}
        self._names = {id(module): name or "the model" for name, module in model.named_modules()}
        self._running: list[str] = ["the model"]
        self._hooks: list[Any] = []

    def __enter__(self) -> _Watch:
        into, out_of = (
            nn.modules.module.register_module_forward_pre_hook,
            nn.modules.module.register_module_forward_hook,
        )
        self._hooks = [
            into(lambda m, _: self._running.append(self._names.get(id(m), self._running[-1]))),
            out_of(lambda *_: self._running.pop() and None, always_call=True),
        ]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0].rstrip("_") or func.__name__
        given = [one for one in tree_leaves((args, kwargs)) if isinstance(one, torch.Tensor)]
        tags = frozenset(self._after(name, given))
        for one in tree_leaves(result):
            if isinstance(one, torch.Tensor):
                self._tag(one, tags)
        return result

    def _tag(self, value: torch.Tensor, tags: Any) -> None:
        self._alive.append(value)
        self._tags[id(value)] = frozenset(tags)

    def _of(self, value: torch.Tensor) -> frozenset[str]:
        return self._tags.get(id(value), frozenset())

    def _meet(self, what: str) -> None:
        self.found.setdefault(what, self._running[-1])

    def _after(self, name: str, given: list[torch.Tensor]) -> Iterator[str]:
        """The tags of what an op gives."""
        each = [self._of(one) for one in given]
        values = [tags for tags in each if PARAMETER not in tags]
        joined = frozenset().union(*values)
        if name == "embedding" and len(given) > 1 and given[1].data_ptr() in self._ids:
            self._meet("table")
        elif _FUSED in name:
            self._meet("attention")
        elif name in _SOFTMAX:
            yield PROBABLE
        elif name in _PRODUCTS:
            if len(values) == len(each):
                if sum(PROBABLE in tags for tags in values) == 1:
                    self._meet("attention")
                return
            yield LINEAR
            if ACTIVATED in joined:
                yield MIXED
        elif name in _NORMS or name == "sum":  # over experts
            yield from joined & {MIXED}
        elif name in _REDUCE:
            return
        elif values or not each:
            yield from self._pointwise(name, given, joined)
        else:
            yield PARAMETER  # moved, cast or computed of parameters alone

    def _pointwise(
        self, name: str, given: list[torch.Tensor], joined: frozenset[str]
    ) -> Iterator[str]:
        flowing = joined & {LINEAR, ACTIVATED, MIXED}
        if name in ("add", "mul") and flowing and self._meets_another(given):
            if name == "add" and MIXED in flowing:
                self._meet("feed_forward")
            return  # a residual, or a gate of something else
        yield from joined
        if name in _NONLINEAR and LINEAR in joined:
            yield ACTIVATED

    def _meets_another(self, given: list[torch.Tensor]) -> bool:
        """Whether a value that is not of the same linears comes in, as large as the result."""
        largest = max(one.numel() for one in given)
        flowing = (LINEAR, ACTIVATED, MIXED, PARAMETER)
        return any(
            one.numel() == largest and one.ndim > 1 and not self._of(one) & set(flowing)
            for one in given
        )
