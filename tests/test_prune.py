"""Pruning to an exact number, the mask that stays, and sparse tensors on disk: exact to the bit."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Run, batch, logits, saved, stir, tiny
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import BertTokenizer, PreTrainedModel, Trainer, TrainingArguments

import peftc
from peftc.errors import PeftcError
from peftc.language.reader import parse_spec
from peftc.plan.algebra import constant_form
from peftc.prune import largest
from peftc.store import sparse

Tensors = dict[str, torch.Tensor]
Damage = Callable[[Tensors], object]
FAMILIES = ("bert", "gpt2", "t5", "llama")


def differing(family: str, *more: str) -> PreTrainedModel:
    """Diff pruning as after some training: differences of all sizes, gates open, shut and between."""
    model = peftc.compile(tiny(family), ["diff_pruning", *more])
    torch.manual_seed(4)
    with torch.no_grad():
        for name, value in model.deltas.values().items():
            part = name.rpartition(".")[2]
            start, scale = {"w": (0.0, 0.1), "alpha": (0.3, 1.5), "group": (1.0, 0.2)}[part]
            value.copy_(torch.randn_like(value) * scale + start)
        for one in model.plan.unfrozen:
            model.get_parameter(one.path).add_(0.1)
    return model


def by_hand(model: PreTrainedModel) -> Tensors:
    """z_group * z * w of each linear by its path, in float64, from the paper's equations (gates at u = 1/2)."""
    values, found = model.deltas.values(), {}
    for edit in model.plan.edits:
        w, alpha, group = (values[p.path].double() for p in edit.parameters)
        z, z_group = ((torch.sigmoid(one) * 3 - 1.5).clamp(0, 1) for one in (alpha, group))
        delta = z_group * z * w
        weight = edit.site.weights["W"]
        stored = model.get_parameter(weight.path).double()
        found[weight.path] = weight.write(stored, delta)
    return found


def projected(differences: Tensors, count: int) -> Tensors:
    """The largest `count`, by sorting all of them."""
    flat = torch.cat([one.reshape(-1) for one in differences.values()])
    kept = torch.zeros_like(flat)
    chosen = flat.abs().argsort(descending=True)[:count]
    kept[chosen] = flat[chosen]
    parts = kept.split([one.numel() for one in differences.values()])
    return {k: part.reshape(v.shape) for (k, v), part in zip(differences.items(), parts)}


@pytest.mark.parametrize("family", FAMILIES)
def test_pruned_is_the_backbone_with_the_largest_differences(family: str) -> None:
    model = differing(family)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    pruned, report = peftc.prune(model, "1%")
    backbone, inputs = tiny(family), batch(tiny(family))
    count = sum(one.numel() for one in backbone.parameters()) // 100
    masks = {k: v for k, v in pruned.deltas.values().items() if k.endswith(".mask")}
    kept = [v for k, v in pruned.deltas.values().items() if k.endswith(".w")]
    assert report.kept == count == sum(int(one.sum()) for one in masks.values())
    assert count == sum(int(one.count_nonzero()) for one in kept)
    assert all(set(one.unique().tolist()) <= {0, 1} for one in masks.values())
    differences = by_hand(model)
    assert report.changed == sum(int((one != 0).sum()) for one in differences.values()) > count
    with torch.no_grad():
        for path, delta in projected(differences, count).items():
            backbone.get_parameter(path).add_(delta.float())
    want = logits(backbone, inputs)
    assert (logits(pruned, inputs) - want).abs().max() <= 1e-5 * want.abs().max()
    merged, folded = peftc.merge(pruned)
    assert not folded.kept and folded.error <= 1e-5
    for path, weight in backbone.named_parameters():
        assert torch.allclose(merged.get_parameter(path), weight, rtol=0, atol=1e-7), path
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_of_equal_ones_the_first_stay() -> None:
    tensors = {"a": torch.tensor([[1.0, -2.0], [2.0, 0.0]]), "b": torch.tensor([2.0, -2.0, 3.0])}
    kept = {n: [v.tolist() for v in largest(tensors, n).values()] for n in (1, 3, 6)}
    assert kept[1] == [[[False, False], [False, False]], [False, False, True]]
    assert kept[3] == [[[False, True], [True, False]], [False, False, True]]
    assert kept[6] == [[[True, True], [True, False]], [True, True, True]]
    half = {"a": torch.tensor([1.0, 4.0], dtype=torch.bfloat16)}
    assert largest(half, 1)["a"].tolist() == [False, True]


