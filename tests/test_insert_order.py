"""What an edit sees: the ports as they were before it, and what came before it in the spec."""

from __future__ import annotations

import torch
from conftest import batch, logits, stir, tiny
from torch.nn.utils import parametrizations

import peftc
from peftc.language.reader import parse_spec


def delta(text: str) -> peftc.Spec:
    return parse_spec(f"name: one\ndeltas:\n{text}")


SWAP = delta("  - at: attention.heads\n    rewrite: {k: v, v: k}\n")


def test_expressions_of_one_entry_read_what_was_there() -> None:
    """Keys and values change places; one after the other, both would be the values."""
    backbone = tiny("bert")
    model, inputs = peftc.compile(backbone, SWAP), batch(backbone)
    got = logits(model, inputs)
    peftc.detach(model)
    for layer in backbone.bert.encoder.layer:
        own = layer.attention.self
        own.key, own.value = own.value, own.key
    torch.testing.assert_close(got, logits(backbone, inputs))


def test_a_computed_weight_is_missed_with_its_op() -> None:
    backbone = tiny("bert")
    parametrizations.weight_norm(backbone.bert.encoder.layer[0].attention.self.query)
    plan = peftc.plan(backbone, "lora")
    assert len(plan.edits) == 3
    (miss,) = plan.misses
    assert miss.site == "bert.encoder.layer.0.attention.self.query"
    assert "'_weight_norm" in miss.reason and "computes this weight" in miss.reason


def test_edits_of_the_input_weight_and_result_act_where_values_flow() -> None:
    backbone = tiny("bert")
    query = backbone.bert.encoder.layer[0].attention.self.query
    model = stir(
        peftc.compile(
            backbone,
            [
                delta("""
  - at: attention.q
    where: {layers: 0}
    params: {a: {shape: [in, 2], init: zeros}, c: {shape: [2, out], init: zeros}}
    delta: x @ a @ c
"""),
                delta("""
  - at: attention.q
    where: {layers: 0}
    params: {s: {shape: [in], init: ones}}
    rewrite: {x: x * s, W: 2 * W}
"""),
            ],
        )
    )
    inputs = batch(backbone)
    got = logits(model, inputs)
    values = model.deltas.values()
    a, c, s = (next(v for k, v in values.items() if k.endswith(f".{n}")) for n in "acs")
    merged, report = peftc.merge(model)
    assert not report.kept
    torch.testing.assert_close(logits(merged, inputs), got)
    peftc.detach(model)
    # The first delta reads x as it was at its turn: before the scale.
    query.forward = lambda x: (x * s) @ (2 * query.weight).T + query.bias + x @ a @ c
    torch.testing.assert_close(logits(backbone, inputs), got)
