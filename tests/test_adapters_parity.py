"""AdapterHub's `adapters` 1.3.0 as a second oracle: its weights copied in give its logits.

It needs an older transformers, so it runs in an environment of its own (adapters_oracle.py) and the two sides
exchange files. The environment is made anew unless PEFTC_ADAPTERS_PYTHON names a Python that has it.

Where `adapters` and a shipped spec mean different functions under one name, the test says which, and compares
with a spec that means theirs.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from conftest import FAMILIES, batch, logits, tiny
from filelock import FileLock
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import peftc
from peftc.driver import SpecLike
from peftc.language.reader import parse_spec
from peftc.plan.edit import Edit

pytestmark = pytest.mark.slow

Tensors = Mapping[str, torch.Tensor]

HERE = Path(__file__).parent
PADDINGS = ("none", "left", "right")
R, L, M = 8, 5, 6  # bottleneck and prefix sizes
PREFIX = {"class": "PrefixTuningConfig", "prefix_length": L}
MLP_PREFIX = {**PREFIX, "bottleneck_size": M}
PARALLEL = {"class": "ParBnConfig", "scaling": 4.0, "reduction_factor": 32 / R}
SEQUENTIAL = {"class": "SeqBnConfig", "reduction_factor": 32 / R}
DOUBLE = {"class": "DoubleSeqBnConfig", "reduction_factor": 32 / R}
# Our name of a case -> the configuration of `adapters`; `spec` has the other side.
METHODS: dict[str, dict[str, object]] = {
    "lora": {"class": "LoRAConfig", "r": 4, "alpha": 8},
    "parallel": PARALLEL,
    "learned_scale": {**PARALLEL, "scaling": "learned"},
    "pfeiffer": {**SEQUENTIAL, "original_ln_before": False},
    "pfeiffer_as_theirs": SEQUENTIAL,
    "houlsby": {**DOUBLE, "non_linearity": "relu", "cross_adapter": True},
    "houlsby_as_theirs": DOUBLE,
    "prefix_direct": {**PREFIX, "flat": True},
    "prefix_tuning": MLP_PREFIX,
    "mam": {"class": "MAMConfig", "prefix_tuning": MLP_PREFIX, "adapter": PARALLEL},
    "ia3": {"class": "IA3Config"},
    "ia3_as_theirs": {"class": "IA3Config"},
}


@dataclass(frozen=True)
class Layout:
    """Where `adapters` keeps a family's weights.

    Within a layer: `bottlenecks` by the kind of attention they follow ("" is the feed-forward), `up` the
    feed-forward's first linear, `norm` the one that a bottleneck after it takes over. In the whole model:
    `prefixes` by the group of attention. `activation` is what the config calls the feed-forward's.
    """

    bottlenecks: Mapping[str, str]
    up: str
    norm: str | None
    prefixes: Mapping[str, str]
    activation: str


BART = Layout(
    {"self": "attention_adapters", "cross": "cross_attention_adapters", "": "output_adapters"},
    up="fc1",
    norm="final_layer_norm",
    prefixes={
        "encoder_self": "encoder_prefix",
        "decoder_self": "self_prefix",
        "decoder_cross": "cross_prefix",
    },
    activation="activation_function",
)
DECODER = Layout(
    {"self": "attention_adapters", "": "output_adapters"},
    up="mlp.c_fc",
    norm=None,
    prefixes={"decoder_self": "self_prefix"},
    activation="activation_function",
)
LAYOUTS = {
    "bart": BART,
    "mbart": replace(BART, norm=None),
    "roberta": Layout(
        {"self": "attention.output", "": "output"},
        up="intermediate.dense",
        norm="output.LayerNorm",
        prefixes={"encoder_self": "self_prefix"},
        activation="hidden_act",
    ),
    "gpt2": DECODER,
    "llama": replace(DECODER, up=""),  # only IA3 asks for it
}
PRE_NORM = ("mbart", "gpt2", "llama")
# In Llama IA3Config scales what the *down* projection gives: there it is no IA3. T5 is left out: its prefixes
# push the real keys away in the relative positions, and the paper's do not.
CASES = [
    (method, family)
    for method in METHODS
    for family in LAYOUTS
    if not (family == "llama" and "ia3" in method)
]
NORM_EPS = {"bart": 1e-5, "roberta": 1e-12}

# SeqBnConfig reads the sum that the layer's last norm will take, normalised by that norm, and adds to h.
# The paper and the shipped spec read h; the norm's own weights are copied in.
PFEIFFER_AS_THEIRS = """
with: {r: 8, eps: 0.00001}
deltas:
  - at: ffn
    params:
      ones:      {shape: [out, out], init: ones, trainable: false}
      scale:     {shape: [out],      init: ones, trainable: false}
      shift:     {shape: [out],      init: zeros, trainable: false}
      down:      {shape: [out, r],   init: zeros}
      down_bias: {shape: [r],        init: zeros}
      up:        {shape: [r, out],   init: zeros}
      up_bias:   {shape: [out],      init: zeros}
    let:
      both: h + residual
      centred: both - both @ ones / out
      normal: centred / sqrt(norm(centred) * norm(centred) / out + eps) * scale + shift
    delta: relu(normal @ down + down_bias) @ up + up_bias
