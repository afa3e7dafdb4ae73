"""Laws of every composition: what must hold of one to three methods, shipped or random, on any family.

200 compositions from a fixed seed; `-m slow` takes 5,000 from the seed that it prints, or from `--laws-seed N`.
"""

from __future__ import annotations

import copy
import random
import signal
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest
import torch
from compositions import Composition, Part, compositions
from conftest import FAMILIES, attention_of, batch, logits, stir
from hypothesis import HealthCheck, given, seed, settings
from reference import WIRING, Reference, Slot, slots
from test_matrix import real
from transformers import PreTrainedModel

import peftc
from peftc.driver import program_of
from peftc.errors import PeftcError
from peftc.language.expr import names
from peftc.language.reader import parse_spec
from peftc.merging import merge
from peftc.model.running import run_program
from peftc.plan.plan import PlanError
from peftc.rewrite.folding import Report

# float64; some norms (Llama, T5) round to float32 on the way.
TOLERANCE = 1e-5
EXAMPLES, MANY = 80, 5000
RARELY = (
    0.1  # how often a model runs in the odd modes that it came with: each takes a graph of its own
)
PATIENCE = 120  # seconds for one example, most of them for a trace


@dataclass
class Case:
    """A composition at work: compiled once, with some value in every delta, for all laws that leave it as it is."""

    one: Composition

    @cached_property
    def model(self) -> PreTrainedModel:
        return self.compiled()

    @cached_property
    def inputs(self) -> dict[str, torch.Tensor]:
        return batch(self.model, "right")

    @cached_property
    def want(self) -> torch.Tensor:
        return logits(self.model, self.inputs)

    @property
    def overflows(self) -> bool:
        """Whether its formulas, squares of squares over many linears, have no finite value: by the graph that no pass
        made lean, so that a pass which makes infinities is not excused."""
        if torch.isfinite(real(self.model, self.inputs, self.want)).all():
            return False
        program = program_of(self.model, "forward", self.inputs)
        with torch.no_grad():
            plain = run_program(self.model, program, self.inputs)["logits"]
        return not torch.isfinite(real(self.model, self.inputs, plain)).all()

    @cached_property
    def merged(self) -> tuple[PreTrainedModel, Report]:
        return merge(self.model)

    def compiled(self) -> PreTrainedModel:
        return stir(peftc.compile(self.one.backbone(), self.one.specs()), 0.2)

    def close(self, got: torch.Tensor, want: torch.Tensor) -> None:
        """What stands at padding is no one's business."""
        # In float32 weights are rounded once, and the norms of many layers.
        tolerance = 1e-3 if got.dtype == torch.float32 else TOLERANCE
        gap = apart(*(real(self.model, self.inputs, value) for value in (got, want)))
        assert gap <= tolerance


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest value or of 1."""
    assert one.shape == other.shape and torch.isfinite(other).all()
    if other.numel() == 0:
        return 0.0
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def written_in_torch(case: Case) -> None:
    """The graph computes the formulas in the order of the spec, and their gradients."""
    if case.one.family not in WIRING or case.model.plan.room:
        return  # the reference has no rows in front of the tokens
    deltas = dict(case.model.deltas.values())
    reference = Reference(case.one.backbone(), case.one.family, case.model.plan.edits, deltas)
    got, want = case.model(**case.inputs).logits, reference(case.inputs)
    case.close(got, want)
    trained = {name: value for name, value in deltas.items() if value.requires_grad}
    if trained:
        mine, theirs = (slopes(case, one, list(trained.values())) for one in (got, want))
        for name, one, other in zip(trained, mine, theirs):
            gap = apart(one, other)
            assert gap <= 10 * TOLERANCE, f"the gradient of {name}"


def slopes(case: Case, output: torch.Tensor, trained: list[torch.Tensor]) -> list[torch.Tensor]:
    loss = real(case.model, case.inputs, output).square().mean()
    found = torch.autograd.grad(loss, trained, allow_unused=True)
    return [torch.zeros_like(t) if slope is None else slope for t, slope in zip(trained, found)]


def folds(case: Case) -> None:
    """Folded is unfolded; what is kept says why; what was folded once is folded."""
    case.close(case.want, case.want)
    merged, report = case.merged
    case.close(logits(merged, case.inputs), case.want)
    assert len(report.outcomes) == len(case.model.plan.edits)
    assert all(outcome.note for outcome in report.outcomes)
    assert torch.equal(logits(case.model, case.inputs), case.want)  # it worked on a copy
    if not report.kept:
        assert type(merged) is type(case.one.backbone())
        return
    assert len(report.kept) == len(merged.plan.edits)
    twice, second = merge(merged)
    assert second.folded == () and [o.note for o in second.kept] == [o.note for o in report.kept]
    tensors = twice.deltas.values()
    assert tensors.keys() == merged.deltas.values().keys()
    assert all(torch.equal(tensors[k], v) for k, v in merged.deltas.values().items())
    assert torch.equal(logits(twice, case.inputs), logits(merged, case.inputs))


def saves(case: Case) -> None:
    """Saved is loaded; loaded is saved, byte for byte; counts are those of the tensors."""
    model = case.compiled()
    with torch.no_grad():
        for free in model.plan.unfrozen:
            model.get_parameter(free.path).add_(0.1)
    want = logits(model, case.inputs)
    stored = random.Random(repr(case.one)).random() < 0.5
    with tempfile.TemporaryDirectory() as folder:
        first, second = Path(folder, "first"), Path(folder, "second")
        model.save_pretrained(first, stored=stored)
        again = peftc.load(first, backbone=case.one.backbone())
        if not stored:
            same(again, model)
        # constants are evaluated in float64 and rounded once; sums follow how weights are aligned
        case.close(logits(again, case.inputs), want)
        again.save_pretrained(second)
        assert files(first) == files(second)
    counts_are_of_tensors(again)
    assert again.plan.parameters.stored == model.plan.parameters.stored


def same(one: PreTrainedModel, other: PreTrainedModel) -> None:
    """The same numbers, bit for bit, of deltas and backbone."""
    mine, theirs = (
        dict(m.named_parameters()) | dict(m.named_buffers()) | m.deltas.values()
        for m in (one, other)
    )
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in mine.items())


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(path.iterdir())}


def counts_are_of_tensors(model: PreTrainedModel) -> None:
    plan, tensors = model.plan, model.deltas.values()
    free = sum(one.numel for one in plan.unfrozen)
    trained = sum(value.numel() for value in tensors.values() if value.requires_grad)
    assert plan.parameters.training == trained + free
    assert trained + free == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert {p.path: p.shape for edit in plan.edits for p in edit.parameters} == {
        path: tuple(value.shape) for path, value in tensors.items()
    }
    assert len(plan.matches) == len(plan.spec.entries)


def saves_what_is_merged(case: Case) -> None:
    """What merge leaves is a model as any other: it is saved, loaded and counted."""
    merged, report = case.merged
    want = logits(merged, case.inputs)
    with tempfile.TemporaryDirectory() as folder:
        merged.save_pretrained(folder)
        if not report.kept:
            again = type(merged).from_pretrained(folder, dtype=case.one.dtype)
            # Not the outputs: a bare Gemma 2 in float64 makes constants anew too, 5e-7 apart.
            tensors = again.state_dict()
            assert all(torch.equal(tensors[k], v) for k, v in merged.state_dict().items())
            return
        counts_are_of_tensors(merged)
        deltas = dict(merged.deltas.values())
        again = peftc.load(folder, backbone=peftc.detach(merged))
        assert all(torch.equal(v, deltas[k]) for k, v in again.deltas.values().items())
        case.close(logits(again, case.inputs), want)  # sums follow how weights are aligned
        counts_are_of_tensors(again)


def state(model: PreTrainedModel) -> dict[str, Any]:
    """All of a model that a user can see: tensors, flags, modes, settings, hooks, attributes."""
    modules = dict(model.named_modules())
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        "values": {name: value.detach().clone() for name, value in tensors.items()},
        "identity": {name: id(value) for name, value in tensors.items()},
        "flags": {name: value.requires_grad for name, value in tensors.items()},
        "grads": {name: value.grad is not None for name, value in tensors.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "hooks": {
            name: (len(module._forward_hooks), len(module._forward_pre_hooks))
            for name, module in modules.items()
        },
        "config": model.config.to_json_string(use_diff=False)
        + str(model.config._attn_implementation),
    }


def assert_same(
    now: dict[str, Any], before: dict[str, Any], but: frozenset[str] = frozenset()
) -> None:
    for name, value in before["values"].items():
        assert name in but or torch.equal(now["values"][name], value), name
    for part in before:
        if part not in ("values", "grads"):
            assert now[part] == before[part], part


def mixed(model: PreTrainedModel, draw: random.Random) -> PreTrainedModel:
    """Some modules in another mode, vectors perhaps frozen: a model as it comes from a user."""
    model.train(draw.random() < 0.5)
    for module in model.modules():
        if draw.random() < 0.2:
            module.training = not module.training
    vectors = draw.random() < 0.5  # flags are part of what tracing sees: few patterns, few graphs
    for weight in model.parameters():
        weight.requires_grad_(vectors or weight.ndim > 1)
    return model


def detaches(case: Case) -> None:
    """Plan changes nothing; detach gives the backbone back as it came, modes, flags and all."""
    draw = random.Random(repr(case.one))
    backbone = mixed(case.one.backbone(), draw)
    before = state(backbone)
    peftc.plan(backbone, case.one.specs())
    assert_same(state(backbone), before)
    model = stir(peftc.compile(backbone, case.one.specs()), 0.2)
    if draw.random() < RARELY:
        model(**case.inputs)
        model.train()
        loss = model(**case.inputs).logits.square().mean()
        if loss.requires_grad:  # a composition may have nothing to train
            loss.backward()
    logits(model.eval(), case.inputs)
    assert peftc.detach(model) is backbone
    assert_same(state(backbone), before)


def commutes(case: Case) -> None:
    """Edits that share no value may stand in any order."""
    one, model = case.one, case.model
    if one.family not in WIRING or model.plan.room or shares(model, one.family):
        return
    if len({part.name for part in one.parts}) < len(one.parts):
        return  # one method twice at one site: which is which, their order says
    turned = replace(one, parts=one.parts[::-1])
    other = peftc.compile(turned.backbone(), turned.specs())
    values = other.deltas.values()
    assert values.keys() == model.deltas.values().keys()
    with torch.no_grad():
        for path, value in model.deltas.values().items():
            values[path].copy_(value)
    case.close(logits(other, case.inputs), case.want)
    case.close(logits(merge(other)[0], case.inputs), case.want)


def shares(model: PreTrainedModel, family: str) -> bool:
    """Whether two parts assign one value, or one reads what the other assigns."""
    read: dict[str, set[Slot]] = {}
    written: dict[str, set[Slot]] = {}
    for edit in model.plan.edits:
        ports, entry = slots(edit, family), edit.entry
        assigned = {ports[port] for port, _ in entry.assign}
        used = {name for _, right in (*entry.let, *entry.assign) for name in names(right)}
        written.setdefault(entry.method, set()).update(assigned)
        read.setdefault(entry.method, set()).update(ports[name] for name in used & ports.keys())
    return any(
        mine.meets(theirs)
        for one in written
        for other in written
        if one != other
        for mine in written[one]
        for theirs in read[other] | written[other]
    )


DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tensors": lambda path: (path / "model.safetensors").unlink(),
    "half the tensors": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:-7]
    ),
    "no manifest": lambda path: (path / "peftc.json").unlink(),
    "half a manifest": lambda path: (path / "peftc.json").write_text("{"),
    "an unknown form": lambda path: (path / "peftc.json").write_text(
        (path / "peftc.json").read_text().replace('"form": "training"', '"form": "other"')
    ),
}


def fails_without_a_trace(case: Case) -> None:
    """A spec that does not fit, or damaged files: an error, and everything as it was."""
    draw = random.Random(repr(case.one))
    backbone = mixed(case.one.backbone(), draw)
    before = state(backbone)
    with pytest.raises(PeftcError):
        peftc.compile(backbone, [*case.one.specs(), nowhere()])
    assert_same(state(backbone), before)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deltas")
        case.model.save_pretrained(path)
        DAMAGE[draw.choice(sorted(DAMAGE))](path)
        with pytest.raises(PeftcError):
            peftc.load(path, backbone=backbone)
    assert_same(state(backbone), before)


def nowhere() -> Any:
    text = "deltas: [{at: {op: linear, scope: no.such.module}, rewrite: {h: h * 2}}]"
    return parse_spec(text, "nowhere.yaml")


def compiles_twice(case: Case) -> None:
    """A second compilation of an attached backbone is refused, or each works as if it were alone."""
    backbone = case.one.backbone()
    model = stir(peftc.compile(backbone, case.one.specs()), 0.2)
    flags = trains(model)
    try:
        second = peftc.compile(backbone, "norm_tuning")
    except PeftcError:
        pass
    else:
        alone = peftc.compile(case.one.backbone(), "norm_tuning")
        assert torch.equal(logits(second, case.inputs), logits(alone, case.inputs))
        assert trains(second) == trains(alone)
        second.train()
    assert trains(model) == flags
    assert torch.equal(logits(model, case.inputs), case.want)


def trains(model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def copies(case: Case) -> None:
    """A deep copy gives the same and shares nothing."""
    twin = copy.deepcopy(case.model)
    assert torch.equal(logits(twin, case.inputs), case.want)
    mine = {value.data_ptr() for value in case.model.parameters()}
    assert not mine & {value.data_ptr() for value in twin.parameters()}
    stir(twin, 1.0, seed=9)
    assert torch.equal(logits(case.model, case.inputs), case.want)


Law = Callable[[Case], None]
LAWS: tuple[Law, ...] = (written_in_torch, commutes, folds)
# What surrounds a composition: CI checks one of these of each, the slow set all.
AROUND: tuple[Law, ...] = (
    copies,
    compiles_twice,
    detaches,
    fails_without_a_trace,
    saves,
    saves_what_is_merged,  # takes the merged model apart
)


def of_all(_: Composition) -> Sequence[Law]:
    return *LAWS, *AROUND


def of_each(one: Composition) -> Sequence[Law]:
    return *LAWS, random.Random(repr(one)).choice(AROUND)


def hold(
    laws: Callable[[Composition], Sequence[Law]], strategy: Any, count: int, start: int
) -> None:
    """The laws hold of `count` random compositions; of all that were drawn, at most a tenth were refused."""
    tried: list[Composition] = []
    refused: list[str] = []

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        print_blob=False,
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def check(one: Composition) -> None:
        tried.append(one)
        case = Case(one)
        signal.alarm(PATIENCE)  # a compiler that never ends is a fault as any other
        try:
            assert case.model
            if case.overflows:
                refused.append(f"numbers beyond float64\n{one}")
                return
            for law in laws(one):
                law(case)
        except PlanError as error:
            refused.append(f"{error}\n{one}")
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, never_ends)
    check()
    assert len(tried) >= count * 9 // 10, "the strategy has too few examples"
    assert len(refused) * 10 <= len(tried), f"{len(refused)} of {len(tried)}: {refused[-1]}"


def never_ends(*_: object) -> None:
    raise TimeoutError(f"it has not ended after {PATIENCE} seconds")


# A family is traced in one process of the suite: each group of families has its share of the examples.
GROUPS = 4
SHARES = [
    pytest.param(
        tuple(FAMILIES)[group::GROUPS],
        id=str(group),
        marks=pytest.mark.xdist_group(f"laws-{group}"),
    )
    for group in range(GROUPS)
]


@pytest.mark.parametrize("families", SHARES)
def test_laws(families: tuple[str, ...]) -> None:
    hold(of_each, compositions(families), EXAMPLES // GROUPS, 0)


# What a law has found once: (family, what a delta is), small.
FOUND = {
    "a number on the left": ("bert", "at: ffn, rewrite: {h: 3 - h / (2 - sigmoid(h))}"),
    "a port that stays as it is": (
        "bert",
        "at: ffn.down, params: {p: {shape: [out], init: normal}}, rewrite: {b: b + p, h: h}",
    ),
    "dropout alone": ("gpt2", 'at: ffn, rewrite: {h: "dropout(h, 0.1)"}'),
    "dropout alone, twice": (
        "bert",
        'at: ffn, rewrite: {h: "dropout(h, 0.1)"}}, {at: ffn, rewrite: {h: "dropout(h, 0.1)"}',
    ),
    "a tied weight that trains, at one of its uses": (
        "gpt2",
        "at: head, train: [weight]}, {at: head, rewrite: {h: 2 * h}}, "
        "{at: ffn, rewrite: {h: tanh(h)}",
    ),
    "an input that is changed, then read by the sub-layer": (
        "bert",
        "at: ffn.up, params: {p: {shape: [in, in], init: normal}}, rewrite: {x: x @ p}}, "
        "{at: ffn, params: {p: {shape: [in, out], init: normal}}, delta: tanh(x @ p)",
    ),
    "an input that is changed, then read by a projection": (
        "llama",
        "at: attention.q, params: {p: {shape: [in, in], init: normal}}, rewrite: {x: x @ p}}, "
        "{at: attention.v, params: {p: {shape: [d, out], init: normal}}, rewrite: {h: h + input @ p}",
    ),
    "a value by another name, then edited": (
        "bert",
        "at: ffn, rewrite: {h: residual}}, {at: ffn, rewrite: {h: 0.5 * tanh(h)}",
    ),
    "an input by another name, then the output edited": (
        "llama",
        "at: ffn.down, rewrite: {h: h - h}}, {at: ffn, rewrite: {h: x}}, {at: ffn, rewrite: {h: 2 * h}",
    ),
    "an input that is changed, and the residual": (
        "bert",
        "at: ffn.up, rewrite: {x: 2 * x}}, {at: ffn, rewrite: {h: h + residual}",
    ),
    "a value that a later edit does without": (
        "mpt",
        "at: norm, params: {p: {shape: [out], init: normal}}, rewrite: {W: W * p}}, "
        "{at: ffn, params: {p: {shape: [out, out], init: normal}}, rewrite: {h: residual @ p}",
    ),
    "a projection that a later edit does without": (
        "phi3",
        "at: attention.q, params: {p: {shape: [out, in], init: normal}}, rewrite: {W: W + p}}, "
        "{at: attention.q, params: {p: {shape: [d, out], init: normal}}, rewrite: {h: input @ p}",
    ),
    "a norm's scale behind one that stays": (
        "bert",
        "at: norm, params: {p: {shape: [out], init: normal}}, rewrite: {W: W + p, h: tanh(h)}}, "
        "{at: norm, rewrite: {W: -2 * W}",
    ),
    "nothing is left of weight and bias": (
        "bert",
        "at: attention.v, params: {p: {shape: [in, out], init: normal}}, rewrite: {h: x @ p}",
    ),
    "all inputs are shifted alike": (
        "bert",
        "at: ffn.down, params: {p: {shape: [1], init: normal}}, rewrite: {x: x + p}",
    ),
    "keys of cross attention and its queries' input": (
        "bart",
        "at: attention.k, params: {p: {shape: [d, in], init: normal}}, rewrite: {x: x + input @ p}",
    ),
}


@pytest.mark.parametrize("name", FOUND)
def test_what_was_found_once(name: str) -> None:
    """It holds now, or the plan says why it cannot."""
    family, delta = FOUND[name]
    part = Part("found", f"name: found\ndeltas: [{{{delta}}}]\n")
    case = Case(Composition(family, attention_of(family), (part,)))
    try:
        assert case.model
    except PlanError:
        return
    for law in of_all(case.one):
        law(case)


@pytest.mark.slow
@pytest.mark.parametrize("families", SHARES)
def test_laws_at_length(families: tuple[str, ...], start: int) -> None:
    hold(of_all, compositions(families), MANY // GROUPS, start)
