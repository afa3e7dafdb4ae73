"""Saved: what a plan says that a training step saves for backward is what autograd's hooks count."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ENCODER, SAMPLE, SEQ2SEQ, Run, Variant, batch, tiny
from measured import saved_bytes
from methods import spec
from torch import fx, nn
from torch.utils._pytree import tree_structure
from transformers import (
    BartConfig,
    BartForSequenceClassification,
    BertConfig,
    BertForPreTraining,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    PreTrainedModel,
)

import peftc
from peftc.cli.steps import lines
from peftc.graph.program import Program, Slot, aten
from peftc.graph.steps import StepError
from peftc.language.reader import parse_spec
from peftc.model.packed import packed
from peftc.model.sharing import AttachError
from peftc.saved import Saved, SavedError, saved

ROWS, LENGTH = 3, 11


def meta(model: PreTrainedModel) -> PreTrainedModel:
    """The same model without weights, as `peftc plan` builds it."""
    with torch.device("meta"):
        return type(model)._from_config(model.config, dtype=model.dtype).eval()


def backbone(method: str, family: str) -> PreTrainedModel:
    model = Variant.of(method, family).backbone()
    if family == "deberta":  # else its loss branches on the labels, and no step of it can be traced
        model.config.problem_type = "single_label_classification"
    return model


def real(model: PreTrainedModel, rows: int = ROWS, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """A batch as the collators of transformers make it of texts of one length."""
    inputs = batch(model, size=rows, length=length)
    inputs.pop("decoder_input_ids", None)
    classes = "Classification" in type(model).__name__
    inputs["labels"] = torch.randint(*((0, 3, (rows,)) if classes else (4, 120, (rows, length))))
    moves = getattr(model, "prepare_decoder_input_ids_from_labels", None)
    return inputs | ({"decoder_input_ids": moves(inputs["labels"])} if moves else {})


def counted(backbone: PreTrainedModel, method: object, inputs: dict[str, torch.Tensor]) -> int:
    model = peftc.compile(backbone, method).train()
    model(**inputs)  # tracing packs too
    return saved_bytes(model, inputs)


@pytest.mark.sampled(40)
@pytest.mark.parametrize(("method", "family"), SAMPLE)
def test_predicted_is_counted(method: str, family: str) -> None:
    """Dropout and the loss included; by place, no place twice."""
    model = backbone(method, family)
    length = None if family == "vit" else LENGTH
    predicted = saved(meta(model), spec(method), ROWS, length)
    assert predicted.bytes == counted(model, spec(method), real(model))
    places = [(row.method, row.at, row.scope) for row in predicted.rows]
    assert len(set(places)) == len(places)
    assert sum(count * size for _, count, size in lines(predicted.rows)) == predicted.bytes


@pytest.mark.sampled(3)
@pytest.mark.parametrize(
    ("method", "family"), [("lora", "llama"), ("mam", "bart"), ("ia3", "bert")]
)
def test_in_half_the_bits(method: str, family: str) -> None:
    model = tiny(family).to(torch.bfloat16)
    predicted = saved(meta(model), spec(method), ROWS, LENGTH)
    assert predicted.dtype == "bfloat16"
    assert predicted.bytes == counted(model, spec(method), real(model))


@pytest.mark.sampled(12)
@pytest.mark.parametrize(("rows", "length"), [(1, 1), (1, 30), (4, 1), (5, 20)])
@pytest.mark.parametrize(
    ("method", "family"), [("lora", "llama"), ("mam", "bart"), ("dora", "gpt2")]
)
def test_at_other_sizes(method: str, family: str, rows: int, length: int) -> None:
    model = tiny(family)
    predicted = saved(meta(model), spec(method), rows, length)
    assert predicted.bytes == counted(model, spec(method), real(model, rows, length))


@pytest.mark.sampled(4)
@pytest.mark.parametrize("family", ["bert", "gpt2", "t5", "whisper"])
def test_more_is_never_less(family: str) -> None:
    model = meta(tiny(family))
    sizes = [(1, 2), (2, 2), (2, 7), (6, 7), (6, 30)]
    found = [saved(model, spec("houlsby_adapter"), *one).bytes for one in sizes]
    assert found == sorted(set(found))


def test_a_site_saves_what_its_formula_reads() -> None:
    """LoRA's delta needs x, which q and v share, and x @ down, of r numbers for each token."""
    found = saved(meta(tiny("bert")), spec("lora"), ROWS, LENGTH)
    float32, tokens, width, rank = 4, ROWS * LENGTH, 32, 4
    deltas = {(row.at, row.layer): row.bytes for row in found.rows if row.method == "lora"}
    assert deltas == {
        (f"attention.{part}", layer): float32 * tokens * (rank + (width if part == "q" else 0))
        for part in "qv"
        for layer in (0, 1)
    }


