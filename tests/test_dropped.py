"""Layer drop: a compiled model leaves out the layers that eager code leaves out, with the numbers that it draws."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from conftest import batch, stir, tiny, wide
from transformers import PreTrainedModel

import peftc
from peftc.language.reader import load_spec, parse_spec

SPEECH = dict(
    hidden_size=32,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=48,
    conv_dim=(16, 16),
    conv_kernel=(10, 3),
    conv_stride=(5, 2),
    num_feat_extract_layers=2,
    num_conv_pos_embeddings=8,
    num_conv_pos_embedding_groups=2,
    layerdrop=0.5,
    apply_spec_augment=False,
)


def speech(**changes: object) -> PreTrainedModel:
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(**{**SPEECH, **changes})
    return wide(transformers.Wav2Vec2ForSequenceClassification(config))


def text() -> PreTrainedModel:
    return tiny("bart", encoder_layerdrop=0.5, decoder_layerdrop=0.5)


@pytest.mark.parametrize("make", [speech, text])
def test_losses_are_those_of_eager_code(make: object) -> None:
    """Under one seed: with dropout, layer by layer too, and the gradients of what was unfrozen."""
    model: PreTrainedModel = make()
    inputs = batch(model)
    ours = peftc.compile(copy.deepcopy(model), load_spec("bitfit")).train()
    eager = copy.deepcopy(model).train()
    found = set()
    for seed in range(6):
        for layers in (False, True):
            if layers:
                ours.gradient_checkpointing_enable()
            results = []
            for one in (ours, eager):
                torch.manual_seed(seed)
                one.zero_grad()
                logits = one(**inputs).logits
                if logits.requires_grad:
                    logits.square().sum().backward()
                results.append(logits.detach())
            assert torch.equal(*results)
            found.add(float(results[0].sum()))
            ours.gradient_checkpointing_disable()
            for path, weight in ours.named_parameters():
                if weight.grad is not None:
                    torch.testing.assert_close(weight.grad, eager.get_parameter(path).grad)
    assert len(found) > 3  # layers were left out, others in each


def test_deltas_around_layers_that_are_left_out() -> None:
    """At what goes into the next layer, at its norms and its feed-forwards: as the folded model in eager code."""
    spec = """
deltas:
  - at: ffn
    params: {a: {shape: [out], init: zeros}}
    delta: a
  - at: norm
    params: {c: {shape: [out], init: zeros}}
    rewrite: {W: W + c}
"""
    for model in (speech(), text()):
        compiled = stir(peftc.compile(copy.deepcopy(model), parse_spec(spec, "s")))
        folded, report = peftc.merge(compiled)
        assert not report.kept
        inputs = batch(model)
        for seed in range(6):
            results = []
            for one in (compiled.train(), folded.train()):
                torch.manual_seed(seed)
                results.append(one(**inputs).logits)
            torch.testing.assert_close(*results, rtol=0, atol=1e-5)


def test_deltas_of_a_layer_that_is_left_out_are_not_run() -> None:
    model = stir(peftc.compile(speech(layerdrop=1.0), load_spec("lora", r=2))).train()
    plain = speech(layerdrop=1.0).train()
    inputs = batch(plain)
    for one in (model, plain):
        torch.manual_seed(0)
        one.logits = one(**inputs).logits
    assert torch.equal(model.logits, plain.logits)


def test_numbers_that_torch_does_not_draw_are_said() -> None:
    """SpecAugment draws by NumPy, whose generator a trace leaves as it was."""
    import numpy as np

    model = peftc.compile(
        speech(apply_spec_augment=True, mask_time_prob=0.5, mask_time_length=2),
        load_spec("lora", r=2),
    )
    np.random.seed(3)
    with pytest.warns(
        UserWarning, match="draws random numbers in training by Python's or NumPy's generator"
    ):
        model.train()(**batch(model))
    after = np.random.rand()
    np.random.seed(3)
    assert after == np.random.rand()


def test_what_else_hangs_on_a_draw_is_refused() -> None:
    class Odd(transformers.BertForSequenceClassification):
        def forward(self, *args: object, **kwargs: object) -> object:
            out = super().forward(*args, **kwargs)
            if self.training and torch.rand([]) < 0.5:
                out.logits = out.logits * 2
            return out

    torch.manual_seed(0)
    model = Odd(tiny("bert").config)
    compiled = peftc.compile(model, load_spec("lora", r=2)).train()
    with pytest.raises(
        peftc.errors.PeftcError,
        match="a random number decides more than whether a layer is left out",
    ):
        compiled(**batch(model))
