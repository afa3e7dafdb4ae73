"""Several delta sets in one model: each as if it were there alone, several as one spec of all, none as no spec."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from conftest import batch, logits, tiny
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset
from transformers import PreTrainedModel, Trainer, TrainingArguments

import peftc
from peftc.errors import PeftcError
from peftc.graph.captures import CAPTURES

FAMILIES = ("bert", "gpt2", "llama", "bart")
SLOW = pytest.mark.slow
METHODS = {
    "lora": peftc.load_spec("lora", r=2),
    "mam": peftc.load_spec("mam", r=4, l=3, m=5),
    "bitfit": peftc.load_spec("bitfit"),
    "prompt_tuning": peftc.load_spec("prompt_tuning", l=3),
    "houlsby_adapter": peftc.load_spec("houlsby_adapter", r=4),
    "norm_tuning": peftc.load_spec("norm_tuning"),
    "dora": peftc.load_spec("dora", r=2),
    "ia3": peftc.load_spec("ia3"),
}
QUIETLY = dict(deadline=None, database=None, suppress_health_check=list(HealthCheck))
Values = Mapping[str, torch.Tensor]


def stirred(model: PreTrainedModel, seed: int) -> PreTrainedModel:
    """Other numbers in all that the sets in use hold or train."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for value in model.get_adapter_state_dict().values():
            value.add_(torch.randn_like(value) * 0.3)
    return model


def two(family: str, first: str = "lora", second: str = "mam") -> PreTrainedModel:
    """A model of two sets with numbers of their own, the first in use."""
    model = stirred(peftc.compile(tiny(family), METHODS[first], name="one"), 2)
    model.add(METHODS[second], "two")
    model.use("two")
    stirred(model, 3)
    model.use("one")
    return model


def values(model: PreTrainedModel, name: str) -> dict[str, torch.Tensor]:
    """What a set trains or holds, by its names in a model that has it alone."""
    given = model.get_adapter_state_dict(name)
    return {k.replace(f"deltas.{name}.", "deltas."): v.detach().clone() for k, v in given.items()}


def alone(family: str, spec: object, *given: Values) -> PreTrainedModel:
    """A model of one set, with these values, each in the order of its own spec's tensors."""
    model = peftc.compile(tiny(family), spec)
    slots = dict(model.state_dict(keep_vars=True))
    names = [f"deltas.{one}" for one in model.plan.tensors]
    flat = [(k, v) for one in given for k, v in one.items() if k.startswith("deltas.")]
    with torch.no_grad():
        for name, (_, value) in zip(names, flat, strict=True):
            slots[name].copy_(value)
        for one in given:
            for name in one.keys() - {k for k, _ in flat}:
                slots[name].copy_(one[name])
    return model


def run(model: PreTrainedModel) -> torch.Tensor:
    model.eval()
    return logits(model, batch(model, "right"))


@pytest.mark.habit(
    "several delta sets: add, use, base, remove", "each alone, and all as one spec, to the bit"
)
@pytest.mark.parametrize(
    ("family", "count"),
    [
        pytest.param(family, count, id=f"{family}-{count}", marks=marks)
        for family in FAMILIES
        for count, marks in ((3, [SLOW] * (family in FAMILIES[::2])), (40, [SLOW]))
    ],
)
def test_each_acts_as_if_it_were_alone(family: str, count: int) -> None:
    @given(
        methods=st.lists(st.sampled_from([*METHODS]), min_size=2, max_size=3),
        order=st.permutations(range(3)),
    )
    @settings(max_examples=count, derandomize=True, **QUIETLY)
    def check(methods: list[str], order: list[int]) -> None:
        acts_alone(family, methods, order)

    check()


def acts_alone(family: str, methods: list[str], order: list[int]) -> None:
    """And all those in use as one spec of all, in the order in which they are named; none as the backbone."""
    if family == "llama":  # has no biases
        methods = ["norm_tuning" if one == "bitfit" else one for one in methods]
    backbone = tiny(family)
    bare = run(backbone)
    model = stirred(peftc.compile(backbone, METHODS[methods[0]], name="s0"), 9)
    names = [f"s{i}" for i in range(len(methods))]
    for i, method in enumerate(methods[1:], 1):
        model.add(METHODS[method], names[i])
        model.use(names[i])
        stirred(model, i)
    for name, method in zip(names, methods, strict=True):
        model.use(name)
        other = alone(family, METHODS[method], values(model, name))
        assert torch.equal(run(model), run(other)), name
        with model.base():
            assert torch.equal(run(model), bare)
    chosen = [i for i in order if i < len(methods)]
    try:
        want = alone(
            family,
            [METHODS[methods[i]] for i in chosen],
            *[values(model, names[i]) for i in chosen],
        )
    except PeftcError as error:  # one acts on tokens behind the rows of another
        with pytest.raises(type(error)):
            model.use([names[i] for i in chosen])
    else:
        free = [path for name in names for path in model._sets.all[name].weights]
        if len(set(free)) < len(free):
            with pytest.raises(PeftcError, match="is trained by two of them"):
                model.use([names[i] for i in chosen])
        else:
            model.use([names[i] for i in chosen])
            assert torch.equal(run(model), run(want))
    model.use(None)
    assert torch.equal(run(model), bare)
    assert torch.equal(run(peftc.detach(model)), bare)