@pytest.mark.parametrize("family", ["bert", "gpt2", "llama"])
@pytest.mark.sampled(3)
def test_nothing_is_saved_below_the_lowest_delta(family: str) -> None:
    """No gradient flows there: it is for the last layer's delta and what stands above it that values are kept."""
    text = "name: last\ndeltas:\n  - at: attention.q\n    where: {layers: 1}\n    params: {p: {shape: [in, out], init: zeros}}\n    delta: x @ p\n"
    found = saved(tiny(family), parse_spec(text, "last.yaml"), 2, 7)
    every = saved(
        tiny(family), parse_spec(text.replace("    where: {layers: 1}\n", ""), "all.yaml"), 2, 7
    )
    assert {row.layer for row in found.rows} <= {1, None} and found.bytes < every.bytes
    assert 0 in {row.layer for row in every.rows}


def test_what_is_made_of_weights_alone_is_of_the_site_whose_weights_they_are() -> None:
    found = saved(meta(tiny("bert")), spec("diff_pruning"), ROWS, LENGTH)
    sites = {row.scope for row in found.rows if row.method}
    plan = peftc.plan(tiny("bert"), spec("diff_pruning"))
    assert sites == {edit.site.scope for edit in plan.edits}


def test_a_branch_that_leads_nowhere_counts_too() -> None:
    """As the hooks see it: what is packed on a branch that leads nowhere, each storage once."""
    graph, model = fx.Graph(), nn.Module()
    model.weight = nn.Parameter(torch.zeros(1000))
    weight = graph.placeholder("weight")
    for _ in range(8):
        graph.call_function(aten.gt.Scalar, (graph.call_function(aten.exp.default, (weight,)), 0))
    graph.output((graph.call_function(aten.exp.default, (weight,)),))
    fields = tree_structure({"last": 0})
    program = Program(
        "forward", graph, nn.Module(), {"weight": Slot("parameter", "weight")}, {}, fields
    )
    kept = packed(model, program, {})
    assert [one.size for one in kept] == [4000] * 9
    assert len({one.node for one in kept}) == 9


def test_a_model_with_weights_is_left_as_it_is() -> None:
    model = tiny("bert")
    model.classifier.bias.requires_grad_(False)
    flags = [one.requires_grad for one in model.parameters()]
    values = [one.clone() for one in model.parameters()]
    found = saved(model, ["lora", "head"], ROWS, LENGTH)
    assert found == saved(meta(model), ["lora", "head"], ROWS, LENGTH)
    assert [one.requires_grad for one in model.parameters()] == flags and not model.training
    assert all(map(torch.equal, model.parameters(), values))
    assert found.bytes == counted(model, ["lora", "head"], real(model))


LABELS = {
    "tokens": (BertForTokenClassification, {}, dict(labels=torch.ones(2, 9).long())),
    "one number": (
        BertForSequenceClassification,
        dict(num_labels=1),
        dict(labels=torch.ones(2)),
    ),
    "several of all": (
        BertForSequenceClassification,
        dict(problem_type="multi_label_classification"),
        dict(labels=torch.ones(2, 3)),
    ),
    "places": (
        BertForQuestionAnswering,
        dict(num_labels=2),
        dict(start_positions=torch.ones(2).long(), end_positions=torch.ones(2).long()),
    ),
}


@pytest.mark.parametrize("kind", LABELS)
@pytest.mark.sampled(2)
def test_labels_are_what_the_loss_reads(kind: str) -> None:
    cls, settings, labels = LABELS[kind]
    model = cls(BertConfig(**{**ENCODER, **settings})).eval()
    inputs = {k: v for k, v in real(model, 2, 9).items() if k != "labels"} | labels
    assert saved(meta(model), spec("lora"), 2, 9).bytes == counted(model, spec("lora"), inputs)


def test_labels_that_nobody_knows_are_given() -> None:
    model = BertForPreTraining(BertConfig(**ENCODER)).eval()
    with pytest.raises(StepError) as caught:
        saved(meta(model), spec("lora"), 2, 9)
    assert str(caught.value) == (
        "BertForPreTraining: nothing says what its 'labels' are like; pass example={...} with one batch"
    )
    ids = torch.ones(4, 5).long()
    example = dict(input_ids=ids, labels=ids, next_sentence_label=ids[:, 0])
    found = saved(meta(model), spec("lora"), 2, 9, example=example)
    ids = torch.ones(2, 9).long()
    inputs = dict(input_ids=ids, labels=ids.clone(), next_sentence_label=torch.ones(2).long())
    assert found.bytes == counted(model, spec("lora"), inputs)


