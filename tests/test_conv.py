"""Deltas at convolutions: the matrix of the kernels, channels last, PEFT's LoRA, and what is out of reach."""

from __future__ import annotations

import copy
from pathlib import Path

import peft
import pytest
import torch
import transformers
from conftest import logits, stir, tiny, wide
from safetensors.torch import load_file
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

import peftc
from peftc.driver import survey
from peftc.errors import PeftcError
from peftc.graph.arguments import dummy_inputs
from peftc.interchange.read import import_peft
from peftc.interchange.write import export_peft
from peftc.language.reader import parse_spec
from peftc.language.spec import Spec

IMAGES = {
    "convnext": (
        "ConvNext",
        dict(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, image_size=32),
    ),
    "resnet": (
        "ResNet",
        dict(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"),
    ),
}
SPEECH = dict(
    hidden_size=32,
    num_hidden_layers=1,
    num_attention_heads=4,
    intermediate_size=64,
    conv_dim=[8, 8],
    conv_stride=[5, 2],
    conv_kernel=[10, 3],
    num_conv_pos_embeddings=4,
    num_conv_pos_embedding_groups=2,
)
# The convolutions of a family: each in, out, channels and groups.
SITES = {
    "vit": [(48, 32, 3, 1)],
    "whisper": [(24, 32, 8, 1), (96, 32, 32, 1)],
    "convnext": [(48, 8, 3, 1), (49, 8, 8, 8), (32, 16, 8, 1), (49, 16, 16, 16)],
    "resnet": [
        (147, 8, 3, 1),
        *[(72, 8, 8, 1)] * 2,
        (72, 16, 8, 1),
        (144, 16, 16, 1),
        (8, 16, 8, 1),
    ],
    "mamba": [(4, 64, 64, 64)] * 2,
}
# What PEFT adapts in it: each convolution that is not grouped.
TARGETS = {
    "vit": ["projection"],
    "whisper": ["conv1", "conv2"],
    "convnext": ["embeddings.patch_embeddings", "downsampling_layer.1"],
    "resnet": ["convolution"],
}


def build(family: str) -> PreTrainedModel:
    if family not in IMAGES:
        return tiny(family)
    name, sizes = IMAGES[family]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**sizes, num_labels=3)
    model = wide(getattr(transformers, f"{name}ForImageClassification")(config))
    with torch.no_grad():
        for path, scale in model.named_parameters():
            if path.endswith("layer_scale_parameter"):
                scale.fill_(1.0)  # wide enough that every convolution matters
    return model


def noise(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        name: torch.randn(value.shape) if value.is_floating_point() else value
        for name, value in dummy_inputs(model).items()
    }


def at_conv(delta: str, scope: str = "*") -> Spec:
    return parse_spec(f'deltas: [{{at: {{op: conv, scope: "{scope}"}}, {delta}}}]', "c")


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference, in units of the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("family", SITES)
def test_sites(family: str) -> None:
    found = [site for site in survey(build(family)) if site.at == "conv"]
    sizes = [tuple(s.dims[n] for n in ("in", "out", "channels", "groups")) for s in found]
    assert sizes == SITES[family]


# Each is the backbone at its start, and but for DoRA bit-identical to the captured graph.
REWRITES = {
    "lora": "",
    "diff": "params: {w: {shape: [out, in], init: zeros}}, rewrite: {W: W + w}",
    "oft": "params: {turn: {shape: [1, in, in], init: zeros}}, rewrite: {W: W @ block_diag(cayley(turn))}",
    "dora": "params: {down: {shape: [in, 2], init: kaiming_uniform}, up: {shape: [2, out], init: zeros}, "
    "m: {shape: [out, 1], init: norm(W)}}, let: {V: W + transpose(down @ up)}, "
    "rewrite: {W: m * V / detach(norm(V))}",
    "ia3": "params: {s: {shape: [out], init: ones}}, rewrite: {h: h * s}",
    "input": "params: {s: {shape: [channels], init: ones}}, rewrite: {x: x * s}",
    "adapter": "params: {down: {shape: [out, 2], init: normal(1)}, up: {shape: [2, out], init: zeros}}, "
    "delta: relu(h @ down) @ up",
}
KEPT = {
    "input": {"a convolution reads its input through a kernel, or in groups"},
    "adapter": {"'relu' is not affine"},
}