"""
# IA3Config scales the first linear's result, the paper what the activation makes of it.
IA3_AS_THEIRS = """
deltas:
  - at: [attention.k, attention.v, ffn.up]
    params: {scale: {shape: [out], init: ones}}
    rewrite: {h: h * scale}
"""


def shipped(name: str, *changes: tuple[str, str], **arguments: float | int) -> peftc.Spec:
    """A shipped spec with words of it replaced."""
    text = peftc.load_spec(name).text
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    return parse_spec(text, name, **arguments)


def parallel(name: str, family: str) -> peftc.Spec:
    """In pre-norm models `adapters`, as the paper's code, feeds the residual stream to a parallel adapter;
    the shipped spec, as the paper's words, feeds it what the feed-forward reads. In post-norm ones they agree.
    """
    changes = (("x @ down", "residual @ down"),) if family in PRE_NORM else ()
    return shipped(name, *changes, r=R)


def pfeiffer_as_theirs(family: str) -> peftc.Spec:
    """A pre-norm layer has no norm after the sum: the adapter reads the sum."""
    if family in PRE_NORM:
        return shipped("pfeiffer_adapter", ("h @ down", "(h + residual) @ down"), r=R)
    return parse_spec(PFEIFFER_AS_THEIRS, "pfeiffer_as_theirs", r=R, eps=NORM_EPS[family])


def spec(method: str, family: str) -> SpecLike:
    """What METHODS[method] means, in our language."""
    match method:
        case "lora":
            return peftc.load_spec("lora", r=4, alpha=8)
        case "parallel":
            return parallel("scaled_parallel_adapter", family)
        case "learned_scale":
            return parallel("learned_scale_adapter", family)
        case "pfeiffer":
            return peftc.load_spec("pfeiffer_adapter", r=R)
        case "pfeiffer_as_theirs":
            return pfeiffer_as_theirs(family)
        case "houlsby":
            return peftc.load_spec("houlsby_adapter", r=R)
        case "houlsby_as_theirs":  # another activation, and nothing after cross-attention
            only_self = ("at: attention\n", "at: attention\n    where: {kind: self}\n")
            return shipped("houlsby_adapter", ("relu(", "silu("), only_self, r=R)
        case "prefix_direct":
            return peftc.load_spec("prefix_direct", l=L)
        case "prefix_tuning":
            return peftc.load_spec("prefix_tuning", l=L, m=M)
        case "mam" if family in PRE_NORM:
            return [spec("prefix_tuning", family), spec("parallel", family)]
        case "mam":
            return peftc.load_spec("mam", l=L, m=M, r=R)
        case "ia3":
            return peftc.load_spec("ia3")
        case "ia3_as_theirs":
            return parse_spec(IA3_AS_THEIRS, "ia3_as_theirs")
    raise AssertionError(method)


def backbone(method: str, family: str, attention: str) -> PreTrainedModel:
    """Positive scales commute with ReLU: with it the paper's IA3 and that of `adapters` are one function."""
    changes = {LAYOUTS[family].activation: "relu"} if method == "ia3" else {}
    return tiny(family, attention, **changes)