SHIFTED = """
name: shifted
with: {l: 5}
deltas:
  - at: attention.heads
    positions: shift
    params:
      P_k: {shape: [kv_heads, l, head_dim], init: normal(0.02)}
      P_v: {shape: [kv_heads, l, head_dim], init: normal(0.02)}
    rewrite: {k: "prepend(P_k, k)", v: "prepend(P_v, v)"}
"""
WRONG: dict[str, tuple[Callable[[], Saved], type[Exception], str]] = {
    "no rows": (
        lambda: saved(tiny("bert"), "lora", 0, 5),
        StepError,
        "batch 0: a step reads rows; say 1 or more",
    ),
    "no tokens": (
        lambda: saved(tiny("bert"), "lora", 1, 0),
        StepError,
        "length 0: a row has tokens; say 1 or more",
    ),
    "no length": (
        lambda: saved(tiny("bert"), "lora", 1),
        StepError,
        "BertForSequenceClassification reads tokens: say how many a row has, as length",
    ),
    "a length of images": (
        lambda: saved(tiny("vit"), "lora", 1, 5),
        StepError,
        "length 5: ViTForImageClassification reads pixel_values of one size, no tokens; leave length out",
    ),
    "too long": (
        lambda: saved(tiny("gpt2"), "lora", 1, 65),
        StepError,
        "length 65: GPT2LMHeadModel has positions for 64 tokens; say 64 or less",
    ),
    "padding has positions": (
        lambda: saved(tiny("roberta"), "lora", 1, 65),
        StepError,
        "length 65: RobertaForSequenceClassification has positions for 64 tokens; say 64 or less",
    ),
    "a decoder's own": (
        lambda: saved(tiny("whisper"), "lora", 1, 31),
        StepError,
        "length 31: WhisperForConditionalGeneration has positions for 30 tokens; say 30 or less",
    ),
    "too long behind rows": (
        lambda: saved(tiny("gpt2"), spec("prompt_tuning"), 1, 60),
        StepError,
        "length 60: GPT2LMHeadModel has positions for 59 tokens behind the rows in front; say 59 or less",
    ),
    "too long behind a prefix that moves positions": (
        lambda: saved(tiny("gpt2"), parse_spec(SHIFTED), 1, 60),
        StepError,
        "length 60: GPT2LMHeadModel has positions for 59 tokens behind the rows in front; say 59 or less",
    ),
    "no place behind rows": (
        lambda: saved(tiny("gpt2"), "prompt_tuning", 1, 1),
        StepError,
        "length 1: GPT2LMHeadModel has positions for 0 tokens behind the rows in front; put fewer rows there",
    ),
    "no such device": (
        lambda: saved(tiny("bert"), "lora", 1, 5, device="cuda:99"),
        SavedError,
        "device 'cuda:99' cannot be used here; count for one that can, such as 'cpu'",
    ),
    "values decide": (
        lambda: saved(BartForSequenceClassification(BartConfig(**SEQ2SEQ)).eval(), "lora", 2, 5),
        SavedError,
        "BartForSequenceClassification: what it saves depends on the values of its inputs (aten.nonzero.default); "
        "count a real step with torch.autograd.graph.saved_tensors_hooks",
    ),
    "compiled": (
        lambda: saved(peftc.compile(tiny("bert"), "lora"), "lora", 1, 5),
        AttachError,
        "the model is compiled already; combine specs in a list: [spec, spec]",
    ),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.sampled(2)
def test_wrong_input(case: str) -> None:
    call, kind, message = WRONG[case]
    with pytest.raises(kind) as caught:
        call()
    assert str(caught.value) == message


def test_the_longest_step_runs() -> None:
    """The bound is the model's own: one token more has no position."""
    model = peftc.compile(tiny("roberta"), "lora").train()
    model(**real(model.backbone, 1, 64))
    with pytest.raises(RuntimeError, match="out of bounds"):
        model(**real(model.backbone, 1, 65))


def test_plan_prints_the_table(run: Run, folder: Path, golden: Callable[[str, str], None]) -> None:
    arguments = ("plan", "lora", "head", "--model", folder, "--batch", 64, "--length", 64)
    code, out, err = run(*arguments)
    table = out.partition("saved for backward")
    assert code == 0 and err.endswith("counting what a training step saves ...\n")
    golden("saved_lora.txt", table[1] + table[2])
    assert max(map(len, out.splitlines())) <= 80


def test_plan_gives_numbers(run: Run, folder: Path) -> None:
    code, out, _ = run("plan", "lora", "--model", folder, "--batch", 3, "--length", 11, "--json")
    found = json.loads(out)["saved"]
    assert code == 0
    assert {k: v for k, v in found.items() if k not in ("rows", "bytes")} == {
        "batch": 3,
        "length": 11,
        "device": "cpu",
        "dtype": "float32",
    }
    model = tiny("bert")
    assert found["bytes"] == counted(model, "lora", real(model))
    assert sum(row["bytes"] for row in found["rows"]) == found["bytes"]
    plain = json.loads(run("plan", "lora", "--model", folder, "--json")[1])
    assert "saved" not in plain and plain.items() <= json.loads(out).items()


REFUSED = {
    "length alone": (
        ("lora", "--length", 5),
        "--length is of the rows of a batch: say --batch too",
    ),
    "no spec": (
        ("--sites", "--batch", 5),
        "--batch counts what one step with a spec saves: name a spec, no --budget",
    ),
    "a budget": (
        ("lora", "--budget", "1%", "--batch", 5),
        "--batch counts what one step with a spec saves: name a spec, no --budget",
    ),
    "too long": (
        ("lora", "--batch", 5, "--length", 67),
        "length 67: BertForSequenceClassification has positions for 66 tokens; say 66 or less",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_plan_refuses(run: Run, folder: Path, case: str) -> None:
    arguments, message = REFUSED[case]
    code, out, err = run("plan", *arguments, "--model", folder)
    assert (code, out) == (1, "")
    assert err.splitlines()[-1] == f"error: {message}"
