"""Plans: exact counts on published sizes, sites without names, and what is wrong said before anything changes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
import transformers
from conftest import batch, logits, stir, tiny
from safetensors.torch import load_file, save_file

import peftc
from peftc.errors import PeftcError
from peftc.language import resolved
from peftc.language.expr import parse
from peftc.language.reader import parse_spec
from peftc.language.spec import Spec
from peftc.model import backbones


@cache
def bart_large() -> transformers.PreTrainedModel:
    return backbones.resolve("facebook/bart-large", random_weights=True, meta=True)


@pytest.mark.xdist_group("bart-large")
def test_bart_large_structure() -> None:
    plan = peftc.plan(bart_large(), "mam")
    assert plan.site_counts == {"attention": 36, "ffn": 24}
    assert plan.parameters.backbone == 406_291_456
    assert all(weight.is_meta for weight in bart_large().parameters())
    kinds = [e.site.group for e in plan.edits if e.site.at == "attention.heads"]
    assert {k: kinds.count(k) for k in set(kinds)} == {
        "encoder_self": 12,
        "decoder_self": 12,
        "decoder_cross": 12,
    }
    lora = peftc.plan(bart_large(), "lora")
    assert [match.sites for match in lora.matches] == [36, 36] and not lora.misses


def bad(text: str, family: str = "bart") -> str:
    with pytest.raises(PeftcError) as error:
        peftc.compile(tiny(family), parse_spec(text, "s.yaml"))
    return str(error.value)


def test_what_does_not_fit_is_said() -> None:
    adapter = "deltas: [{at: ffn, where: {layers: 7}, delta: h}]"
    assert bad(adapter) == (
        "s.yaml:1:10: 'ffn' of s matches no site of this model; without `where` it has 4: "
        "stack: decoder | stack: encoder; layers 0-1"
    )
    assert bad("deltas: [{at: ffn, delta: h, expect: 3}]") == (
        "s.yaml:1:10: 'ffn' of s matches 4 sites, expect: 3"
    )
    assert "matches no site of this model" in bad("deltas: [{at: ffn.gate, delta: h}]")
    assert "no parameter's name ends so" in bad("deltas: [{train: [biass]}]")
    wrong = (
        "deltas: [{at: ffn, params: {a: {shape: [out, d], init: zeros}, b: {shape: [heads, in], init: zeros}},"
        " delta: h @ a}]"
    )
    assert "unknown size 'heads'" in bad_spec(wrong)
    square = "deltas: [{at: ffn.up, params: {a: {shape: [in, d], init: zeros}}, delta: x @ a}]"
    assert "'h + x @ a': [..., 64] and [..., 32] differ: '64' is not '32'" in bad(square)


HEADS = "deltas: [{at: attention.heads, params: {P: {shape: [heads, 2, head_dim], init: zeros}}, rewrite: {%s}}]"
# Specs that read well, and what the numbers of a model say of them at its first site.
UNFIT = {
    "deltas: [{at: ffn.up, rewrite: {h: x}}]": "'h' is [..., 64] but is assigned [..., 32]",
    "deltas: [{at: ffn.up, params: {a: {shape: [in, out], init: W}}, delta: x @ a}]": "'a' is [32, 64] but starts as [64, 32]",
    "deltas: [{at: ffn.up, params: {a: {shape: [in / 3, out], init: zeros}}, delta: x @ a}]": "'a' has a size of 10.666666666666666 (in / 3)",
    HEADS
    % 'q: "prepend(P, q)"': "'q' of attention.heads is prepended to; rows go in front of k, v",
    HEADS % 'k: "prepend(P, k)"': "k gets 2 rows and v 0; put as many in front of both",
    "deltas: [{at: ffn, params: {P: {shape: [1, d], init: zeros}, Q: {shape: [2, 3, d], init: zeros}},"
    " delta: 'h * sum(sum(sum(prepend(P, Q))))'}]": "'h' of ffn is prepended to; this site has no rows",
}


@pytest.mark.parametrize("text", UNFIT, ids=range(len(UNFIT)))
def test_what_the_numbers_of_a_model_say(text: str) -> None:
    at = text.partition("at: ")[2].partition(",")[0]
    first = "model.encoder.layers.0" + ".self_attn" * (at == "attention.heads")
    assert bad(text) == f"s.yaml:1:10: at {first}:{at}: {UNFIT[text]}"


def test_a_spec_that_was_made_in_python_is_checked_too() -> None:
    made = parse_spec("deltas: [{at: ffn, delta: h}]", "s.yaml")
    entry = replace(made.entries[0], assign=(("h", parse("h + residul")),))
    with pytest.raises(PeftcError) as error:
        peftc.plan(tiny("bart"), replace(made, entries=(entry,)))
    fact = "unknown name 'residul'"
    assert str(error.value) == f"s.yaml:1:10: at model.encoder.layers.0:ffn: {fact}"


def test_positions_that_a_model_is_not_told_cannot_move() -> None:
    text = HEADS % 'k: "prepend(P, k)", v: "prepend(P, v)"'
    assert bad(text.replace("params", "positions: shift, params")) == (
        "BartForConditionalGeneration takes no position_ids, so 'positions: shift' moves nothing; "
        "leave it out, or use a decoder that takes them"
    )


def test_no_spec_is_none() -> None:
    with pytest.raises(PeftcError, match=r"^no spec is given; give one, such as 'lora'$"):
        peftc.plan(tiny("bart"), [])


def bad_spec(text: str) -> str:
    with pytest.raises(PeftcError) as error:
        parse_spec(text, "s.yaml")
    return str(error.value)


def test_the_escape_hatch_finds_linears_by_scope() -> None:
    text = (
        "deltas: [{at: {op: linear, scope: '*.fc1'}, expect: 4, params: {a: {shape: [in, out], init: zeros}},"
        " delta: x @ a}]"
    )
    model = peftc.compile(tiny("bart"), parse_spec(text, "s.yaml"))
    assert model.plan.site_counts == {"linear": 4}
    base = tiny("bart")
    assert torch.equal(
        logits(model, batch(model)), logits(peftc.compile(base, "bitfit"), batch(base))
    )


def test_where_narrows() -> None:
    text = "deltas: [{use: prefix_tuning, with: {l: 2, m: 3}, where: {stack: decoder, kind: self}}]"
    plan = peftc.plan(tiny("bart"), parse_spec(text, "s.yaml"))
    assert [e.site.group for e in plan.edits] == ["decoder_self"] * 2


def test_two_of_the_same_method_do_not_share_weights() -> None:
    model = stir(
        peftc.compile(tiny("bert"), [peftc.load_spec("lora", r=2), peftc.load_spec("lora", r=3)])
    )
    assert model.plan.parameters.training == 2 * 2 * (2 + 3) * 64
    _, report = peftc.merge(model)
    assert len(report.folded) == 8 and report.error < 1e-5


def test_deltas_are_refused_where_they_do_not_belong(tmp_path: Path) -> None:
    model = stir(peftc.compile(tiny("bert"), "lora"))
    here = tmp_path / "d"
    model.save_pretrained(here)

    def refusal(**kwargs: object) -> str:
        with pytest.raises(PeftcError) as error:
            peftc.load(here, **kwargs)
        return str(error.value)

    assert "its weights differ" in refusal(backbone=tiny("bert", seed=1))
    assert "its parameters differ" in refusal(backbone=tiny("bert", vocab_size=130))
    assert "name no backbone" in refusal()
    file = here / "model.safetensors"
    tensors = {k: v.clone() for k, v in load_file(file).items()}  # the file is mapped, and changes
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    assert "is damaged" in refusal(backbone=tiny("bert"))
    manifest = json.loads((here / "peftc.json").read_text())
    del manifest["files"]  # as it was written before there were digests
    (here / "peftc.json").write_text(json.dumps(manifest))
    name = next(iter(tensors))
    save_file({k: v for k, v in tensors.items() if k != name}, file)
    assert f"lacks '{name}' (1 missing, 0 unknown)" in refusal(backbone=tiny("bert"))
    save_file({**tensors, name: tensors[name][:1].clone()}, file)
    assert "has the shape" in refusal(backbone=tiny("bert"))
    (here / "peftc.json").write_text("{")
    assert "is damaged" in refusal(backbone=tiny("bert"))
    (here / "peftc.json").write_text(json.dumps({"format": 99}))
    assert "format 99" in refusal(backbone=tiny("bert"))
    (here / "peftc.json").unlink()
    assert "holds no peftc.json" in refusal(backbone=tiny("bert"))


def test_saving_leaves_foreign_files_alone(tmp_path: Path) -> None:
    model = peftc.compile(tiny("bert"), "lora")
    (tmp_path / "model.safetensors").write_bytes(b"someone's")
    with pytest.raises(PeftcError, match="did not write"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"someone's"
    assert [one.name for one in tmp_path.iterdir()] == ["model.safetensors"]
    with pytest.raises(PeftcError, match="is a file"):
        model.save_pretrained(tmp_path / "model.safetensors")


def test_compiling_twice_is_refused() -> None:
    with pytest.raises(PeftcError, match="compiled already"):
        peftc.compile(peftc.compile(tiny("bert"), "lora"), "bitfit")


SHARED = """
deltas:
  - at: [attention, ffn]
    params:
      core: {shape: [2, 2], init: normal, per: model}
      down: {shape: [d, 2], init: normal}
      up: {shape: [2, d], init: normal}
    delta: h @ down @ core @ up