def test_a_head_that_trains_is_not_cut() -> None:
    model = differing("bert", "head")
    pruned, report = peftc.prune(model, 100)
    whole = by_hand(model)["classifier.weight"]
    want = model.get_parameter("classifier.weight").detach() + whole.float()
    assert torch.allclose(pruned.get_parameter("classifier.weight"), want, rtol=0, atol=1e-7)
    assert torch.equal(
        pruned.get_parameter("classifier.bias"), model.get_parameter("classifier.bias")
    )
    assert [one.path for one in pruned.plan.unfrozen] == ["classifier.weight", "classifier.bias"]
    assert report.kept == 100 and "classifier" not in {
        edit.site.scope for edit in pruned.plan.edits
    }
    lone, _ = peftc.prune(stir(peftc.compile(tiny("bert"), ["lora", "head"])), 10)
    assert torch.equal(lone.get_parameter("classifier.weight"), tiny("bert").classifier.weight)


EVERYWHERE = """
name: everywhere
deltas:
  - {at: norm, params: {s: {shape: [out], init: normal}, t: {shape: [out], init: normal}}, rewrite: {W: W + s, b: b + t}}
  - {at: embedding, params: {e: {shape: [vocab, out], init: normal}}, rewrite: {W: W + e}}
  - {at: {op: linear, scope: "*"}, params: {c: {shape: [out], init: normal}}, rewrite: {b: b + c}}
  - {at: ffn.up, params: {m: {shape: [out, 1], init: ones}}, rewrite: {W: W * (1 + 0.01 * m)}}
"""


def test_every_kind_of_weight(tmp_path: Path) -> None:
    torch.manual_seed(5)
    model = peftc.compile(tiny("gpt2", tie_word_embeddings=False), parse_spec(EVERYWHERE))
    full, report = peftc.prune(model, peftc.prune(model, 1)[1].changed)
    inputs = batch(model)
    assert report.moved <= 1e-5 * report.scale  # nothing was left out
    assert {(e.site.at, e.entry.assign[0][0]) for e in full.plan.edits} == {
        ("norm", "W"),
        ("norm", "b"),
        ("embedding", "W"),
        ("linear", "W"),
        ("linear", "b"),
    }
    full.save_pretrained(tmp_path)
    again = peftc.load(tmp_path, tiny("gpt2", tie_word_embeddings=False))
    assert torch.equal(logits(again, inputs), logits(full, inputs))
    assert not again.plan.misses


def step(model: PreTrainedModel) -> Tensors:
    """What one step of AdamW, with weight decay, moves by how much."""
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    model.train()
    free = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(free, 1e-2, weight_decay=0.1)
    model(**batch(model)).logits.square().mean().backward()
    optimizer.step()
    model.eval()
    return {n: p.detach() - before[n] for n, p in model.named_parameters()}


@pytest.mark.parametrize("stored", [False, True])
def test_the_mask_stays_while_training_goes_on(stored: bool, tmp_path: Path) -> None:
    pruned, report = peftc.prune(differing("bert"), "1%")
    assert all(constant_form(edit) is edit for edit in pruned.plan.edits)
    pruned.save_pretrained(tmp_path, stored=stored)
    model = peftc.load(tmp_path, tiny("bert"))
    masks = {k: v.clone() for k, v in model.deltas.values().items() if k.endswith(".mask")}
    moved = step(model)
    for name, mask in masks.items():
        assert torch.equal(model.deltas.values()[name], mask)
        w = moved.pop(f"deltas.{name.removesuffix('.mask')}.w")
        assert torch.equal(w != 0, mask != 0)
    assert all(one.abs().max() == 0 for one in moved.values())
    again, second = peftc.prune(model, report.kept)
    assert second.kept == second.changed == report.kept
    assert torch.equal(logits(again, batch(model)), logits(model, batch(model)))


