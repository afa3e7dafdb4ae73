"""Forms: how each kind of PEFT tensors reads in the spec language."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from peftc.interchange import kernels
from peftc.interchange.settings import InterchangeError
from peftc.language.expr import Call, Expr, Name, Number, parse, substitute

_LAYOUTS = {
    "T": lambda value: value.flatten(1).T,  # kernels as one matrix
    "column": lambda value: value.reshape(-1, 1),
    "flat": lambda value: value.reshape(-1),
    "": lambda value: value,
}


@dataclass(frozen=True)
class Form:
    """One kind of adapter of a linear.

    `tensors` maps PEFT's name to (ours, how it is laid out there: `T` transposed, `column`, `flat` or as it
    is). The delta is `x @ matrix`, with a matrix [in, out] as a formula, or another formula `delta` of x; or
    `rewrite` replaces ports. `scaled` says that the configuration's scale multiplies it: the name s.
    """

    tensors: Mapping[str, tuple[str, str]]
    matrix: str = ""
    delta: str = ""
    rewrite: Mapping[str, str] = field(default_factory=dict)
    scaled: bool = True

    def laid_out(self, found: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The tensors by our names, in our layout."""
        laid = {ours: _LAYOUTS[how](found[name]) for name, (ours, how) in self.tensors.items()}
        return {name: value.contiguous() for name, value in laid.items()}


@dataclass(frozen=True)
class Formula:
    """What an entry of the language says: the ports that it assigns, and its delta and composition."""

    assign: tuple[tuple[str, Expr], ...]
    delta: Expr | None = None
    compose: Expr | None = None


_LORA = {"lora_A.weight": ("down", "T"), "lora_B.weight": ("up", "T")}
_BIAS = {"lora_B.bias": ("up_bias", "")}
_MAGNITUDE = {"lora_magnitude_vector": ("magnitude", "column")}
_KRON_1 = {"lokr_w1": ("small", "T")}
_KRON_2 = {"lokr_w1_a": ("small_up", "T"), "lokr_w1_b": ("small_down", "T")}
_FULL, _PAIR = {"lokr_w2": ("w", "T")}, {"lokr_w2_a": ("up", "T"), "lokr_w2_b": ("down", "T")}
_HADAMARD = {
    "hada_w1_a": ("up_1", "T"),
    "hada_w1_b": ("down_1", "T"),
    "hada_w2_a": ("up_2", "T"),
    "hada_w2_b": ("down_2", "T"),
}
_DORA = "magnitude * (W + s * transpose(down @ up)) / detach(norm(W + s * transpose(down @ up)))"
_VERA = {"vera_lambda_d": ("scale_r", ""), "vera_lambda_b": ("scale_out", "")}
FORMS = (
    Form(_LORA, matrix="down @ up"),
    Form({**_LORA, **_BIAS}, delta="x @ down @ up + up_bias"),
    Form({**_LORA, **_MAGNITUDE}, rewrite={"W": _DORA}),
    Form({"ia3_l": ("scale", "flat")}, rewrite={"h": "h * scale"}, scaled=False),
    Form(_VERA, delta="((x @ down) * scale_r) @ up * scale_out", scaled=False),
    Form(_HADAMARD, matrix="(down_1 @ up_1) * (down_2 @ up_2)"),
    Form({**_KRON_1, **_FULL}, matrix="kron(small, w)"),
    Form({**_KRON_1, **_PAIR}, matrix="kron(small, down @ up)"),
    Form({**_KRON_2, **_FULL}, matrix="kron(small_down @ small_up, w)"),
    Form({**_KRON_2, **_PAIR}, matrix="kron(small_down @ small_up, down @ up)"),
)
# IA3 of a feed-forward is at the input; PEFT says so by the shape alone, [1, in].
IA3_INPUT = Form({"ia3_l": ("scale", "flat")}, rewrite={"x": "x * scale"}, scaled=False)
TENSORS = frozenset(name for form in FORMS for name in form.tensors)


def of(path: str, found: Mapping[str, torch.Tensor]) -> Form:
    """The form of a module's tensors, by PEFT's names. Raises InterchangeError."""
    form = next((one for one in FORMS if one.tensors.keys() == found.keys()), None)
    if form is None:
        raise InterchangeError(f"'{path}' has the tensors {_listed(found)}: no known form")
    return IA3_INPUT if "ia3_l" in found and found["ia3_l"].shape[0] == 1 else form


def of_linear(path: str, form: Form, scale: float, rate: float) -> Formula:
    """What `form` says at a linear whose input it drops at this rate in training. Raises InterchangeError."""
    names = {"s": _number(scale)}
    if form.rewrite:
        if rate and form.scaled:
            raise _undroppable(path, "its weight as a whole")
        return Formula(tuple((p, substitute(parse(t), names)) for p, t in form.rewrite.items()))
    x: Expr = Call("dropout", (Name("x"), Number(rate))) if rate else Name("x")
    delta = (
        _applied(x, parse(form.matrix)) if form.matrix else substitute(parse(form.delta), {"x": x})
    )
    compose = substitute(parse("h + s * delta"), names) if form.scaled else parse("h + delta")
    whole = substitute(compose, {"delta": delta})
    return Formula((("h", whole),), delta, compose if form.scaled else None)


def of_kernels(
    path: str, form: Form, scale: float, rate: float, conv: nn.Module, found: Iterable[str]
) -> Formula:
    """What `form` says at a convolution: as a change of the matrix of its kernels. Raises PeftcError."""
    kernels.require(path, conv)
    if rate:
        raise _undroppable(path, "its kernels")
    names = {"s": _number(scale)}
    if form.matrix:
        change = substitute(parse("W + s * transpose(M)"), {"M": parse(form.matrix), **names})
        return Formula((("W", change),))
    if form.rewrite.keys() == {"W"}:
        return of_linear(path, form, scale, rate)
    raise kernels.KernelError(
        f"'{path}' is a convolution, and its adapter has a form for linears alone ({_listed(found)})"
    )


def _applied(x: Expr, matrix: Expr) -> Expr:
    """`x @ a @ b` for the matrix a @ b: two narrow products, not one wide."""
    match matrix:
        case Call("matmul", (first, second)):
            return Call("matmul", (_applied(x, first), second))
    return Call("matmul", (x, matrix))


def _number(value: float) -> Expr:
    return Number(value) if value >= 0 else Call("neg", (Number(-value),))


def _undroppable(path: str, what: str) -> InterchangeError:
    return InterchangeError(
        f"'{path}': 'lora_dropout' drops an input, and this adapter changes {what}; set it to 0 in the file: "
        "what the adapter computes is the same"
    )


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))