"""


def cores(*specs: Spec) -> list[str]:
    plan = peftc.plan(tiny("bert"), [*specs])
    assert len(plan.matches) == 2 * len(specs)
    return sorted({p.path for edit in plan.edits for p in edit.parameters if p.name == "core"})


def test_what_a_delta_shares_is_one_tensor() -> None:
    """`per: model` over a list of sites is of all of them; two deltas, or two specs, share nothing."""
    one = parse_spec(SHARED, "one")
    assert cores(one) == ["shared.model.one.core"]
    assert cores(one, one) == ["shared.model.one.core", "shared.model.one_2.core"]
    assert cores(resolved.read(resolved.write(one))) == cores(one)
    apart = replace(one, entries=tuple(replace(e, group=i) for i, e in enumerate(one.entries)))
    assert cores(apart) == ["shared.model.one.core", "shared.model.one_1.core"]
    model = stir(peftc.compile(tiny("bert"), one))
    model(**batch(model)).logits.sum().backward()
    core = model.deltas.get_parameter("shared.model.one.core")
    assert core.grad is not None and core.grad.abs().max() > 0
    kinds = parse_spec(SHARED.replace("model", "kind"), "one")
    assert cores(kinds) == ["shared.encoder.one.core", "shared.encoder_self.one.core"]


def test_what_is_shared_has_one_shape() -> None:
    shapes = SHARED.replace("[attention, ffn]", "[ffn.up, ffn.down]").replace("[2, 2]", "[in, 2]")
    text = shapes.replace("h @ down @ core @ up", "sum(sum(core)) * h")
    text = re.sub(r"      (down|up): .*\n", "", text)
    with pytest.raises(
        PeftcError, match=r"'core' is shared by sites of different shapes: \[32, 2\] and \[64, 2\]"
    ):
        peftc.plan(tiny("bert"), parse_spec(text, "s"))


def test_a_delta_is_once_at_a_site() -> None:
    text = (
        "deltas:\n  - at: [{op: linear, scope: '*.query'}, {op: linear, scope: '*.layer.0.*'}]\n"
        "    rewrite: {h: 2 * h}\n"
    )
    with pytest.raises(PeftcError) as error:
        peftc.plan(tiny("bert"), parse_spec(text, "s.yaml"))
    fact = "bert.encoder.layer.0.attention.self.query:linear is named twice by one delta"
    assert str(error.value) == f"s.yaml:2:5: {fact}; let its sites not overlap"


@pytest.mark.xdist_group("bart-large")
def test_compacter_shares_its_rules_over_all_adapters() -> None:
    """FACTS: 48 adapters of 3,168 and one rule of 4 ** 3 at BART-large's self-attentions and feed-forwards."""
    plan = peftc.plan(bart_large(), peftc.load_spec("compacter", r=32))
    assert plan.parameters.training == 60 * 3168 + 64
    published = {
        p.path: p.numel for e in plan.edits if e.site.kind != "cross" for p in e.parameters
    }
    assert sum(published.values()) == 152_128