def test_a_trainer_resumes_from_sparse_checkpoints(tmp_path: Path) -> None:
    """Four steps equal two steps, a checkpoint, a new process's model, and two more."""
    peftc.prune(differing("bert", "head"), "1%")[0].save_pretrained(tmp_path / "pruned")
    torch.manual_seed(6)
    ids = torch.randint(4, 120, (16, 5)).tolist()
    rows = [{"input_ids": one, "labels": i % 3} for i, one in enumerate(ids)]

    def trainer(out: Path) -> Trainer:
        model = peftc.load(tmp_path / "pruned", tiny("bert", hidden_dropout_prob=0.0))
        args = TrainingArguments(
            output_dir=str(out),
            per_device_train_batch_size=4,
            max_steps=4,
            save_steps=2,
            report_to=[],
            learning_rate=1e-2,
            disable_tqdm=True,
            logging_strategy="no",
            seed=5,
        )
        return Trainer(model=model, args=args, train_dataset=rows)

    whole, resumed = trainer(tmp_path / "a"), trainer(tmp_path / "b")
    start = copy.deepcopy(resumed.model.deltas.values())
    whole.train()
    checkpoint = tmp_path / "a" / "checkpoint-2"
    parts = load_file(checkpoint / "model.safetensors").keys()
    assert any(name.endswith(".w.positions") for name in parts)
    assert (checkpoint / "model.safetensors").stat().st_size < 50_000
    resumed.train(resume_from_checkpoint=str(checkpoint))
    got = resumed.model.deltas.values()
    assert any(not torch.equal(start[name], got[name]) for name in got)
    for name, value in whole.model.deltas.values().items():
        assert torch.allclose(value, got[name], atol=1e-6), name
    with pytest.raises(PeftcError, match=r"query.*w\.values' is missing"):
        state = load_file(checkpoint / "model.safetensors")
        gone = next(
            name for name in state if name.endswith("query.linear.sparse_difference.w.values")
        )
        resumed.model.load_state_dict({k: v for k, v in state.items() if k != gone}, False)


def zeros_but(numbers: dict[int, float], dtype: torch.dtype = torch.float32) -> torch.Tensor:
    flat = torch.zeros(4000, dtype=dtype)
    flat[list(numbers)] = torch.tensor(list(numbers.values()), dtype=dtype)
    return flat.reshape(50, 80)


# Tensors, and how many values are stored of each: one for all where they are equal.
SPARSE = {
    "some": (zeros_but({3: 1.0, 77: -2.5, 3999: 1e-45}), 3),
    "none": (zeros_but({}), 0),
    "one": (zeros_but({0: 2.0}), 1),
    "a mask": (zeros_but({1: 1.0, 2: 1.0, 3: 1.0}), 1),
    "minus zero and nan": (zeros_but({5: -0.0, 6: float("nan"), 7: float("-inf")}), 3),
    "minus zeros": (zeros_but({5: -0.0, 6: -0.0}), 1),
    "half": (zeros_but({8: 1.0, 9: 3.0}, torch.float16), 2),
    "bfloat16": (zeros_but({8: 1.0, 9: 3.0}, torch.bfloat16), 2),
    "double": (zeros_but({8: 1.0, 9: 1 / 3}, torch.float64), 2),
    "turned": (zeros_but({8: 1.0, 85: 3.0}).T, 2),
}
DENSE = {
    "full": torch.ones(50, 80) * torch.arange(1, 81),
    "small": torch.zeros(3),
    "a number": torch.tensor(0.0),
    "empty": torch.zeros(0, 7),
    "integers": torch.zeros(50, 80, dtype=torch.int64),
    "3 of 4": (torch.arange(4000) % 4).float().reshape(50, 80),
}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_packed_comes_back_to_the_bit(name: str, tmp_path: Path) -> None:
    tensor, values = SPARSE[name]
    save_file(sparse.packed({"x": tensor}), tmp_path / "x")
    stored = load_file(tmp_path / "x")
    assert (
        set(stored) == {"x.positions", "x.values", "x.shape"} and len(stored["x.values"]) == values
    )
    again = sparse.unpacked(stored, {"x": tuple(tensor.shape)})["x"]
    assert again.dtype == tensor.dtype and again.shape == tensor.shape
    assert bits(again) == bits(tensor)


@pytest.mark.parametrize("name", DENSE)
def test_what_would_not_be_smaller_stays_as_it_is(name: str) -> None:
    packed = sparse.packed({"x": DENSE[name]})
    assert set(packed) == {"x"} and packed["x"] is DENSE[name]


