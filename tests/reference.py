"""A plan in plain torch: the backbone's own modules, run eagerly, with the formulas of each edit applied in the
order of the spec. It shares nothing with the compiler but the parsed spec and the names of sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.func import functional_call
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import eager_mask
from transformers.pytorch_utils import Conv1D

from peftc.language.expr import Call, Expr, Name, Number
from peftc.plan.edit import Edit

Tensor = torch.Tensor
# Where a family keeps the linears of a sub-layer, from the module that a site is named after. The residual is
# what the last module reads.
_BERT = dict(
    q="query",
    k="key",
    v="value",
    o="../output.dense",
    up="intermediate.dense",
    down="output.dense",
    residual="intermediate.dense",
)
_BART = dict(q="q_proj", k="k_proj", v="v_proj", o="out_proj", up="fc1", down="fc2", residual="fc1")
_T5 = dict(q="q", k="k", v="v", o="o", up="wi", down="wo", residual="../layer_norm")
WIRING: Mapping[str, Mapping[str, str]] = {
    "bert": _BERT,
    "roberta": _BERT,
    "distilbert": dict(
        q="q_lin",
        k="k_lin",
        v="v_lin",
        o="out_lin",
        up="lin1",
        down="lin2",
        residual="lin1",
    ),
    "bart": _BART,
    "mbart": {**_BART, "residual": "final_layer_norm"},
    "t5": _T5,
    "t5_gated": {**_T5, "up": "wi_1", "gate": "wi_0"},
    "gpt2": dict(
        q="c_attn 0/3",
        k="c_attn 1/3",
        v="c_attn 2/3",
        o="c_proj",
        up="c_fc",
        down="c_proj",
        residual="../ln_2",
    ),
    "llama": dict(
        q="q_proj",
        k="k_proj",
        v="v_proj",
        o="o_proj",
        up="up_proj",
        gate="gate_proj",
        down="down_proj",
        residual="../post_attention_layernorm",
    ),
}


def _cayley(x: Tensor) -> Tensor:
    skew, eye = (x - x.mT) / 2, torch.eye(x.shape[-1], dtype=x.dtype)
    return torch.linalg.inv(eye + skew) @ (eye - skew)


def _kron(a: Tensor, b: Tensor) -> Tensor:
    return torch.einsum("...mn,...pq->...mpnq", a, b).flatten(-2).flatten(-3, -2)


def _prepend(rows: Tensor, rest: Tensor) -> Tensor:
    return torch.cat([rows.expand(rest.shape[0], *rows.shape), rest], -2)


TORCH: Mapping[str, Callable[..., Any]] = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "neg": lambda a: -a,
    "mul": lambda a, b: a * b,
    "div": lambda a, b: a / b,
    "floordiv": lambda a, b: a // b,
    "matmul": lambda a, b: a @ b,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "exp": torch.exp,
    "log": torch.log,
    "sqrt": lambda x: x**0.5,
    "softmax": lambda x: torch.softmax(x, -1),
    "sum": lambda x: x.sum(-1),
    "transpose": lambda x: x.mT,
    "clamp": torch.clamp,
    "dropout": lambda x, p: x,  # in evaluation
    "norm": lambda x: torch.linalg.vector_norm(x, dim=-1, keepdim=True),
    "sum_first": lambda x: x.sum(0),
    "detach": lambda x: x.detach(),
    "kron": _kron,
    "block_diag": lambda x: torch.block_diag(*x),
    "cayley": _cayley,
    "lookup": lambda table, ids: table[ids],
    "logistic_noise": torch.zeros_like,  # in evaluation
    "split_heads": lambda rows, n: rows.unflatten(-1, (n, -1)).transpose(0, 1),
    "prepend": _prepend,
}


def evaluate(expr: Expr, read: Callable[[str], Any]) -> Any:
    match expr:
        case Number():
            return expr.value
        case Name():
            return read(expr.id)
        case Call():
            return TORCH[expr.op](*(evaluate(one, read) for one in expr.args))


@dataclass(frozen=True)
class Slot:
    """A value of the model: `port` of the module at `path`; of a fused projection, part `part` of `of`."""

    path: str
    port: str
    part: int = 0
    of: int = 1

    @property
    def axis(self) -> int:
        return 0 if self.port in ("W", "b") else -1

    def meets(self, other: Slot) -> bool:
        """Whether they have features in common: a part is in its whole."""
        ends = [(one.part / one.of, (one.part + 1) / one.of) for one in (self, other)]
        (first, last), (start, stop) = ends
        same = (self.path, self.port) == (other.path, other.port)
        return same and first < stop and start < last


@dataclass
class Reference:
    """`backbone` with `edits` in place, their tensors from `deltas` by path. Evaluation mode alone."""

    backbone: PreTrainedModel
    family: str
    edits: tuple[Edit, ...]
    deltas: Mapping[str, Tensor]
    first: dict[tuple[str, str], Tensor] = field(default_factory=dict)
    known: dict[tuple[str, str, int], Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.backbone.config._attn_implementation = "reference"
        for part in self.backbone.modules():
            if hasattr(part, "config"):
                part.config._attn_implementation = "reference"
        self.slots = [slots(edit, self.family) for edit in self.edits]
        for path, module in self.backbone.named_modules():
            module.__dict__["reference"] = (self, path)
            named = any(slot.path == path for ports in self.slots for slot in ports.values())
            if named and not any(module.children()):  # an attention is done by `attend`
                module.forward = self.leaf(path, module)

    def __call__(self, inputs: Mapping[str, Tensor]) -> Tensor:
        self.known.clear()
        logits: Tensor = self.backbone(**inputs).logits
        return logits

    def leaf(self, path: str, module: nn.Module) -> Callable[[Tensor], Tensor]:
        def run(x: Tensor) -> Tensor:
            self.start(path, {"x": x, "came": x, **stored(module)})
            weights = {"weight": turned(module, self.last(path, "W"))}
            if "b" in stored(module):
                weights["bias"] = self.last(path, "b")
            module.__dict__.pop("forward")
            self.first[path, "h"] = functional_call(module, weights, (self.last(path, "x"),))
            module.__dict__["forward"] = run
            return self.last(path, "h")

        return run

    def start(self, path: str, values: Mapping[str, Tensor]) -> None:
        """A module runs: its first values, nothing known of what follows from them."""
        self.known = {key: value for key, value in self.known.items() if key[0] != path}
        self.first |= {(path, port): value for port, value in values.items()}

    def last(self, path: str, port: str) -> Tensor:
        return self.value(path, port, len(self.edits))

    def value(self, path: str, port: str, turn: int) -> Tensor:
        """A value before the edit of this turn: as the model has it, then as each edit before left it."""
        if turn == 0:
            return self.first[path, port]
        key = (path, port, turn)
        if key not in self.known:
            self.known[key] = self.edited(path, port, turn - 1)
        return self.known[key]

    def edited(self, path: str, port: str, turn: int) -> Tensor:
        before, edit = self.value(path, port, turn), self.edits[turn]
        for name, expression in edit.entry.assign:
            slot = self.slots[turn][name]
            if (slot.path, slot.port) == (path, port):
                new = evaluate(expression, self.reader(turn))
                parts = list(before.chunk(slot.of, slot.axis))
                parts[slot.part] = new
                return torch.cat(parts, slot.axis) if slot.of > 1 else new
        return before

    def reader(self, turn: int) -> Callable[[str], Any]:
        edit, lets = self.edits[turn], dict(self.edits[turn].entry.let)
        paths = {one.name: one.path for one in edit.parameters}
        numbers = {**edit.entry.arguments, **edit.site.dims}

        def read(name: str) -> Any:
            if name in lets:
                return evaluate(lets[name], read)
            if name in paths:
                return self.deltas[paths[name]]
            if name in numbers:
                return numbers[name]
            slot = self.slots[turn][name]
            return self.value(slot.path, slot.port, turn).chunk(slot.of, slot.axis)[slot.part]

        return read


def stored(module: nn.Module) -> dict[str, Tensor]:
    """What a module keeps, as specs see it: a weight [out, in] or [out], and a bias."""
    weight, bias = module.weight, getattr(module, "bias", None)
    kept = {"W": turned(module, weight)}
    return kept if bias is None else {**kept, "b": bias}


def turned(module: nn.Module, weight: Any) -> Tensor:
    found: Tensor = weight.T if isinstance(module, Conv1D) else weight
    return found


def slots(edit: Edit, family: str) -> dict[str, Slot]:
    """The ports of a site as values of modules. What is one value has one slot, whatever its names."""
    at, scope = edit.site.at, edit.site.scope
    wiring = WIRING[family]

    def slot(role: str, port: str) -> Slot:
        name, _, part = wiring[role].partition(" ")
        path = scope
        while name.startswith("../"):
            path, name = path.rpartition(".")[0], name.removeprefix("../")
        place, _, count = (part or "0/1").partition("/")
        fused = port in ("h", "W", "b")  # all parts read one input
        return Slot(f"{path}.{name}", port, *((int(place), int(count)) if fused else (0, 1)))

    def linear(role: str) -> dict[str, Slot]:
        return {port: slot(role, port) for port in ("x", "h", "W", "b")}

    whole, _, part = at.partition(".")
    if at == "attention":
        return {"x": slot("q", "x"), "h": slot("o", "h")}
    if at == "attention.heads":
        return {port: Slot(scope, port) for port in ("q", "k", "v", "h")}
    if whole == "attention":
        return {**linear(part), "input": slot("q", "x")}
    if at == "ffn":
        ports = {"x": slot("up", "x"), "h": slot("down", "h"), "residual": slot("residual", "came")}
        return ports
    if at == "ffn.hidden":
        return {"h": slot("down", "x")}
    if whole == "ffn" and part != "linear":
        return linear(part)
    ids = {"ids": Slot(scope, "x")} if at == "embedding" else {}
    return {**{port: Slot(scope, port) for port in ("x", "h", "W", "b")}, **ids}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Softmax attention with the edits of `attention.heads`; keys in front are seen by every query."""
    self, path = module.__dict__["reference"]
    tokens = key.shape[-2]
    self.start(path, {"q": query, "k": key, "v": value})
    q, k, v = (self.last(path, port) for port in ("q", "k", "v"))
    repeats = q.shape[1] // k.shape[1]
    scores = q @ k.repeat_interleave(repeats, 1).mT
    scores = scores * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    for one in (position_bias, mask):
        if one is not None:
            scores = scores + functional.pad(one[..., -tokens:], (k.shape[-2] - tokens, 0))
    self.first[path, "h"] = torch.softmax(scores, -1) @ v.repeat_interleave(repeats, 1)
    return self.last(path, "h").transpose(1, 2), None


AttentionInterface.register("reference", attend)
AttentionMaskInterface.register("reference", eager_mask)