@pytest.mark.habit("several delta sets: switching traces nothing", "the number of traces")
def test_switching_traces_nothing() -> None:
    """But once for each number of rows in front."""
    model = two("llama")
    model.add(peftc.load_spec("prompt_tuning", l=17), "rows")  # as no other test
    run(model)
    before = len(CAPTURES.programs)
    for names in ("two", ["one", "two"], None, ["two", "one"], "one"):
        model.use(names)
        run(model)
    assert len(CAPTURES.programs) == before
    for names in ("rows", "one", ["one", "rows"], "rows"):
        model.use(names)
        run(model)
    assert len(CAPTURES.programs) == before + 1
    held = model._programs
    model.use("one")
    model.use("rows")
    assert model._programs is held


@pytest.mark.habit("several delta sets: one trains", "the others' bits")
@pytest.mark.parametrize("second", ["mam", "bitfit"])
def test_one_trains_while_the_others_are_frozen(second: str) -> None:
    model = two("bert", "lora", second)
    bare = {k: v.clone() for k, v in tiny("bert").state_dict().items()}
    first = values(model, "one")
    model.use(["one", "two"], train="two")
    chosen = [p for p in model.parameters() if p.requires_grad]
    own = {id(p) for p in model.get_adapter_state_dict("two").values()}
    assert {id(p) for p in chosen} <= own
    optimizer = torch.optim.SGD(chosen, lr=0.1)
    model.train()
    before = values(model, "two")
    loss = model(**batch(model)).logits.square().mean()
    with model.base(), torch.no_grad():  # as DPO does, between a forward and its backward
        logits(model, batch(model))
    loss.backward()
    optimizer.step()
    assert any(not torch.equal(v, before[k]) for k, v in values(model, "two").items())
    assert all(torch.equal(v, first[k]) for k, v in values(model, "one").items())
    model.use(None)
    assert not any(p.requires_grad for p in model.parameters())
    assert all(torch.equal(v, bare[k]) for k, v in peftc.detach(model).state_dict().items())


def test_base_leaves_what_trains() -> None:
    """Also the flags that somebody set by hand, and after an error inside."""
    model = two("bert", "bitfit", "lora")
    path, own = next((k, p) for k, p in model.named_parameters() if p.requires_grad)
    own.requires_grad_(False)
    with model.using("two"):
        assert model.in_use == ("two",) and not own.requires_grad
    with pytest.raises(ZeroDivisionError), model.base():
        assert model.in_use == () and dict(model.named_parameters())[path] is not own
        raise ZeroDivisionError
    assert model.in_use == ("one",)
    assert dict(model.named_parameters())[path] is own and not own.requires_grad


@pytest.mark.habit("several delta sets: saved and loaded by themselves", "the values saved")
@pytest.mark.parametrize("second", ["mam", "bitfit"])
def test_each_is_saved_and_loaded_by_itself(second: str, tmp_path: Path) -> None:
    model = two("bert", "lora", second)
    want = {}
    for name in ("one", "two"):
        model.use(name)
        want[name] = run(model)
    model.use("one")
    model.save_pretrained(tmp_path / "two", name="two")  # at rest
    model.save_pretrained(tmp_path / "one")
    for name in ("one", "two"):
        found = peftc.load(tmp_path / name, tiny("bert"))
        assert found.delta_sets == (name,) and torch.equal(run(found), want[name])
        other = peftc.compile(tiny("bert"), "ia3")
        other.add(tmp_path / name, "again")
        other.use("again")
        assert torch.equal(run(other), want[name])


def test_several_are_saved_and_loaded_together(tmp_path: Path) -> None:
    model = two("bert", "mam", "bitfit")
    model.use(["two", "one"])
    model.save_pretrained(tmp_path / "both", stored=True)
    found = peftc.load(tmp_path / "both", tiny("bert"))
    assert found.in_use == ("two", "one")
    torch.testing.assert_close(run(found), run(model))  # the prefix is a product that was evaluated
    with pytest.raises(PeftcError, match=r"holds several sets \(two, one\); save each by itself"):
        model.add(tmp_path / "both", "three")
    model.use(None)
    with pytest.raises(PeftcError, match="no delta set is in use; say which to save, by its name"):
        model.save_pretrained(tmp_path / "none")


