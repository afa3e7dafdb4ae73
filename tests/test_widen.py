"""Widen: an adapter beside a feed-forward of the same activation becomes hidden units of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import attention_of, batch, logits, stir, tiny
from transformers import PreTrainedModel

import peftc
from peftc.driver import Trace
from peftc.language.reader import parse_spec


def adapter(
    act: str, r: int = 6, stack: str = "any", layers: str = "any", biased: bool = True
) -> peftc.Spec:
    """A scaled parallel adapter at the feed-forwards."""
    where = ", ".join(f"{k}: {v}" for k, v in (("stack", stack), ("layers", layers)) if v != "any")
    more = (
        "\n      down_bias: {shape: [r], init: normal}\n      up_bias: {shape: [out], init: normal}"
    )
    return parse_spec(
        f"""
name: adapter_{act}_{r}
with: {{r: {r}, s: 2.0}}
deltas:
  - at: ffn
    where: {{{where}}}
    params:
      down: {{shape: [in, r], init: normal}}
      up: {{shape: [r, out], init: normal}}{more if biased else ""}
    delta: {act}(x @ down{" + down_bias" if biased else ""}) @ up{" + up_bias" if biased else ""}
    compose: h + s * delta
"""
    )


SEQUENTIAL = parse_spec(
    "name: after\ndeltas:\n  - at: ffn\n    params:\n      down: {shape: [out, 4], init: normal}\n"
    "      up: {shape: [4, out], init: normal}\n    delta: gelu(h @ down) @ up\n    compose: h + delta\n"
)


def compiled(backbone: PreTrainedModel, *specs: object) -> PreTrainedModel:
    return stir(peftc.compile(backbone, [*specs]))


@pytest.mark.parametrize(
    ("family", "act", "sizes"),
    [
        ("bart", "gelu", {}),
        ("bart", "relu", {"activation_function": "relu"}),
        ("whisper", "gelu", {}),
        ("bert", "gelu", {}),
        ("distilbert", "gelu", {}),
        ("vit", "gelu", {}),
        ("neox", "gelu", {}),
        # Its weights are stored turned, and its configuration leaves the width open.
        ("gpt2", "relu", {"activation_function": "relu"}),
        ("gpt2", "gelu_tanh", {"activation_function": "gelu_pytorch_tanh"}),
    ],
)
def test_nothing_is_left(family: str, act: str, sizes: dict[str, object], tmp_path: Path) -> None:
    """A plain model, whose checkpoint transformers reads, that computes what the compiled one did."""
    backbone = tiny(family, attention_of(family), **sizes)
    model = compiled(backbone, adapter(act))
    merged, report = peftc.merge(model)
    assert not report.kept and type(merged) is type(backbone)
    assert report.changed > 0.05 * report.scale
    merged.save_pretrained(tmp_path)
    again = (
        type(backbone).from_pretrained(tmp_path, attn_implementation=attention_of(family)).eval()
    )
    inputs = batch(model)
    want = logits(model, inputs)
    for one in (merged, again):  # float32, two layers: rounding
        assert torch.allclose(logits(one, inputs), want, atol=1e-5 * float(want.abs().max()))
    before, after = (sum(p.numel() for p in one.parameters()) for one in (backbone, merged))
    assert after > before
    assert backbone.config.to_dict() == tiny(family, attention_of(family), **sizes).config.to_dict()


def test_generates_the_same() -> None:
    model = compiled(tiny("bart"), adapter("gelu"), peftc.load_spec("lora", r=2))
    merged, report = peftc.merge(model)
    assert not report.kept
    inputs = batch(model)
    prompt = {k: inputs[k] for k in ("input_ids", "attention_mask")}
    one, other = (it.generate(**prompt, max_new_tokens=8, num_beams=2) for it in (model, merged))
    assert torch.equal(one, other)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(lambda: peftc.load_spec("ia3"), id="a scale of the hidden units"),
        pytest.param(lambda: peftc.load_spec("bitfit"), id="biases"),
        pytest.param(lambda: adapter("gelu", 3), id="another adapter"),
        pytest.param(lambda: adapter("gelu", 3, biased=False), id="one without biases"),
    ],
)
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.sampled(2)
def test_beside_others_at_the_same_feed_forward(more: object, first: bool) -> None:
    specs = [adapter("gelu"), more()]  # type: ignore[operator]
    model = compiled(tiny("bert"), *(specs if first else reversed(specs)))
    merged, report = peftc.merge(model)
    assert report.error <= 1e-5 * report.scale
    inputs = batch(model)
    assert torch.allclose(logits(merged, inputs), logits(model, inputs), atol=1e-5)
    assert not report.kept


def test_what_changes_the_last_linear_first() -> None:
    """What reads a result that the adapter has changed already waits for it, and so keeps it."""
    lora = peftc.load_spec("lora_ffn", r=2)
    _, report = peftc.merge(compiled(tiny("bert"), lora, adapter("gelu")))
    assert not report.kept
    _, report = peftc.merge(compiled(tiny("bert"), adapter("gelu"), lora))
    first, second = "bert.encoder.layer.0", "bert.encoder.layer.1"
    assert {one.edit: one.note for one in report.kept} == {
        f"{layer}{part}": note
        for layer in (first, second)
        for part, note in (
            (
                ":ffn:adapter_gelu_6",
                f"{layer}.output.dense:ffn.linear:lora_ffn stays at the same feed-forward",
            ),
            (".output.dense:ffn.linear:lora_ffn", "an earlier delta of the same linear stays"),
        )
    }


def test_what_is_left_runs_on_the_wider_backbone(tmp_path: Path) -> None:
    model = compiled(tiny("bart"), adapter("gelu"), "prefix_direct")
    merged, report = peftc.merge(model)
    assert {one.edit.partition(":")[2] for one in report.kept} == {"attention.heads:prefix_direct"}
    assert merged.config.encoder_ffn_dim == merged.config.decoder_ffn_dim == 70
    inputs = batch(model)
    assert torch.allclose(logits(merged, inputs), logits(model, inputs), atol=1e-5)
    merged.save_pretrained(tmp_path / "deltas")
    again = peftc.load(tmp_path / "deltas", peftc.detach(merged))
    assert torch.allclose(logits(again, inputs), logits(model, inputs), atol=1e-5)


def test_a_width_for_each_stack() -> None:
    """The width of either stack is a number of its own, and other numbers are as large as it was."""
    specs = adapter("gelu", 6, "encoder"), adapter("gelu", 9, "decoder")
    merged, report = peftc.merge(compiled(tiny("bart"), *specs))
    config = merged.config
    assert not report.kept
    assert (config.encoder_ffn_dim, config.decoder_ffn_dim) == (70, 73)
    assert config.max_position_embeddings == 64  # the old width too


def test_in_both_sets_of_two() -> None:
    model = compiled(tiny("bert"), adapter("gelu"))
    model.add(adapter("gelu", 4), "second")
    model.use(["default", "second"])
    stir(model)
    merged, report = peftc.merge(model)
    assert not report.kept and merged.config.intermediate_size == 64 + 6 + 4
    inputs = batch(model)
    assert torch.allclose(logits(merged, inputs), logits(model, inputs), atol=1e-5)


@pytest.mark.parametrize(
    ("family", "spec", "reason"),
    [
        ("bert", adapter("relu"), "'relu' is not affine, and its feed-forward's own is 'gelu'"),
        (
            "bert",
            adapter("gelu", layers="0"),
            "no configuration of this model has feed-forwards as wide as they would be",
        ),
        # Gated, and of an activation that no op is.
        ("llama", adapter("silu"), "'silu' is not affine"),
        ("gpt2", adapter("gelu_tanh"), "'gelu_tanh' is not affine"),
        ("t5", adapter("relu"), "the delta adds a bias and the feed-forward has none"),
        ("bert", SEQUENTIAL, "'gelu' is not affine, nor what it is of a map of x"),
    ],
    ids=["another activation", "one layer", "gated", "composed", "no bias", "sequential"],
)
def test_what_stays_says_why(family: str, spec: peftc.Spec, reason: str) -> None:
    model = compiled(tiny(family), spec)
    merged, report = peftc.merge(model)
    assert {one.note for one in report.kept} == {reason} and not report.folded
    inputs = batch(model)
    assert torch.equal(logits(merged, inputs), logits(model, inputs))


def test_without_a_bias_where_there_is_none() -> None:
    merged, report = peftc.merge(compiled(tiny("t5"), adapter("relu", biased=False)))
    assert not report.kept and merged.config.d_ff == 70


def test_a_part_that_reads_the_hidden_units_keeps_it() -> None:
    """What is not affine at the same feed-forward stays, and so does what stands beside it."""
    odd = parse_spec(
        "name: odd\ndeltas:\n  - at: ffn.hidden\n    params:\n      l: {shape: [out], init: normal}\n"
        "    delta: tanh(h) * l\n    compose: h + delta\n"
    )
    model = compiled(tiny("bert"), adapter("gelu"), odd)
    merged, report = peftc.merge(model)
    assert len(report.kept) == 4
    assert any("stays at the same feed-forward" in one.note for one in report.kept)
    inputs = batch(model)
    assert torch.allclose(logits(merged, inputs), logits(model, inputs), atol=1e-5)


def test_it_is_a_pass() -> None:
    trace = Trace()
    _, report = peftc.merge(compiled(tiny("bert"), adapter("gelu")), trace=trace)
    assert {one.name: one.rewrites for one in trace.results}["widen"] == len(report.folded) == 2