def rewriting(name: str) -> Spec:
    return peftc.load_spec("lora_conv", r=2) if name == "lora" else at_conv(REWRITES[name])


@pytest.mark.parametrize("family", ["vit", "whisper", "convnext", "resnet"])
@pytest.mark.parametrize("name", REWRITES)
def test_a_method_of_linears_works_at_kernels(name: str, family: str, tmp_path: Path) -> None:
    """Starts as the backbone, only deltas learn, saves and loads, folds once and for all."""
    backbone, spec = build(family), rewriting(name)
    inputs = noise(backbone)
    plain = logits(peftc.compile(build(family), "bitfit"), inputs)  # nothing is inserted
    model = peftc.compile(backbone, spec)
    start = logits(model, inputs)
    assert apart(start, plain) <= (1e-5 if name == "dora" else 0)
    stir(model, 0.2)
    moved = logits(model, inputs)
    assert apart(moved, plain) > 1e-3
    model(**inputs).logits.square().mean().backward()
    got = {n for n, p in model.named_parameters() if p.grad is not None}
    assert got == {f"deltas.{p.path}" for edit in model.plan.edits for p in edit.parameters}
    model.save_pretrained(tmp_path / "d")
    assert torch.equal(logits(peftc.load(tmp_path / "d", build(family)), inputs), moved)
    merged, report = peftc.merge(model)
    assert apart(logits(merged, inputs), moved) <= 1e-5  # fp32, weights rounded once
    assert {one.note for one in report.kept} == KEPT.get(name, set())
    if report.kept:
        second = peftc.merge(merged)[1]
        assert second.error == 0 and second.kept == report.kept
    else:
        assert type(merged) is type(backbone)


class Odd(PreTrainedModel):
    """Convolutions that are rare: padded by a word, dilated, grouped, in three axes, tied, transposed."""

    config_class = PretrainedConfig
    base_model_prefix = "odd"
    main_input_name = "pixel_values"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        self.same = nn.Conv2d(2, 4, 3, padding="same", dilation=2)
        self.deep = nn.Conv3d(1, 2, (1, 2, 2), groups=1)
        self.grouped = nn.Conv2d(2, 4, 2, groups=2)
        self.read_twice = nn.Conv2d(4, 4, 1, bias=False)
        self.up = nn.ConvTranspose2d(4, 4, 2, stride=2)
        self.post_init()

    def forward(
        self, pixel_values: torch.Tensor, return_dict: bool = True
    ) -> ImageClassifierOutput:
        h = torch.tanh(self.same(pixel_values))
        h = self.deep(h.unsqueeze(1)).mean(2)
        h = self.read_twice(self.grouped(h)) + self.read_twice.weight.sum()
        return ImageClassifierOutput(logits=self.up(h).mean((2, 3)))


def odd() -> PreTrainedModel:
    torch.manual_seed(0)
    return Odd(PretrainedConfig(image_size=8, num_channels=2)).eval()


def test_rare_convolutions() -> None:
    backbone, inputs = odd(), {"pixel_values": torch.randn(3, 2, 8, 8)}
    model = stir(peftc.compile(backbone, peftc.load_spec("lora_conv", r=2)))
    assert [edit.site.scope for edit in model.plan.edits] == ["same", "deep", "grouped"]
    reasons = {one.site: one.reason for one in model.plan.misses}
    assert reasons == {
        "read_twice:conv": "'sum' reads this weight too",
        "up.weight": "'conv_transpose2d' reads this weight, and it is a transposed convolution",
    }
    merged, report = peftc.merge(model)
    assert not report.kept and apart(logits(model, inputs), logits(odd(), inputs)) > 1e-2
    assert apart(logits(merged, inputs), logits(model, inputs)) <= 1e-5  # fp32
    with pytest.raises(PeftcError, match=r"fits no site .*'sum' reads this weight too"):
        peftc.plan(odd(), at_conv("rewrite: {W: 2 * W}", "read_twice"))
    with pytest.raises(PeftcError, match="this convolution has no bias"):
        peftc.plan(build("resnet"), at_conv("rewrite: {b: 2 * b}"))