class Rows(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, model: PreTrainedModel) -> None:
        whole = {**batch(model, "right"), "labels": torch.tensor([0, 1, 0])}
        self.rows = [{k: v[i] for k, v in whole.items()} for i in range(3)]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return self.rows[index]


@pytest.mark.habit(
    "several delta sets: a Trainer resumes the one it trained", "an uninterrupted training"
)
def test_a_trainer_resumes_the_set_that_it_trained(tmp_path: Path) -> None:
    def trained(model: PreTrainedModel, steps: int, resume: bool) -> dict[str, torch.Tensor]:
        model.use(["one", "two"], train="two")
        settings = dict(report_to="none", use_cpu=True, per_device_train_batch_size=3)
        arguments = TrainingArguments(str(tmp_path), max_steps=steps, save_steps=2, **settings)
        Trainer(model, arguments, train_dataset=Rows(model)).train(resume_from_checkpoint=resume)
        return {k: v.clone() for k, v in model.state_dict().items()}

    def fresh() -> PreTrainedModel:
        model = two("bert", "lora", "bitfit")
        model.add("mam", "rests")
        return model

    whole = trained(fresh(), 4, False)
    for one in tmp_path.glob("checkpoint-4"):
        one.rename(tmp_path / "away")
    again = trained(fresh(), 4, True)
    assert all(torch.equal(v, whole[k]) for k, v in again.items())


def test_merge_folds_those_in_use() -> None:
    model = two("bert", "lora", "mam")
    model.use(["two", "one"])
    merged, report = peftc.merge(model)
    assert merged.delta_sets == ("two",)  # LoRA folded, adapters and prefixes did not
    assert {one.folded for one in report.outcomes} == {True, False}
    torch.testing.assert_close(run(merged), run(model), rtol=1e-4, atol=1e-5)
    model.use("one")
    merged, _ = peftc.merge(model)
    assert not isinstance(merged, peftc.CompiledModel)
    torch.testing.assert_close(run(merged), run(model), rtol=1e-4, atol=1e-5)


def test_what_is_left_of_a_set_is_saved(tmp_path: Path) -> None:
    model = two("bert", "lora", "mam")
    model.use("two")
    merged, _ = peftc.merge(model)
    merged.save_pretrained(tmp_path / "left")
    want = run(merged)
    assert torch.equal(run(peftc.load(tmp_path / "left", peftc.detach(merged))), want)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_have_sets_of_their_own(again: object) -> None:
    model = two("bert", "lora", "bitfit")
    model.use(["one", "two"])
    want = run(model)
    other = again(model)  # type: ignore[operator]
    assert other.in_use == ("one", "two") and torch.equal(run(other), want)
    other.use("two")
    stirred(other, 9)
    other.use(["two", "one"])
    other.remove([]) or other.add("ia3", "three")
    assert torch.equal(run(model), want) and model.delta_sets == ("one", "two")
    assert not torch.equal(run(other), want)


def test_all_move_together() -> None:
    model = two("bert", "lora", "bitfit")
    model.double()
    for name in ("two", "one", None, ["one", "two"]):
        model.use(name)
        assert run(model).dtype == torch.float64


def test_what_runs_a_model_follows() -> None:
    """torch.compile, layers computed twice, hooks on layers."""
    model = two("llama").eval()
    inputs = batch(model, "right")
    want = {name: (model.use(name), logits(model, inputs))[1] for name in ("one", "two")}
    traced = torch.compile(model, backend="eager")
    seen: list[object] = []
    for name in ("one", "two", "one"):
        model.use(name)
        with torch.no_grad():
            torch.testing.assert_close(traced(**inputs).logits, want[name])
    handle = model.model.layers[0].register_forward_hook(lambda *_: seen.append(1))
    for name in ("two", "one"):
        model.use(name)
        torch.testing.assert_close(logits(model, inputs), want[name])
    model.use(None)
    logits(model, inputs)
    assert len(seen) == 3
    handle.remove()


