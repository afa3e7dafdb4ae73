"""A stored spec is a spec: written in the language, read by its one reader, of this format and the one before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny
from safetensors.torch import load_file
from transformers import PreTrainedModel

import peftc
from peftc.language import resolved
from peftc.language.reader import load_spec, parse_spec
from peftc.language.shelf import directory, shipped
from peftc.language.spec import Spec, combine, with_words
from peftc.store.deltas import spec_of
from peftc.store.directory import FORMAT, DeltaError, read_manifest

OLD = Path(__file__).parent / "data" / "format1"
SMALL = dict(
    vocab_size=24,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=16,
    max_position_embeddings=24,
)


def again(spec: Spec) -> Spec:
    return resolved.read(json.loads(json.dumps(resolved.write(spec))))


def exactly(spec: Spec) -> str:
    """4 and 4.0 are equal, and not the same argument."""
    return repr([spec.arguments, *(entry.arguments for entry in spec.entries)])


USES = """
# Two of one method, narrowed, and what trains
with: {r: 2, s: 0.5}
deltas:
  - {use: lora, with: {r: 2 * r, alpha: 7}, where: {layers: 0-1, stack: encoder}}
  - {use: mam, with: {l: 3, s: s}}
  - {use: prefix_words, with: {l: r}}
  - {train: [bias], where: {scope: "*.layer.0.*"}}
  - {at: [norm, {op: linear, scope: "*.pooler.*"}], train: [weight], expect: 3}
"""


def test_every_spec_is_written_and_read_back() -> None:
    specs = [load_spec(name) for name in shipped()]
    specs += [load_spec(path) for path in sorted((directory() / "paper").glob("*.yaml"))]
    assert len(specs) == 34 + 33
    specs += [
        combine(specs),
        combine([load_spec("lora"), load_spec("lora", r=2), load_spec("head")]),
    ]
    specs += [parse_spec(USES, "uses"), with_words(load_spec("prefix_words"), (7, 8))]
    specs += [load_spec("lora", r=4, alpha=1e-7), load_spec("mam", s=4), load_spec("mam", s=-0.5)]
    for spec in specs:
        assert again(spec) == spec, spec.name
        assert exactly(again(spec)) == exactly(spec)
        assert resolved.digest(again(spec)) == resolved.digest(spec)


def test_what_waits_for_a_budget_still_does() -> None:
    waiting = parse_spec(
        "budget: 5%\n" + load_spec("lora").text.replace("{r: 8,", "{r: auto,"), "b"
    )
    assert again(waiting) == waiting and waiting.auto == "r"


def test_a_delta_stays_one_delta() -> None:
    """The elements of a list of sites are one delta; those of two specs are not."""
    both = combine([load_spec("compacter"), load_spec("compacter"), load_spec("houlsby_adapter")])
    assert [entry.group for entry in both.entries] == [0, 0, 1, 1, 2, 3]
    assert [len(resolved.write(both)["deltas"][i]["at"]) for i in (0, 1)] == [2, 2]
    assert [one["at"] for one in resolved.write(both)["deltas"][2:]] == ["attention", "ffn"]


def test_arguments_of_a_combination() -> None:
    both = combine([load_spec("lora"), load_spec("mam", r=8), load_spec("lora", r=2)])
    assert both.arguments == {
        "lora_r": 8,
        "alpha": 16,
        "l": 30,
        "m": 800,
        "mam_r": 8,
        "s": 4.0,
        "lora_r_2": 2,
    }


def test_what_is_written_can_be_a_file() -> None:
    """JSON is YAML: what is stored is a spec that anyone may copy out."""
    for name in ("lora", "prefix_tuning", "diff_pruning", "bitfit_subset"):
        assert parse_spec(json.dumps(resolved.write(load_spec(name)), indent=2), name) == load_spec(
            name
        )


def test_what_is_loaded_is_checked(tmp_path: Path) -> None:
    peftc.compile(tiny("bert"), "lora").save_pretrained(tmp_path / "d")
    manifest = read_manifest(tmp_path / "d")
    assert manifest["format"] == FORMAT == 2
    assert spec_of(manifest, tmp_path) == load_spec("lora")

    def refusal(change: Any) -> str:
        broken = json.loads(json.dumps(manifest))
        change(broken["spec"])
        with pytest.raises(DeltaError) as error:
            spec_of(broken, tmp_path)
        return str(error.value)

    assert "unknown key 'titel'" in refusal(lambda spec: spec.update(titel=""))
    assert "unknown name 'up'" in refusal(lambda spec: spec["deltas"][0]["params"].pop("up"))
    assert "'at' is missing" in refusal(lambda spec: spec["deltas"][0].pop("at"))
    assert "'deltas' must be a list" in refusal(lambda spec: spec.update(deltas=3))
    deep: list[object] = []
    for _ in range(200):
        deep = [deep]
    assert "nested deeper" in refusal(lambda spec: spec.update(name=deep))
    manifest["spec"] = "lora"
    with pytest.raises(DeltaError, match="a spec must be a mapping"):
        spec_of(manifest, tmp_path)


@pytest.mark.parametrize("number", [0, 3, "2", None])
def test_other_formats_are_refused(number: object, tmp_path: Path) -> None:
    (tmp_path / "peftc.json").write_text(json.dumps({"format": number}))
    with pytest.raises(DeltaError, match=f"has format {number}; this peftc reads format 1 and 2"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("number", [1, FORMAT])
def test_bundles_of_both_formats_are_read(number: int, tmp_path: Path) -> None:
    (tmp_path / "peftc.json").write_text(json.dumps({"format": number, "graphs": {}, "kind": "x"}))
    assert read_manifest(tmp_path, ("graphs", "kind"))["format"] == number


def exact(model: PreTrainedModel) -> PreTrainedModel:
    """Weights that do not depend on a random generator: sixty-fourths from -15 to 15."""
    with torch.no_grad():
        for i, (_, weight) in enumerate(sorted(model.named_parameters())):
            n = torch.arange(weight.numel())
            weight.copy_((((n * 7 + i) % 31 - 15) / 64).view_as(weight))
    return model.eval()


@pytest.mark.parametrize("name", sorted(path.name for path in OLD.iterdir()))
def test_deltas_of_format_1_load(name: str, tmp_path: Path) -> None:
    """Written at 5c56a63; the tensors stand where they stood and mean what they meant."""
    family = name.partition("-")[0]
    sizes = {**SMALL, **({"num_key_value_heads": 1} if family == "llama" else {})}
    model = peftc.load(OLD / name, exact(tiny(family, **sizes)))
    ids = torch.arange(4, 4 + 2 * 7).view(2, 7)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, ..., :8]
    want = load_file(OLD / name / "expected.safetensors")["logits"]
    torch.testing.assert_close(logits, want, rtol=1e-4, atol=1e-4)  # float32, another machine
    assert again(model.plan.spec) == model.plan.spec
    model.save_pretrained(tmp_path / "new", stored=name == "llama-mam")
    assert read_manifest(tmp_path / "new")["format"] == FORMAT
    old, new = (load_file(one / "model.safetensors") for one in (OLD / name, tmp_path / "new"))
    assert old.keys() == new.keys() and all(torch.equal(old[key], new[key]) for key in old)