@pytest.mark.parametrize("name", ["Wav2Vec2", "Hubert"])
def test_a_weight_that_the_graph_computes_is_missed(name: str) -> None:
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SPEECH)
    model = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    plan = peftc.plan(model, "lora_conv")
    (miss,) = plan.misses
    assert miss.site == f"{name.lower()}.encoder.pos_conv_embed.conv.weight"
    assert miss.reason == "'_weight_norm' computes this weight in the graph"
    assert len(plan.edits) == 2
    with pytest.raises(PeftcError, match="'_weight_norm' computes this weight"):
        peftc.plan(model, at_conv("rewrite: {W: 2 * W}", "*.pos_conv_embed.*"))


def test_channels_are_last_and_positions_differ() -> None:
    """A site's h has the positions of the result: x, which has others, goes nowhere by accident."""
    low_rank = "params: {a: {shape: [in, 2], init: zeros}, c: {shape: [2, out], init: zeros}}"
    with pytest.raises(PeftcError, match="'3' is not '48'"):  # channels; channels * kernel
        peftc.plan(build("vit"), at_conv(f"{low_rank}, delta: x @ a @ c"))
    skip = "params: {a: {shape: [channels, out], init: zeros}}, delta: x @ a"
    backbone = build("vit")
    with pytest.raises(PeftcError, match="differ: '4' is not '16'"):
        peftc.plan(backbone, at_conv(skip))
    scale = torch.randn(32)
    model = peftc.compile(backbone, rewriting("ia3"))
    stir(model).deltas.get_parameter(model.plan.edits[0].parameters[0].path).data.copy_(scale)
    inputs, other = noise(backbone), build("vit")
    conv = other.vit.embeddings.patch_embeddings.projection
    conv.register_forward_hook(lambda _, __, h: h * scale[:, None, None])
    assert apart(logits(model, inputs), logits(other, inputs)) <= 1e-6  # fp32


def test_mixed_channels_fold_where_no_groups_are() -> None:
    mixed = "params: {m: {shape: [out, out], init: identity}}, rewrite: {h: h @ m}"
    backbone = build("convnext")
    inputs, model = noise(backbone), stir(peftc.compile(backbone, at_conv(mixed)))
    merged, report = peftc.merge(model)
    assert len(report.folded) == 2
    assert [one.note for one in report.kept] == ["'matmul' mixes the groups of the convolution"] * 2
    assert apart(logits(merged, inputs), logits(model, inputs)) <= 1e-4  # fp32


def test_biases_of_convolutions_alone() -> None:
    plan = peftc.plan(build("whisper"), at_conv("train: [bias]", "*.conv?"))
    assert [one.path for one in plan.unfrozen] == [f"model.encoder.conv{i}.bias" for i in (1, 2)]


def test_whisper_generates_the_same() -> None:
    """The convolutions run in the encoder alone; a step of the decoder knows nothing of them."""
    model = stir(peftc.compile(build("whisper"), peftc.load_spec("lora_conv", r=2)))
    merged, _ = peftc.merge(model)
    features = {"input_features": noise(model)["input_features"]}
    settings = dict(max_new_tokens=4, min_new_tokens=4, do_sample=False)
    ids = [one.generate(**features, **settings) for one in (model, merged)]
    assert torch.equal(*ids)


def test_running_statistics_are_frozen_too() -> None:
    """Deltas are saved without them, so that a training step must leave them as they are."""
    model = stir(peftc.compile(build("resnet"), "lora_conv"), 0.05)
    inputs, before = noise(model), {k: v.clone() for k, v in model.state_dict().items()}
    want = logits(model, inputs)
    model.train()
    out = model(**inputs).logits
    out.square().mean().backward()
    assert apart(out, want) <= 1e-6  # fp32
    after = model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert any(name.endswith("running_mean") for name in before)


def adapted(backbone: PreTrainedModel, config: peft.PeftConfig) -> PreTrainedModel:
    """PEFT's model with weights of some size."""
    torch.manual_seed(3)
    model = peft.get_peft_model(copy.deepcopy(backbone), config).eval()
    for layer in model.modules():  # Whisper's encoder asks its convolutions for their stride
        if isinstance(getattr(layer, "base_layer", None), nn.Conv1d):
            layer.stride = layer.base_layer.stride
    with torch.no_grad():
        for value in (p for p in model.parameters() if p.requires_grad):
            value.add_(torch.randn_like(value) * 0.1)
    return model