@pytest.mark.habit("several delta sets: generation with each", "each alone")
@pytest.mark.parametrize("family", ["llama", "bart"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.sampled(4)
def test_generation_with_each(family: str, cache: str) -> None:
    model = two(family, "lora", "prompt_tuning").eval()
    inputs = batch(model, "left") if family == "llama" else batch(model, "right")
    inputs.pop("decoder_input_ids", None)
    given = dict(
        max_new_tokens=4, do_sample=False, cache_implementation=cache, disable_compile=True
    )

    def words(one: PreTrainedModel) -> list[list[int]]:
        return one.generate(**inputs, **given).tolist()  # type: ignore[no-any-return]

    bare = words(tiny(family).eval())
    for name, method in (("one", "lora"), ("two", "prompt_tuning")):
        model.use(name)
        assert words(model) == words(alone(family, METHODS[method], values(model, name)).eval())
        with model.base():
            assert words(model) == bare


@pytest.mark.habit(
    "several delta sets: set_adapter, disable_adapters, enable_adapters, delete_adapter, active_adapters",
    "add, use, base, remove",
)
def test_the_names_of_transformers() -> None:
    model = peftc.compile(tiny("bert"), "lora")
    assert model.active_adapters() == ["default"]
    model.add_adapter("mam", "two")
    assert model.active_adapters() == ["two"]
    model.set_adapter(["default", "two"])
    model.disable_adapters()
    model.disable_adapters()
    assert model.active_adapters() == [] and torch.equal(run(model), run(tiny("bert")))
    model.enable_adapters()
    assert model.active_adapters() == ["default", "two"]
    assert {k.startswith("deltas.two.") for k in model.get_adapter_state_dict("two")} == {True}
    model.delete_adapter("default")
    assert model.active_adapters() == ["two"] and model.delta_sets == ("two",)
    assert not any(k.startswith("deltas.bert") for k in model.state_dict())
    model.load_adapter("lora")
    assert model.delta_sets == ("two", "default")
    with pytest.raises(PeftcError, match="needs no hotswap"):
        model.enable_peft_hotswap()


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (lambda m: m.use("tow"), "there is no delta set 'tow'; did you mean 'two'?"),
        (lambda m: m.use("q"), "there is no delta set 'q'; there are: 'one', 'two'"),
        (lambda m: m.use("one", train="two"), "the delta set 'two' is to train, but is not in use"),
        (
            lambda m: m.add("lora", "two"),
            "there is a delta set 'two'; remove it first, or choose another name",
        ),
        (
            lambda m: m.add("lora", "bert"),
            "'bert' cannot name a delta set: a module of this model is called so",
        ),
        (
            lambda m: m.add("lora", "a.b"),
            "'a.b' cannot name a delta set: use letters, digits, _ and -",
        ),
        (lambda m: m.remove("one"), "the delta set 'one' is in use; use others, or None, first"),
        (lambda m: m.remove(["two", "q"]), "there is no delta set 'q'; there are: 'one', 'two'"),
        (lambda m: m.use(["two", "three"]), "'bert.embeddings.LayerNorm.bias' is trained by two"),
    ],
)
def test_refusals_leave_the_model_as_it_was(act: object, words: str) -> None:
    model = two("bert", "lora", "bitfit")
    if "trained by two" in words:
        model.add("bitfit", "three")
    want, sets = run(model), model.delta_sets
    with pytest.raises(PeftcError) as caught:
        act(model)  # type: ignore[operator]
    assert str(caught.value).startswith(words)
    assert model.in_use == ("one",) and model.delta_sets == sets and torch.equal(run(model), want)


def test_a_set_that_fails_to_load_leaves_nothing(tmp_path: Path) -> None:
    model = two("bert", "bitfit", "lora")
    other = stirred(peftc.compile(tiny("bert", seed=5), "lora"), 4)
    other.save_pretrained(tmp_path / "foreign")
    want = run(model)
    with pytest.raises(PeftcError, match="belong to another backbone"):
        model.add(tmp_path / "foreign", "three")
    assert model.delta_sets == ("one", "two") and torch.equal(run(model), want)


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (("bert", "two"), "'bert' cannot name a delta set"),
        (("a.b", "two"), r"'a\.b' cannot name a delta set"),
        (("two", "two"), "'set' is not what it must be"),
        ((1, "two"), "'set' is not what it must be"),
    ],
)
def test_names_in_a_file_are_checked(
    names: tuple[object, object], words: str, tmp_path: Path
) -> None:
    model = two("bert", "lora", "bitfit")
    model.use(["one", "two"])
    model.save_pretrained(tmp_path / "both")
    file = tmp_path / "both" / "peftc.json"
    said = json.loads(file.read_text())
    said["set"], said["others"][0]["set"] = names
    file.write_text(json.dumps(said))
    backbone = tiny("bert")
    with pytest.raises(PeftcError, match=words):
        peftc.load(tmp_path / "both", backbone)
    fresh = tiny("bert").state_dict()
    assert all(torch.equal(v, fresh[k]) for k, v in backbone.state_dict().items())
    peftc.compile(backbone, "lora")  # nothing was attached


def test_the_first_name_is_checked() -> None:
    with pytest.raises(PeftcError, match="'bert' cannot name a delta set"):
        peftc.compile(tiny("bert"), "lora", name="bert")
