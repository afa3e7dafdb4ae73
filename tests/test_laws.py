"""Laws of every composition: what must hold of one to three methods, shipped or random, on any family.

200 examples of each law from a fixed seed; `-m slow` takes 5,000 from the seed that it prints, or from
`--laws-seed N`.
"""

from __future__ import annotations

import copy
import random
import signal
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from compositions import Composition, compositions, formulas, places
from conftest import EAGER, batch, logits, stir
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from reference import WIRING, Reference, Slot, slots
from test_matrix import real
from transformers import PreTrainedModel

import peftc
from peftc.driver import merge
from peftc.errors import PeftcError
from peftc.language.expr import names
from peftc.language.reader import parse_spec
from peftc.plan.plan import PlanError

# float64; some norms (Llama, T5) round to float32 on the way.
TOLERANCE = 1e-5
EXAMPLES, MANY = 200, 5000
PATIENCE = 120  # seconds for one example, most of them for a trace
ROWS = ("prompt_tuning",)  # rows in front of the tokens: not in the reference


class Discarded(Exception):
    """A composition that the plan refuses: no example of any law."""


@dataclass
class Tally:
    """How many compositions were tried, and how many refused."""

    tried: int = 0
    refused: int = 0
    last: str = ""

    def compiled(self, one: Composition, **settings: Any) -> PreTrainedModel:
        """The composition with some value in every delta."""
        try:
            return stir(peftc.compile(one.backbone(), one.specs(), **settings), 0.2)
        except PlanError as error:
            self.last = str(error)
            raise Discarded from error


def apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The largest difference, in units of the largest value or of 1."""
    assert one.shape == other.shape and torch.isfinite(other).all()
    if other.numel() == 0:
        return 0.0
    return ((one - other).abs().max() / other.abs().max().clamp(min=1)).item()


def assert_close(
    model: PreTrainedModel,
    inputs: dict[str, torch.Tensor],
    got: torch.Tensor,
    want: torch.Tensor,
    tolerance: float = TOLERANCE,
) -> None:
    if got.dtype == torch.float32 and tolerance:
        tolerance = 1e-3  # weights rounded once, and the norms of many layers
    gap = apart(real(model, inputs, got), real(model, inputs, want))
    assert gap <= tolerance


def written_in_torch(one: Composition, tally: Tally) -> None:
    """The graph computes the formulas in the order of the spec, and their gradients."""
    model = tally.compiled(one)
    inputs, deltas = batch(model, "right"), dict(model.deltas.values())
    reference = Reference(one.backbone(), one.family, model.plan.edits, deltas)
    got, want = model(**inputs).logits, reference(inputs)
    assert_close(model, inputs, got, want)
    trained = {name: value for name, value in deltas.items() if value.requires_grad}
    if trained:
        slopes = [
            torch.autograd.grad(
                real(model, inputs, one).square().mean(), trained.values(), allow_unused=True
            )
            for one in (got, want)
        ]
        for name, mine, theirs in zip(trained, *slopes):
            mine, theirs = (
                torch.zeros_like(trained[name]) if one is None else one for one in (mine, theirs)
            )
            gap = apart(mine, theirs)
            assert gap <= 10 * TOLERANCE, f"the gradient of {name}"


def folds(one: Composition, tally: Tally) -> None:
    """Folded is unfolded; what is kept says why; what was folded once is folded."""
    model = tally.compiled(one)
    inputs = batch(model, "right")
    want = logits(model, inputs)
    merged, report = merge(model)
    assert_close(merged, inputs, logits(merged, inputs), want)
    assert len(report.outcomes) == len(model.plan.edits)
    assert all(outcome.note for outcome in report.outcomes)
    assert torch.equal(logits(model, inputs), want)  # it worked on a copy
    if not report.kept:
        assert type(merged) is type(one.backbone())
        return
    assert len(report.kept) == len(merged.plan.edits)
    twice, second = merge(merged)
    assert second.folded == () and [o.note for o in second.kept] == [o.note for o in report.kept]
    tensors = twice.deltas.values()
    assert tensors.keys() == merged.deltas.values().keys()
    assert all(torch.equal(tensors[k], v) for k, v in merged.deltas.values().items())
    assert torch.equal(logits(twice, inputs), logits(merged, inputs))


def saves(one: Composition, tally: Tally) -> None:
    """Saved is loaded; loaded is saved, byte for byte; counts are those of the tensors."""
    model = tally.compiled(one)
    with torch.no_grad():
        for free in model.plan.unfrozen:
            model.get_parameter(free.path).add_(0.1)
    inputs = batch(model, "right")
    want = logits(model, inputs)
    with tempfile.TemporaryDirectory() as folder:
        for form in ("training", "stored"):
            path = Path(folder, form)
            model.save_pretrained(path / "first", stored=form == "stored")
            again = peftc.load(path / "first", backbone=one.backbone())
            tolerance = 0 if form == "training" else TOLERANCE  # constants are evaluated once
            assert_close(model, inputs, logits(again, inputs), want, tolerance)
            again.save_pretrained(path / "second")
            assert files(path / "first") == files(path / "second")
            counts_are_of_tensors(again)
        counts = peftc.load(Path(folder, "stored", "first"), backbone=one.backbone())
        assert counts.plan.parameters.stored == model.plan.parameters.stored


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


def saves_what_is_merged(one: Composition, tally: Tally) -> None:
    """What merge leaves is a model as any other: it is saved, loaded and counted."""
    merged, report = merge(tally.compiled(one))
    inputs = batch(merged, "right")
    want = logits(merged, inputs)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "left")
        merged.save_pretrained(path)
        if not report.kept:
            again = type(merged).from_pretrained(path, dtype=one.dtype)
            again.config._attn_implementation = one.attention
            assert torch.equal(logits(again.eval(), inputs), want)
            return
        counts_are_of_tensors(merged)
        again = peftc.load(path, backbone=peftc.detach(merged))
        assert_close(again, inputs, logits(again, inputs), want, 0)
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
    """Some modules in another mode, some parameters frozen: a model as it comes from a user."""
    model.train(draw.random() < 0.5)
    for module in model.modules():
        if draw.random() < 0.2:
            module.training = not module.training
    for weight in model.parameters():
        weight.requires_grad_(draw.random() < 0.7)
    return model


def detaches(one: Composition, tally: Tally) -> None:
    """Plan changes nothing; detach gives the backbone back, but for what the spec unfroze."""
    backbone = mixed(one.backbone(), random.Random(repr(one)))
    before, inputs = state(backbone), batch(backbone, "right")
    try:
        peftc.plan(backbone, one.specs())
    except PlanError as error:
        assert_same(state(backbone), before)
        with pytest.raises(PlanError):
            peftc.compile(backbone, one.specs())
        assert_same(state(backbone), before)
        raise Discarded from error
    assert_same(state(backbone), before)
    model = stir(peftc.compile(backbone, one.specs()), 0.2)
    model(**inputs)
    model.train()
    model(**inputs).logits.square().mean().backward()
    model.eval()
    logits(model, inputs)
    assert peftc.detach(model) is backbone
    assert_same(state(backbone), before)


def commutes(one: Composition, tally: Tally) -> None:
    """Edits that share no value may stand in any order."""
    model = tally.compiled(one)
    if shares(model, one.family):
        return
    turned = replace(one, parts=one.parts[::-1])
    other, inputs = peftc.compile(turned.backbone(), turned.specs()), batch(model, "right")
    values = other.deltas.values()
    assert values.keys() == model.deltas.values().keys()
    with torch.no_grad():
        for path, value in model.deltas.values().items():
            values[path].copy_(value)
    assert_close(model, inputs, logits(other, inputs), logits(model, inputs), 1e-9)
    folded = merge(other)[0]
    assert_close(model, inputs, logits(folded, inputs), logits(model, inputs))


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
        written[one] & (read[other] | written[other])
        for one in written
        for other in written
        if one != other
    )


@st.composite
def strangers(draw: Callable[..., Any], families: tuple[str, ...]) -> Composition:
    """Two or three formulas at places that seldom share a value."""
    family = draw(st.sampled_from(families))
    groups = [g for g in GROUPS if set(g) & places(family).keys()]
    chosen = draw(st.lists(st.sampled_from(groups), min_size=2, max_size=3, unique=True))
    parts = [draw(formulas(family, f"formula_{i}", kinds)) for i, kinds in enumerate(chosen)]
    attention = "eager" if family in EAGER else draw(st.sampled_from(("sdpa", "eager")))
    return Composition(family, attention, tuple(parts))


GROUPS = (
    ("attention.q",),
    ("attention.k",),
    ("attention.v",),
    ("attention", "attention.o"),
    ("attention.heads",),
    ("ffn.up",),
    ("ffn.gate",),
    ("ffn", "ffn.down", "ffn.hidden"),
    ("norm",),
    ("embedding",),
)

DAMAGE: dict[str, Callable[[Path], object]] = {
    "no tensors": lambda path: (path / "model.safetensors").unlink(),
    "half the tensors": lambda path: (path / "model.safetensors").write_bytes(
        (path / "model.safetensors").read_bytes()[:-7]
    ),
    "no manifest": lambda path: (path / "peftc.json").unlink(),
    "half a manifest": lambda path: (path / "peftc.json").write_text("{"),
    "another method": lambda path: (path / "peftc.json").write_text(
        (path / "peftc.json").read_text().replace('"training"', '"stored?"')
    ),
}


def fails_without_a_trace(one: Composition, tally: Tally) -> None:
    """A spec that does not fit, or damaged files: an error, and everything as it was."""
    draw = random.Random(repr(one))
    model = tally.compiled(one)
    backbone = mixed(one.backbone(), draw)
    before = state(backbone)
    wrong = peftc.load_spec("lora", r=10**6) if draw.random() < 0.3 else nowhere()
    with pytest.raises(PeftcError):
        peftc.compile(backbone, [*one.specs(), wrong])
    assert_same(state(backbone), before)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "deltas")
        model.save_pretrained(path)
        DAMAGE[draw.choice(sorted(DAMAGE))](path)
        with pytest.raises(PeftcError):
            peftc.load(path, backbone=backbone)
    assert_same(state(backbone), before)


def nowhere() -> Any:
    text = "deltas: [{at: {op: linear, scope: no.such.module}, rewrite: {h: h * 2}}]"
    return parse_spec(text, "nowhere.yaml")


def compiles_twice(one: Composition, tally: Tally) -> None:
    """A second compilation of an attached backbone is refused, or each works as if it were alone."""
    first = tally.compiled(one)
    inputs = batch(first, "right")
    backbone = one.backbone()
    alone = logits(peftc.compile(one.backbone(), "norm_tuning"), inputs)
    model = stir(peftc.compile(backbone, one.specs()), 0.2)
    want, flags = logits(model, inputs), trains(model)
    try:
        second = peftc.compile(backbone, "norm_tuning")
    except PeftcError:
        pass
    else:
        assert torch.equal(logits(second, inputs), alone)
        assert trains(second)
        second.train()
    assert trains(model) == flags
    assert torch.equal(logits(model, inputs), want)


def trains(model: PreTrainedModel) -> set[str]:
    return {name for name, value in model.named_parameters() if value.requires_grad}


def copies(one: Composition, tally: Tally) -> None:
    """A deep copy gives the same and shares nothing."""
    model = tally.compiled(one)
    inputs = batch(model, "right")
    want = logits(model, inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(logits(twin, inputs), want)
    mine = {value.data_ptr() for value in model.parameters()}
    assert not mine & {value.data_ptr() for value in twin.parameters()}
    stir(twin, 1.0, seed=9)
    assert torch.equal(logits(model, inputs), want)


LAWS: dict[str, tuple[Callable[[Composition, Tally], None], Any]] = {
    "written_in_torch": (written_in_torch, compositions(tuple(WIRING), ROWS)),
    "commutes": (commutes, strangers(tuple(WIRING))),
    "folds": (folds, compositions()),
    "saves": (saves, compositions()),
    "saves_what_is_merged": (saves_what_is_merged, compositions()),
    "detaches": (detaches, compositions()),
    "fails_without_a_trace": (fails_without_a_trace, compositions()),
    "compiles_twice": (compiles_twice, compositions()),
    "copies": (copies, compositions()),
}


def never_ends(*_: object) -> None:
    raise TimeoutError(f"it has not ended after {PATIENCE} seconds")


def hold(law: Callable[[Composition, Tally], None], strategy: Any, count: int, start: int) -> None:
    """The law holds of `count` random examples; of all that were drawn, at most a tenth were refused."""
    tally = Tally()

    @seed(start)
    @settings(
        max_examples=count,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        print_blob=False,
    )
    @given(strategy)
    def check(one: Any) -> None:
        tally.tried += 1
        signal.alarm(PATIENCE)  # a compiler that never ends is a fault as any other
        try:
            law(one, tally)
        except Discarded:
            tally.refused += 1
        finally:
            signal.alarm(0)

    signal.signal(signal.SIGALRM, never_ends)
    check()
    assert tally.tried >= count // 2, "the strategy has too few examples"
    assert tally.refused * 10 <= tally.tried, f"{tally.refused} of {tally.tried}: {tally.last}"


@pytest.mark.parametrize("law", LAWS)
def test_law(law: str) -> None:
    hold(*LAWS[law], EXAMPLES, 0)


@pytest.mark.slow
@pytest.mark.parametrize("law", LAWS)
def test_law_at_length(law: str, start: int) -> None:
    hold(*LAWS[law], MANY, start)
