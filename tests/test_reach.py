"""What sites are found in: one class of transformers' registry for each way in which eager code is written."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from conftest import logits, stir
from transformers import PreTrainedModel

import peftc
from peftc.driver import Trace, _captured, outputs
from peftc.errors import PeftcError
from peftc.graph.facts import Stacks
from peftc.interchange.settings import InterchangeError
from peftc.interchange.write import export_peft
from peftc.language.reader import parse_spec
from peftc.rewrite.verify import check
from peftc.sites.kinds import Survey

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

from cells import METHODS, cell
from nature import Nature
from registry import Built, build, registered

# The class, and how many sites of each kind it has at two layers (or as many as are needed for all kinds of them).
SITES = {
    # queries, and keys and values, by two projections one after another; keys written into a part of a new value
    "DeepseekV3ForTokenClassification": {
        "attention": 2,
        "attention.q_down": 2,
        "attention.k": 2,
        "attention.v_down": 2,
        "ffn": 2,
    },
    # scores filled in place, masks expanded to their shape
    "XLMForTokenClassification": {"attention": 2, "attention.q": 2, "embedding": 1},
    # a layer norm between queries and their projection, which is a slice
    "PersimmonForTokenClassification": {"attention.q": 2, "attention.v": 2},
    # results cut into words and entities, and joined
    "LukeForTokenClassification": {"attention": 2},
    # keys laid out with their features first
    "OpenAIGPTForSequenceClassification": {"attention.heads": 2},
    # two cores in a module, each with half of the values' heads
    "DiffLlamaForTokenClassification": {"attention.v": 2, "attention.heads": 2},
    # experts that share their norm with attention
    "Cohere2MoeForCausalLM": {"ffn": 4, "router": 4},
    # a learned activation
    "ApertusForTokenClassification": {"ffn": 2, "ffn.hidden": 2},
    # weights of three axes, multiplied by einsum
    "XLNetForTokenClassification": {"attention": 2, "attention.q": 2, "attention.o": 2},
    # a convolution of the values beside the heads
    "NystromformerForTokenClassification": {"attention": 2},
    # convolutions along the tokens, some in groups, and keys with their features first
    "SqueezeBertForMaskedLM": {"attention": 2, "attention.heads": 2, "attention.q": 2, "ffn": 2},
    # a core that is not known beside one that is
    "ProphetNetForConditionalGeneration": {"attention": 4, "attention.heads": 4, "attention.q": 6},
    # a batch norm between a fused projection and its parts
    "LevitForImageClassificationWithTeacher": {"attention.q": 8, "attention.v": 8},
    # experts scored by a part of what a linear gives, their result convolved before it is added
    "InklingForCausalLM": {"attention": 6, "ffn": 6, "router": 6},
    # feed-forwards of convolutions over an image
    "SwiftFormerForImageClassification": {"ffn": 12, "ffn.up": 12},
    # ids of another name
    "PerceiverForMaskedLM": {"embedding": 1},
    # rotations that are reshaped as other values
    "RoFormerForTokenClassification": {"attention": 2, "attention.q": 2},
    # a norm of all places between the linears
    "ConvNextV2ForImageClassification": {"ffn": 8},
    # a convolution over neighbours between the linears
    "SegformerForImageClassification": {"attention": 4, "ffn": 4},
}


def built(name: str) -> Built:
    return build(next(one for one in registered() if one.name == name))


@pytest.mark.sampled(3)
@pytest.mark.parametrize("name", SITES)
def test_sites(name: str) -> None:
    one = built(name)
    program = _captured(one.model, dict(one.inputs), Trace()).program
    found = [site.at for site in Survey.of(program, Stacks.read(one.model)).sites]
    assert {at: found.count(at) for at in SITES[name]} == SITES[name]
    assert check(program) == ()  # whoever looks for sites asks for no size


# What shows when a model runs.
SHOWN = {
    "AXK2ForCausalLM": "the keys of an indexer in the cache",
    "BertLMHeadModel": "a cache that is filled and not given",
    "DeepseekV3ForCausalLM": "two projections one after another",
    "DiffLlamaForCausalLM": "two cores in a module",
    "FSMTForConditionalGeneration": "a mask that is left out where it is empty",
    "FuyuForCausalLM": "an empty dict as an argument",
    "Florence2ForConditionalGeneration": "a language model as the decoder",
    "MptForCausalLM": "keys whose bias counts from the last",
    "PPFormulaNetForConditionalGeneration": "a decoder that reads what the encoder pools",
    "ProphetNetForConditionalGeneration": "two streams of queries",
    "Qwen3VLForConditionalGeneration": "positions of three kinds",
    "T5Gemma2ForTokenClassification": "masks that are made for one place at a time",
    "XLMForTokenClassification": "scores filled in place",
}
# What one of them refuses, in words: its own code embeds the tokens that the encoder reads when it writes.
REFUSED = {
    ("Florence2ForConditionalGeneration", "prompt_tuning"): "nothing says what 'inputs_embeds'",
}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", SHOWN)
def test_a_class_holds(name: str, method: str) -> None:
    one = built(name)
    found = cell(method, one.model, one.inputs, Nature.of(one.model, one.inputs))
    reason = REFUSED.get((name, method), "")
    assert found.outcome == ("refused" if reason else "holds") and reason in found.reason


def test_what_is_of_a_kind_and_of_one_shape_is_shared() -> None:
    """Stages of a vision model have widths of their own: those of one width share."""
    spec = parse_spec(
        "deltas: [{at: attention, params: {A: {shape: [out, out], init: zeros, per: kind}}, delta: h @ A}]",
        "s",
    )
    plan = peftc.plan(built("SegformerForImageClassification").model, spec)
    widths = {edit.site.dims["out"] for edit in plan.edits}
    assert len(widths) > 1 and len(plan.tensors) == len(widths)
    assert "shared.encoder_cross_2.s.A" in plan.tensors


def test_weights_of_several_axes(tmp_path: Path) -> None:
    """Of queries [in, heads, head_dim] and of the output [out, heads, head_dim]: seen as a linear's, and stored as they
    were."""
    one = built("XLNetForTokenClassification")
    model = stir(peftc.compile(one.model.double(), parse_spec(LORA, "s")))
    with pytest.raises(InterchangeError, match=r"rel_attn.q' is not the weight of a module"):
        export_peft(model, tmp_path)
    before = {name: value.shape for name, value in one.model.state_dict().items()}
    folded, report = peftc.merge(model)
    assert len(report.folded) == 4 and not report.kept
    assert {name: value.shape for name, value in folded.state_dict().items()} == before
    want, got = logits(model, dict(one.inputs)), logits(folded, dict(one.inputs))
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert not torch.allclose(
        want, logits(built("XLNetForTokenClassification").model.double(), dict(one.inputs))
    )


LORA = """
with: {r: 2}
deltas:
  - at: [attention.q, attention.o]
    params: {down: {shape: [in, r], init: normal}, up: {shape: [r, out], init: zeros}}
    delta: x @ down @ up
