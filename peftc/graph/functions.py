"""Functions: what has a backward of its own (`torch.autograd.Function`) stays one call of the graph, with that backward.

A trace would put the ops of its forward in its place, and autograd would differentiate these: a gradient that is clipped, or
estimated (a rounding's, a router's), would silently be another. Those that have a softmax or a product inside are written
out all the same, because sites are made of these. So are those that are given modules, to run them and to differentiate
them in a way that saves memory (Reformer's layers): their gradient is that of their forward.
"""

from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import fx
from torch._export.wrappers import allow_in_pre_dispatch_graph
from torch._higher_order_ops.flat_apply import flat_apply, is_graphable
from torch.autograd import Function
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from peftc.graph.program import Program, aten

# What sites are made of.
_UNDERSTOOD = (
    *(aten._softmax.default, aten.mm.default, aten.addmm.default, aten.bmm.default),
    *(aten.baddbmm.default, aten.convolution.default, aten.embedding.default),
)


class _Ops(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The ops that are dispatched."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.seen.append(func)
        return func(*args, **(kwargs or {}))


class _Differentiated(TorchFunctionMode):
    """Gradients are not switched off in what is differentiated by a backward of its own."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return None if func is torch._C._set_grad_enabled else func(*args, **(kwargs or {}))


@contextlib.contextmanager
def kept() -> Iterator[dict[str, Callable[..., Any]]]:
    """While a model is traced by this thread: the calls that stay, by the names that torch's export gives them."""
    own, found = vars(Function)["apply"], dict[str, Callable[..., Any]]()
    thread = threading.get_ident()

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        return own.__func__(cls, *args, **kwargs)

    whole = allow_in_pre_dispatch_graph(apply)  # type: ignore[no-untyped-call]

    def chosen(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if threading.get_ident() != thread or cls.__module__.startswith("torch."):
            return apply(cls, *args, **kwargs)
        if not all(map(is_graphable, tree_leaves((args, kwargs)))):
            with _Differentiated():
                return apply(cls, *args, **kwargs)
        with torch._C._ForceDispatchKeyGuard(*_below()), _Ops() as ops:
            apply(cls, *args, **kwargs)
        if any(op in _UNDERSTOOD for op in ops.seen):
            return apply(cls, *args, **kwargs)
        pointwise = bool(ops.seen) and all(torch.Tag.pointwise in op.tags for op in ops.seen)
        found[f"{cls.__module__}.{cls.__qualname__}"] = call_of(cls, pointwise)
        return whole(cls, *args, **kwargs)

    Function.apply = classmethod(chosen)  # type: ignore[assignment,method-assign]
    try:
        yield found
    finally:
        Function.apply = own  # type: ignore[method-assign]


def _below() -> tuple[Any, Any]:
    """The dispatcher's keys without that by which export records."""
    key = torch._C.DispatchKey.PreDispatch
    include = torch._C._dispatch_tls_local_include_set().remove(key)
    return include, torch._C._dispatch_tls_local_exclude_set() | torch._C.DispatchKeySet(key)


@functools.cache
def call_of(cls: type[Function], pointwise: bool) -> Callable[..., Any]:
    """The function with its backward, as what a graph calls; whether each element is of those at its place alone."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    call.__name__ = call.__qualname__ = cls.__name__
    call.pointwise = pointwise  # type: ignore[attr-defined]
    return call


def write_calls(
    program: Program, traced: fx.GraphModule, calls: dict[str, Callable[..., Any]]
) -> None:
    """Put the functions in place of what torch's export has for them."""
    for node in program.graph.find_nodes(op="call_function", target=flat_apply):
        # flat_apply(what calls it, how its arguments were nested, name, *arguments)
        spec = getattr(traced, node.args[1].target)
        args, kwargs = spec.unflatten(list(node.args[2:]))
        node.target, node.args, node.kwargs = calls[args[0]], tuple(args[1:]), kwargs
    program.graph.eliminate_dead_code()