def test_a_pruned_model_is_as_small_as_what_it_keeps(tmp_path: Path) -> None:
    pruned, report = peftc.prune(differing("bert"), "1%")
    pruned.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    edits = len(pruned.plan.edits)
    assert size < 12 * report.kept + 1024 * edits  # two positions and a value; names
    again = peftc.load(tmp_path, tiny("bert"))
    for name, value in pruned.deltas.values().items():
        assert torch.equal(again.deltas.values()[name], value), name


W = "deltas.bert.encoder.layer.0.intermediate.dense.linear.sparse_difference.w"


def changed(part: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    def damage(tensors: Tensors) -> None:
        tensors[f"{W}.{part}"] = change(tensors[f"{W}.{part}"]).contiguous()

    return damage


def put(at: int, number: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda one: one.index_fill(0, torch.tensor([at]), number)


BROKEN: dict[str, tuple[Damage, str]] = {
    "no values": (
        lambda one: one.pop(f"{W}.values"),
        f" lacks '{W}.values' (1 missing, 0 unknown)",
    ),
    "no parts": (
        lambda one: [one.pop(f"{W}.{part}") for part in sparse.PARTS],
        f" lacks '{W}' (1 missing, 0 unknown)",
    ),
    "whole and in parts": (
        lambda one: one.update({W: torch.zeros(64, 32)}),
        f" has '{W}.positions', which the spec does not (0 missing, 3 unknown)",
    ),
    "beyond": (
        changed("positions", put(-1, 2048)),
        f" is damaged: '{W}.positions' has 2048, outside of 2048 elements; save the deltas again",
    ),
    "before": (
        changed("positions", put(0, -1)),
        f" is damaged: '{W}.positions' has -1, outside of 2048 elements; save the deltas again",
    ),
    "twice": (
        changed("positions", lambda one: torch.tensor([4, 4, *range(5, 3 + len(one))])),
        f" is damaged: '{W}.positions' does not rise at 1: [4, 4]; save the deltas again",
    ),
    "too many": (
        changed("positions", lambda one: torch.arange(2049)),
        f" is damaged: '{W}.positions' has the shape [2049], expected at most [2048]; "
        "save the deltas again",
    ),
    "a matrix": (
        changed("positions", lambda one: one[None]),
        f" is damaged: '{W}.positions' has the shape [1, {{count}}], expected at most [2048]; "
        "save the deltas again",
    ),
    "fewer values": (
        changed("values", lambda one: one[1:]),
        f" is damaged: '{W}.values' has the shape [{{less}}] for {{count}} positions; "
        "save the deltas again",
    ),
    "positions that float": (
        changed("positions", lambda one: one.float()),
        f" is damaged: '{W}.positions' holds float32, expected int32 or int64; save the deltas again",
    ),
    "values that do not": (
        changed("values", lambda one: one.int()),
        f" is damaged: '{W}.values' holds int32, expected floating numbers; save the deltas again",
    ),
    "another shape": (
        changed("shape", lambda one: one.flip(0)),
        f" is damaged: '{W}' has the shape [32, 64], expected [64, 32]; save the deltas again",
    ),
    "a shape of another rank": (
        changed("shape", lambda one: one[:1]),
        f" is damaged: '{W}.shape' has the shape [1], expected [2]; save the deltas again",
    ),
}


@pytest.fixture(scope="module")
def pruned_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Deltas of before manifests had digests: what a file holds is checked by itself too."""
    path = tmp_path_factory.mktemp("pruned")
    peftc.prune(differing("bert"), "1%")[0].save_pretrained(path)
    manifest = json.loads((path / "peftc.json").read_text())
    del manifest["files"]
    (path / "peftc.json").write_text(json.dumps(manifest))
    return path / "model.safetensors"


@pytest.mark.parametrize("case", BROKEN)
def test_a_damaged_file_says_what_is_wrong(case: str, pruned_file: Path) -> None:
    damage, message = BROKEN[case]
    tensors = {k: v.clone() for k, v in load_file(pruned_file).items()}
    count = len(tensors[f"{W}.positions"])
    whole = pruned_file.read_bytes()
    damage(tensors)
    save_file(tensors, pruned_file)
    try:
        with pytest.raises(PeftcError) as error:
            peftc.load(pruned_file.parent, tiny("bert"))
    finally:
        pruned_file.write_bytes(whole)
    assert str(error.value) == f"{pruned_file}{message.format(count=count, less=count - 1)}"


def test_what_cannot_be_pruned_says_why() -> None:
    def refusal(model: PreTrainedModel, keep: str | int = 10) -> str:
        with pytest.raises(PeftcError) as error:
            peftc.prune(model, keep)
        return str(error.value)

    assert refusal(peftc.compile(tiny("bert"), "scaled_parallel_adapter")) == (
        "bert.encoder.layer.0:ffn:scaled_parallel_adapter is no difference of weights: 'relu' is not "
        "affine; prune deltas that fold, such as those of diff_pruning or lora"
    )
    fresh = peftc.compile(tiny("bert"), "lora")
    assert refusal(fresh) == "the deltas change no weight: train them first"
    assert refusal(peftc.compile(tiny("bert"), "head")).startswith("the deltas change no weight")
    model = differing("bert")
    changed = peftc.prune(model, 1)[1].changed
    assert refusal(model, changed + 1) == (
        f"to keep {changed + 1} is to keep {changed + 1:,} numbers, but the deltas change {changed:,}; "
        f"keep {changed} or fewer"
    )
    assert refusal(model, "0.001%") == (
        "to keep 0.001% of 24,323 parameters is to keep none; keep more"
    )
    assert refusal(model, "half") == "'half' is no budget; write 6.7% or a number of weights"
    name = next(iter(fresh.deltas.values()))
    with torch.no_grad():
        fresh.deltas.values()[name].fill_(float("nan"))
    assert refusal(fresh) == f"delta '{name}' holds numbers that are not finite; train it again"


def test_prune_and_train_on_the_command_line(
    run: Run, folder: Path, rows: Path, tmp_path: Path
) -> None:
    body = tmp_path / "body"
    tiny("bert").base_model.save_pretrained(body)
    BertTokenizer.from_pretrained(folder).save_pretrained(body)
    common = ("--data", rows, "--eval", rows, "--batch", 8, "--lr", 0.02)
    trained, pruned, tuned = (tmp_path / name for name in ("trained", "pruned", "tuned"))
    assert run("train", "diff_pruning", "-m", body, *common, "--epochs", 2, "-o", trained)[0] == 0
    code, out, _ = run("prune", trained, "--keep", 243, "-o", pruned)
    assert code == 0
    assert "kept 243 of 17,408 numbers: 1 % of the backbone's 24,290" in out
    assert "max |pruned - unpruned|" in out
    size = (pruned / "model.safetensors").stat().st_size
    assert f"saved deltas to {pruned} ({size:,} bytes)" in " ".join(out.split())
    assert size < (trained / "model.safetensors").stat().st_size / 3
    code, out, _ = run("train", pruned, *common, "--epochs", 4, "-o", tuned)
    assert code == 0
    assert float(out.partition("accuracy ")[2].split()[0]) > 0.9
    assert (tuned / "model.safetensors").stat().st_size <= size
    assert positions(tuned) == positions(pruned)
    assert run("verify", tuned)[0] == 0
    code, out, _ = run("merge", tuned, "-o", tmp_path / "merged")
    assert code == 0 and "kept" not in out


def positions(deltas: Path) -> dict[str, list[int]]:
    """Where the masks of saved deltas are open."""
    with safe_open(deltas / "model.safetensors", framework="pt") as file:
        names = [one for one in file.keys() if one.endswith(".mask.positions")]  # noqa: SIM118
        return {name: file.get_tensor(name).tolist() for name in names}


def test_prune_keeps_half_a_percent_unless_told(run: Run, folder: Path, tmp_path: Path) -> None:
    deltas = saved("diff_pruning", folder, tmp_path / "d")
    code, out, _ = run("prune", deltas, "-o", tmp_path / "p")
    assert code == 0 and "kept 121 of" in out  # of 24,323 parameters
    code, _, err = run("prune", deltas, "--keep", "-1%", "-o", tmp_path / "q")
    assert code == 1 and "error: '-1%' is no budget; write 6.7% or a number of weights" in err
    assert not (tmp_path / "q").exists()