"""


def test_rows_in_front_are_cut_from_whatever_axis() -> None:
    """Of what a second stream predicts, [batch, streams, length, vocabulary], too."""
    one = built("ProphetNetForCausalLM")
    want = {name: value.shape for name, value in outputs(one.model, dict(one.inputs)).items()}
    model = peftc.compile(one.model, METHODS["prompt_tuning"], example=dict(one.inputs))
    assert {k: v.shape for k, v in outputs(model, dict(one.inputs)).items()} == want
    assert want["logits_ngram"][2] == one.inputs["input_ids"].shape[1]


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_decoder_reads_what_the_encoder_pools(use_cache: bool) -> None:
    one = built("PPFormulaNetForConditionalGeneration")
    images = one.inputs["pixel_values"]
    model = peftc.compile(one.model, "lora")

    def steps(model: PreTrainedModel) -> torch.Tensor:
        ways = {"max_new_tokens": 3, "do_sample": False, "use_cache": use_cache}
        asked = {"output_logits": True, "return_dict_in_generate": True}
        with torch.no_grad():
            said = model.generate(images, **ways, **asked)
        return torch.stack(said.logits, 1)  # type: ignore[attr-defined]

    want = steps(model.backbone)
    assert (steps(model) - want).abs().max() <= 1e-5 * want.abs().max()  # fp32


def test_heads_that_share_an_axis_with_the_batch_have_no_number() -> None:
    """Those of windows of an image."""
    plan = peftc.plan(built("PPFormulaNetForConditionalGeneration").model, "prefix_tuning")
    assert {miss.reason for miss in plan.misses} == {"'kv_heads' is no fixed number here"}
    assert {edit.site.stack for edit in plan.edits} == {"decoder"}


def test_projections_that_are_convolutions(tmp_path: Path) -> None:
    """What mixes groups of features cannot be in a weight that does not; all else folds as into a linear."""
    one = built("SqueezeBertForMaskedLM")
    inputs = dict(one.inputs)
    bare = logits(one.model.double(), inputs)
    model = stir(peftc.compile(one.model, parse_spec(LORA, "s")))
    with pytest.raises(PeftcError, match=r"query' has groups 4"):
        export_peft(model, tmp_path)
    want = logits(model, inputs)
    folded, report = peftc.merge(model)
    assert {one.edit.split(":")[1] for one in report.folded} == {"attention.o"}
    assert {kept.edit.split(":")[1] for kept in report.kept} == {"attention.q"}
    assert {kept.note for kept in report.kept} == {
        "a convolution reads its input through a kernel, or in groups"
    }
    assert (logits(folded, inputs) - want).abs().max() <= 1e-10 * want.abs().max()
    assert (want - bare).abs().max() > 1e-3 * bare.abs().max()


def test_a_result_added_to_its_own_convolution_is_no_residual() -> None:
    """The stream that the layer was given is."""
    one = built("InklingForCausalLM")
    one.model.config.mlp_layer_types = ["dense"] * one.model.config.num_hidden_layers
    backbone = type(one.model)(one.model.config).double().eval()
    ids = {"input_ids": one.inputs["input_ids"]}
    text = "deltas: [{at: ffn, params: {A: {shape: [d, d], init: zeros}}, delta: residual @ A}]"
    model = stir(peftc.compile(backbone, parse_spec(text, "s"), example=ids))
    got, bare = logits(model, ids), logits(backbone, ids)
    for number, layer in enumerate(backbone.model.layers):
        given: dict[str, torch.Tensor] = {}
        weight = model.deltas.get_parameter(f"model.layers.{number}.mlp.ffn.s.A")
        layer.post_attention_layernorm.register_forward_pre_hook(
            lambda _, args, at=given: at.update(x=args[0])
        )
        layer.mlp.down_proj.register_forward_hook(
            lambda _, args, h, at=given, weight=weight: h + at["x"] @ weight
        )
    want = logits(backbone, ids)
    assert (got - want).abs().max() <= 1e-10 * want.abs().max()
    assert (got - bare).abs().max() > 1e-3 * bare.abs().max()


def test_masks_and_targets_of_permuted_tokens() -> None:
    """XLNet's, of other lengths than the first, and of several targets."""
    one = built("XLNetLMHeadModel")
    model = stir(peftc.compile(one.model, "lora"))
    folded, _ = peftc.merge(copy.deepcopy(model))
    for rows, length, targets in ((3, 11, 1), (2, 7, 1), (2, 7, 4)):
        draw = torch.Generator().manual_seed(length)
        inputs = {
            "input_ids": torch.randint(5, 40, (rows, length), generator=draw),
            "perm_mask": (torch.rand(rows, length, length, generator=draw) < 0.3).float(),
            "target_mapping": torch.eye(length)[-targets:].repeat(rows, 1, 1),
        }
        got, want = logits(model, inputs), logits(folded, inputs)
        assert got.shape[1] == targets
        assert (got - want).abs().max() <= 1e-5 * want.abs().max()  # fp32, two layers


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MiniMaxForCausalLM", "uses cache of its own"),
        pytest.param(
            *("DeepseekV4ForCausalLM", "asks for a DeepseekV4HCACache in its cache"),
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_cache_that_no_graph_takes(name: str, reason: str) -> None:
    one = built(name)
    ids, ways = one.inputs["input_ids"], {"max_new_tokens": 3, "do_sample": False}
    want = one.model.generate(ids, **ways)  # type: ignore[attr-defined]
    model = peftc.compile(one.model, "norm_tuning")
    with pytest.warns(UserWarning, match=f"generated without a cache: .* {reason}"):
        assert torch.equal(model.generate(ids, **ways), want)