CONFIGS = {
    "lora": lambda targets: peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets),
    "dora": lambda targets: peft.LoraConfig(r=4, use_dora=True, target_modules=targets),
    "loha": lambda targets: peft.LoHaConfig(r=4, alpha=8, target_modules=targets),
    "lokr": lambda targets: peft.LoKrConfig(r=4, alpha=8, target_modules=targets),
}


@pytest.mark.parametrize("family", TARGETS)
@pytest.mark.parametrize("kind", CONFIGS)
def test_peft(kind: str, family: str, tmp_path: Path) -> None:
    """The same logits and merged weights; LoRA written back is theirs, bit for bit."""
    backbone = build(family)
    theirs = adapted(backbone, CONFIGS[kind](TARGETS[family]))
    theirs.save_pretrained(tmp_path / "a")
    if (kind, family) == ("lokr", "whisper"):
        with pytest.raises(PeftcError, match="LoKr of a Conv1d is no product"):
            import_peft(tmp_path / "a", backbone)
        return
    mine, inputs = import_peft(tmp_path / "a", backbone), noise(backbone)
    want = logits(theirs, inputs)
    assert apart(logits(mine, inputs), want) <= 1e-5  # fp32
    assert apart(logits(build(family), inputs), want) > 1e-3
    if kind == "lora":
        export_peft(mine, tmp_path / "b")
        a, b = (load_file(tmp_path / one / "adapter_model.safetensors") for one in "ab")
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
        again = peft.PeftModel.from_pretrained(build(family), tmp_path / "b").eval()
        assert len(again.peft_config["default"].target_modules) == len(mine.plan.edits)
    merged, report = peftc.merge(mine)
    assert not report.kept
    weights = dict(theirs.merge_and_unload().named_parameters())
    for name, weight in merged.named_parameters():
        assert (weight - weights[name]).abs().max() <= 1e-5 * weights[name].abs().max()  # fp32


def test_peft_of_a_depthwise_convolution(tmp_path: Path) -> None:
    """PEFT's A reads every group, so it cannot merge; ours is its A with zeros outside each output's group."""
    backbone, r = build("convnext"), 2
    text = peftc.load_spec("lora_conv").text.replace('"*"', '"*.dwconv"')
    model = stir(peftc.compile(backbone, parse_spec(text, "c", r=r, alpha=4)))
    values, inputs = model.deltas.values(), noise(backbone)
    config = peft.LoraConfig(
        r=16 * r, rank_pattern={"stages.0.layers.0.dwconv": 8 * r}, target_modules=["dwconv"]
    )
    other = adapted(backbone, config)
    with torch.no_grad():
        for edit in model.plan.edits:
            down, up = (values[f"{edit.path}.{name}"] for name in ("down", "up"))
            layer = other.get_submodule(f"base_model.model.{edit.site.scope}")
            a, b, groups = (
                layer.lora_A["default"],
                layer.lora_B["default"],
                edit.site.dims["groups"],
            )
            kernel = model.get_parameter(edit.site.weights["W"].path).shape[2:]
            a.weight.zero_()
            for g in range(groups):
                a.weight[g * r : (g + 1) * r, g] = down.T.reshape(r, *kernel)
            b.weight.copy_(up.T[:, :, None, None])
            layer.scaling["default"] = 4 / r
    want = logits(other, inputs)
    assert apart(logits(model, inputs), want) <= 1e-5  # fp32
    assert apart(logits(build("convnext"), inputs), want) > 1e-3
    other.save_pretrained(tmp_path)
    with pytest.raises(
        PeftcError, match=r"dwconv' has groups \d+, which PEFT's adapter leaves out"
    ):
        import_peft(tmp_path, backbone)


def test_what_peft_computes_otherwise_is_refused(tmp_path: Path) -> None:
    adapted(odd(), CONFIGS["lora"](["same"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(PeftcError, match=r"'same' has dilation \(2, 2\)"):
        import_peft(tmp_path / "lora", odd())
    model = peftc.compile(odd(), "lora_conv")
    with pytest.raises(PeftcError, match=r"'same' has dilation \(2, 2\)"):
        export_peft(model, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    ia3 = peft.IA3Config(target_modules=["deep"], feedforward_modules=[])
    adapted(odd(), ia3).save_pretrained(tmp_path / "ia3")
    with pytest.raises(PeftcError, match="'deep' is a convolution, and its adapter has a form for"):
        import_peft(tmp_path / "ia3", odd())