def layer_of(path: str) -> str:
    found = re.match(r".*?\.\d+(?=\.)", path)
    assert found, path
    return found[0]


def bottleneck(edit: Edit, family: str, found: Tensors) -> dict[str, torch.Tensor]:
    layout, layer = LAYOUTS[family], layer_of(edit.path)
    place = f"{layer}.{layout.bottlenecks[edit.site.kind]}.adapters.delta"
    values = {
        "down": found[f"{place}.adapter_down.0.weight"].T,
        "down_bias": found[f"{place}.adapter_down.0.bias"],
        "up": found[f"{place}.adapter_up.weight"].T,
        "up_bias": found[f"{place}.adapter_up.bias"],
    }
    return values | ({"s": found[f"{place}.scaling"]} if f"{place}.scaling" in found else {})


def prefix(edit: Edit, family: str, found: Tensors) -> dict[str, torch.Tensor]:
    """One tensor holds the keys and values of every layer: [..., layer, key or value, head, feature]."""
    end = f"prefix_tunings.delta.{LAYOUTS[family].prefixes[edit.site.group]}."
    mine = {name.partition(end)[2]: value for name, value in found.items() if end in name}
    heads, width = edit.site.dims["kv_heads"], edit.site.dims["kv"]
    layer = edit.site.layer
    assert layer is not None
    if "control_trans" in mine:
        k, v = mine["control_trans"].view(L, -1, 2, heads, width // heads)[:, layer].unbind(1)
        return {"P_k": k.transpose(0, 1), "P_v": v.transpose(0, 1)}
    up_k, up_v = mine["control_trans.2.weight"].view(-1, 2, width, M)[layer]
    up_k_bias, up_v_bias = mine["control_trans.2.bias"].view(-1, 2, width)[layer]
    return {
        "tokens": mine["wte.weight"],
        "down": mine["control_trans.0.weight"].T,
        "down_bias": mine["control_trans.0.bias"],
        "up_k": up_k.T,
        "up_k_bias": up_k_bias,
        "up_v": up_v.T,
        "up_v_bias": up_v_bias,
    }


def at_linear(edit: Edit, family: str, found: Tensors) -> dict[str, torch.Tensor]:
    """LoRA and IA3; over a fused projection one tensor holds its two slices, the value's second."""
    site = edit.site
    linear = site.weights["W"].path.removesuffix(".weight")
    if site.at.startswith("ffn."):
        linear = f"{layer_of(edit.path)}.{LAYOUTS[family].up}"
    place = f"{linear}.loras.delta"
    parts = 2 if site.is_slice else 1
    part = int(site.at == "attention.v") if site.is_slice else 0
    up = found[f"{place}.lora_B"].chunk(parts)[part]
    if f"{place}.lora_A" not in found:
        return {"scale": up.squeeze(1)}
    return {"down": found[f"{place}.lora_A"].chunk(parts)[part].T, "up": up.T}


def norm(edit: Edit, family: str, model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """The layer's last norm, which SeqBnConfig applies before the adapter too."""
    name = f"{layer_of(edit.path)}.{LAYOUTS[family].norm}"
    return {
        "scale": model.get_parameter(f"{name}.weight"),
        "shift": model.get_parameter(f"{name}.bias"),
    }


def fill(model: PreTrainedModel, family: str, found: Tensors) -> None:
    """Give the deltas the oracle's weights."""
    sources = {"ffn": bottleneck, "attention": bottleneck, "attention.heads": prefix}
    tensors = model.deltas.values()
    for edit in model.plan.edits:
        values = sources.get(edit.site.at, at_linear)(edit, family, found)
        if "shift" in {one.name for one in edit.parameters}:
            values |= norm(edit, family, model)
        for one in edit.parameters:
            if one.name != "ones":
                assert tensors[one.path].shape == values[one.name].shape, one.path
                tensors[one.path].data.copy_(values[one.name])


@pytest.fixture(scope="module")
def oracle_python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A Python that has `adapters`."""
    given = os.environ.get("PEFTC_ADAPTERS_PYTHON")
    if given:
        return given
    folder = tmp_path_factory.getbasetemp().parent / "adapters"  # of all workers
    with FileLock(f"{folder}.lock"):
        if not (folder / "ready").exists():
            install(folder)
            (folder / "ready").touch()
    return str(folder / "bin" / "python")


def install(folder: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "python", "-m", "pip", "install", "--quiet"]
    # A looser range of torch may pick another build, of gigabytes; the other pins contradict `adapters`.
    subprocess.run([*pip, "-c", HERE.parent / "constraints.txt", "torch"], check=True)
    subprocess.run([*pip, "adapters==1.3.0", "safetensors"], check=True)


@pytest.fixture(scope="module")
def answers(oracle_python: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for each case, with what the oracle says of it."""
    root = tmp_path_factory.mktemp("cases")
    for method, family in CASES:
        ask(root / f"{method}-{family}", method, family)
    subprocess.run([oracle_python, HERE / "adapters_oracle.py", root], check=True)
    return root


def ask(folder: Path, method: str, family: str) -> None:
    folder.mkdir()
    model = backbone(method, family, "eager")
    config_class, model_class, _ = FAMILIES[family]
    case = {
        "model": model_class,
        "config": config_class,
        "fields": model.config.to_dict(),
        "adapter": METHODS[method],
    }
    (folder / "case.json").write_text(json.dumps(case))
    weights = {name: value.clone() for name, value in model.state_dict().items()}  # tied ones twice
    save_file(weights, folder / "weights.safetensors")
    inputs = {f"{p}.{name}": v for p in PADDINGS for name, v in batch(model, p).items()}
    save_file(inputs, folder / "inputs.safetensors")


def distance(a: torch.Tensor, b: torch.Tensor, inputs: Tensors) -> float:
    """The largest difference in units of the largest value of b, without the rows of padding."""
    per_token = a.ndim == 3 and "decoder_input_ids" not in inputs
    real = inputs["attention_mask"].bool() if per_token else slice(None)
    return ((a - b)[real].abs().max() / b[real].abs().max()).item()


# float32 through two layers, whose sums the two sides take in another order: 7e-7 at most where it was tried.
BOUND = 1e-5


def numbers(tensors: Iterable[torch.Tensor]) -> int:
    return sum(value.numel() for value in tensors)


def compiled(
    method: str, family: str, attention: str, meaning: SpecLike, answers: Path
) -> tuple[PreTrainedModel, Tensors]:
    """The model of a case under a spec, with the oracle's weights; and the oracle's logits."""
    folder = answers / f"{method}-{family}"
    found, want = (load_file(folder / f"{name}.safetensors") for name in ("adapter", "logits"))
    model = peftc.compile(backbone(method, family, attention), meaning)
    fill(model, family, found)
    # Nothing of theirs is left out.
    assert numbers(model.deltas.parameters()) == numbers(found.values())
    return model, want


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("method", "family"), CASES)
def test_same_logits(method: str, family: str, attention: str, answers: Path) -> None:
    model, want = compiled(method, family, attention, spec(method, family), answers)
    original = backbone(method, family, attention)
    for padding in PADDINGS:
        inputs = batch(model, padding)
        bare, adapted = want[f"{padding}.bare"], want[f"{padding}.adapted"]
        assert distance(logits(original, inputs), bare, inputs) <= BOUND  # two transformers
        assert distance(logits(model, inputs), adapted, inputs) <= BOUND
        assert distance(bare, adapted, inputs) > 1e-2  # the adapter does something


@pytest.mark.parametrize(
    ("method", "family", "shipped_as"),
    [
        ("pfeiffer_as_theirs", "bart", ("pfeiffer", "bart")),
        ("houlsby_as_theirs", "roberta", ("houlsby", "roberta")),
        ("ia3_as_theirs", "bart", ("ia3", "bart")),
        ("parallel", "gpt2", ("parallel", "bart")),
    ],
)
def test_where_definitions_differ(
    method: str, family: str, shipped_as: tuple[str, str], answers: Path
) -> None:
    """Why these cases need a spec of their own: with the same weights the shipped one gives other logits."""
    model, want = compiled(method, family, "eager", spec(*shipped_as), answers)
    inputs = batch(model)
    assert distance(logits(model, inputs), want["none.adapted"], inputs) > 1e-2
