"""The certificate: what a compiled model computes, compared on a grid with what it should, and written beside it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import fx
from transformers import PreTrainedModel

from peftc.driver import outputs, program_of, sample
from peftc.errors import UncachedError
from peftc.graph.arguments import is_ids
from peftc.graph.facts import ModelFacts
from peftc.graph.grid import LENGTHS, Case, cases, fed, real
from peftc.graph.program import Program, scope_of
from peftc.graph.rows import longest_of
from peftc.language.resolved import digest
from peftc.merging import merge, wide
from peftc.model.compiled import CompiledModel, run_program
from peftc.model.saving import fingerprint_under
from peftc.rewrite.compared import CHOICES, Compared, choices_of
from peftc.rewrite.tolerance import SHARES
from peftc.store.directory import CERTIFICATES
from peftc.store.versions import versions

JSON, PAGE = CERTIFICATES
# How long what a decoder reads is, and (past, query) of its steps.
_QUERY = 5
STEPS = ((0, 7), (1, 1), (1, 7), (20, 1), (20, 7))
Outputs = Mapping[str, torch.Tensor]
Compute = Callable[[Mapping[str, torch.Tensor], Case], Outputs]


@dataclass(frozen=True)
class Row:
    """One comparison over a grid of `cases`: of the output that came nearest to its bound the largest difference and
    the mean one, `bound` and `why`; of all that is a distribution the mean KL in nats and the share of positions with
    the same likeliest label or word, each position behind the tokens that were given (teacher forcing).

    `scale` is its largest value. Without a bound it informs, and `holds` says whether something differs at all. `module`
    is the first whose output differs where the row does not hold. A row of one rewrite says how far it `moved` its
    module from what the backbone's gives.
    """

    what: str
    cases: int
    output: str
    scale: float
    error: float
    mean: float
    divergence: float
    agreement: float
    bound: float | None
    why: str
    holds: bool
    module: str = ""
    moved: float | None = None

    def __str__(self) -> str:
        verdict = "FAILED" if not self.holds else "info" if self.bound is None else "ok"
        limit = "" if self.bound is None else f"  (at most {self.bound:.1e})"
        first = f"; first in {self.module}" if self.module else ""
        return f"{verdict:<7} {self.what:<44} {self.error:.3g}{limit}{first}"


def number(what: str, found: float, bound: float | None, why: str = "") -> Row:
    """A row of one number, which must not exceed its bound; without one it informs."""
    holds = bound is None or found <= bound  # False for nan
    return Row(what, 1, "", 0.0, found, found, 0.0, 1.0, bound, why, holds)


def against(what: str, other: PreTrainedModel, model: PreTrainedModel, full: bool = False) -> Row:
    """A model of the same inputs and outputs that should compute the same, on a part of the grid or the `full` one."""

    def row(model: PreTrainedModel, other: PreTrainedModel) -> Row:
        ways = partial(_forward, model), partial(_forward, other)
        return _compared(model, what, _sizes(model), *ways, full)

    (found,) = _sure(lambda *pair: [row(*pair)], model, other)
    return found if found.holds else _located(found, model, other, sample(model))


def _sure(make: Callable[..., list[Row]], *models: PreTrainedModel) -> list[Row]:
    """Rows of models; where one does not hold in float32, those of copies in float64. A model of large activations, as
    T5, rounds more than its bound there; what is wrong is as wrong in float64."""
    rows = make(*models)
    if all(one.holds for one in rows) or models[0].dtype != torch.float32:
        return rows
    again = make(*map(wide, models))
    told = "; in float64, for float32 rounds {:.1e} here"
    return [
        replace(one, why=one.why + told.format(first.error))
        if not first.holds and one.holds
        else first
        for one, first in zip(again, rows, strict=True)
    ]


def _bound(model: PreTrainedModel) -> tuple[float, str]:
    share = SHARES.get(model.dtype, SHARES[torch.float32])
    kind = str(model.dtype).removeprefix("torch.")
    return share, f"{share:.1e} of the largest value: roundings of {kind}"


def rows_of(model: CompiledModel, full: bool = False) -> Iterator[Row]:
    """Of a compiled model, in evaluation mode: its lean graphs and those without lean passes, its steps from a cache
    and one forward, folded and not, each rewrite by itself, and, where its deltas are not zero, that it is not its
    backbone."""
    yield from _sure(lambda one: [_lean(one, full)], model)
    if _caches(model):
        yield from _sure(lambda one: [_stepped(one, full)], model)
    with torch.no_grad():
        merged, report = merge(model, tolerance=math.inf, dequantize=True)
    what = f"folded ({len(report.folded)} of {len(report.outcomes)}) against unfolded"
    yield against(what, merged, model, full)
    yield from _sure(lambda *pair: [*_each(*pair)], model, merged)
    yield number("folded twice against folded once", _fold_again(merged), 0)
    ways = partial(_forward, model.backbone), partial(_forward, model)
    bare = _compared(model, "compiled against its backbone", _sizes(model), *ways, full)
    yield replace(bare, bound=None, why="", holds=bare.error > 0 or not _moved(model))


def _lean(model: CompiledModel, full: bool) -> Row:
    what = "lean graphs against graphs without passes"
    ways = partial(_plain, model), partial(_forward, model)
    return _compared(model, what, _sizes(model), *ways, full)


def _stepped(model: CompiledModel, full: bool) -> Row:
    sizes = [(p + q, p, q) for p, q in STEPS]
    return _compared(
        model, "steps from a cache against one forward", sizes, *_both_ways(model), full
    )


def _each(model: CompiledModel, merged: PreTrainedModel) -> Iterator[Row]:
    """A row a rewrite, of one batch: what its module gives, folded and not, and how far that is from the backbone's."""
    (share, why), inputs = _bound(model), sample(model)
    ways = [_by_module(one, inputs) for one in (model, merged, model.backbone)]
    for edit in model.plan.edits:
        weight = edit.site.weights.get("W")
        own = edit.site.scope if weight is None else weight.path.rpartition(".")[0]
        module = own if all(own in way for way in ways) else edit.site.scope
        mine, folded, bare = (way.get(module) for way in ways)
        if mine is None or folded is None or folded.shape != mine.shape:
            continue  # of a module that keeps nothing of its own in this graph
        seen = Compared()
        seen.see(mine, folded, edit.name, False)
        moved = seen.scale  # of rows in front: what was not there moved by what it is
        if bare is not None and bare.shape == mine.shape:
            moved = float((mine - bare).abs().max())
        numbers = seen.scale, seen.error, seen.mean, 0.0, 1.0
        bound = share * seen.scale
        yield Row(edit.name, 1, "", *numbers, bound, why, seen.error <= bound, moved=moved)


# What tensors start as that make a delta nothing at first.
_STARTS = {"zeros": 0, "ones": 1}


def _moved(model: CompiledModel) -> bool:
    """Whether a delta is something: a tensor that starts as zeros or ones is no longer; where none does, any."""
    values = model.deltas.values()
    starts = {
        path: _STARTS[one.init] for path, one in model.plan.tensors.items() if one.init in _STARTS
    }
    if starts:
        return any(bool((values[path] != start).any()) for path, start in starts.items())
    return any(bool(values[path].any()) for path in model.plan.tensors)


def _fold_again(merged: PreTrainedModel) -> float:
    """How far a second merge moves the folded weights."""
    if not isinstance(merged, CompiledModel):
        return 0.0  # a plain checkpoint: there is nothing left that could fold
    with torch.no_grad():
        twice, report = merge(merged, tolerance=math.inf, dequantize=True)
    before, after = dict(merged.named_parameters()), dict(twice.named_parameters())
    moved = [float((after[k] - v).detach().abs().max()) for k, v in before.items() if k in after]
    return max(moved) + len(report.folded)


def _forward(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], _: Case) -> Outputs:
    return outputs(model, inputs)


def _plain(model: CompiledModel, inputs: Mapping[str, torch.Tensor], _: Case) -> Outputs:
    """The graph as deltas were inserted, without a pass that makes it lean."""
    with torch.no_grad():
        found = run_program(model, program_of(model, "forward", inputs), inputs)
    return {k: v for k, v in found.items() if isinstance(v, torch.Tensor)}


def _caches(model: PreTrainedModel) -> bool:
    """Whether it writes texts behind a cache."""
    facts, inputs = ModelFacts.read(model), sample(model)
    if not facts.generates or facts.main_input not in inputs:
        return False
    with torch.no_grad():
        try:
            return model(**inputs, use_cache=True).get(facts.cache) is not None
        except UncachedError:
            return False


def _both_ways(model: PreTrainedModel) -> tuple[Compute, Compute]:
    """Logits of new tokens, in one forward and behind a cache of the tokens before them."""
    facts = ModelFacts.read(model)
    ids = "decoder_input_ids" if facts.encoder_decoder else "input_ids"

    def at_once(inputs: Mapping[str, torch.Tensor], case: Case) -> Outputs:
        return {"logits": outputs(model, inputs)["logits"][:, case.past :]}

    def in_steps(inputs: Mapping[str, torch.Tensor], case: Case) -> Outputs:
        cache, kept = None, dict(inputs)
        if facts.encoder_decoder:
            rest = {k: v for k, v in inputs.items() if k in (facts.main_input, "attention_mask")}
            kept["encoder_outputs"] = model.get_encoder()(**rest)
            kept.pop(facts.main_input)
        with torch.no_grad():
            for tokens in (slice(0, case.past), slice(case.past, None)):
                part = inputs[ids][:, tokens]
                if not part.shape[1]:
                    continue
                given = {**kept, ids: part, facts.cache: cache, "use_cache": True}
                if "attention_mask" in kept and not facts.encoder_decoder:
                    given["attention_mask"] = kept["attention_mask"][:, : tokens.stop]
                out = model(**given)
                cache = out.get(facts.cache)
        return {"logits": out["logits"]}

    return at_once, in_steps


def _sizes(model: PreTrainedModel) -> list[tuple[int, int, int]]:
    texts = ModelFacts.read(model).main_input == "input_ids"
    return [(length, 0, _QUERY) for length in (LENGTHS if texts else (0,))]


def _compared(
    model: PreTrainedModel,
    what: str,
    sizes: list[tuple[int, int, int]],
    want: Compute,
    got: Compute,
    full: bool,
) -> Row:
    (share, why), inputs = _bound(model), sample(model)
    facts = ModelFacts.read(model)
    most = longest_of(model)
    generator = torch.Generator().manual_seed(0)
    seen: dict[str, Compared] = {}
    tried = 0
    for case in cases(sizes, 4096 if most is None else most, full):
        batch = _fit(facts, inputs, case, generator)
        batch = {name: one.to(model.device) for name, one in batch.items()}
        one, other = want(batch, case), got(batch, case)
        tried += 1
        for name in one.keys() & other.keys():
            pair = (_counting(facts, batch, name, value) for value in (one[name], other[name]))
            left, right = pair
            seen.setdefault(name, Compared()).see(left, right, case, name in CHOICES)
    divergence, agreement, _ = choices_of(seen.values())
    name, nearest = max(seen.items(), key=lambda one: one[1].error / (one[1].scale or 1.0))
    bound = share * nearest.scale
    holds = all(one.error <= share * one.scale for one in seen.values())  # False for nan
    return Row(
        what,
        tried,
        name,
        nearest.scale,
        nearest.error,
        nearest.mean,
        divergence,
        agreement,
        bound,
        why,
        holds,
    )


def _fit(
    facts: ModelFacts, inputs: Mapping[str, torch.Tensor], case: Case, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A batch; of a decoder that is stepped through, all tokens, the query's and those before."""
    whole = Case(case.rows, case.length, 0, case.past + case.query, case.padding)
    made = fed(inputs, whole, generator)
    for name, one in made.items():
        if is_ids(name, one) and facts.reads_its_end:
            one[one == facts.end] = facts.ordinary
            one[:, -1] = facts.end  # type: ignore[assignment]  # such a head needs one
    return made


def _counting(
    facts: ModelFacts, batch: Mapping[str, torch.Tensor], name: str, value: torch.Tensor
) -> torch.Tensor:
    """What of an output is of tokens that count: what padding gives is no one's business."""
    mask = batch.get("attention_mask")
    own = not facts.encoder_decoder or name.startswith("encoder_")
    along = mask is not None and own and value.ndim == 3 and value.shape[1] <= mask.shape[1]
    spans = mask is not None and name in CHOICES[1:]
    return real(value, mask, 1 if along or spans else None)


def _located(
    row: Row, model: PreTrainedModel, other: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> Row:
    """The first module, in the order of the graph, whose output differs by a larger share than the row allows."""
    share = (row.bound or 0.0) / max(row.scale, 1e-30)
    second = _by_module(other, inputs)
    for scope, value in _by_module(model, inputs).items():
        theirs = second.get(scope)
        if theirs is None or theirs.shape != value.shape:
            continue
        if not (value - theirs).abs().max() <= share * value.abs().max():
            return replace(row, module=scope)
    return row


class _Watching(fx.Interpreter):
    """Keeps the last tensor of each module."""

    def __init__(self, program: Program) -> None:
        super().__init__(fx.GraphModule(torch.nn.Module(), program.graph))
        self.found: dict[str, torch.Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        if n.op == "call_function" and isinstance(value, torch.Tensor) and value.numel():
            scope = scope_of(n)
            self.found.pop(scope, None)
            self.found[scope] = value.double()
        return value


def _by_module(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    watching = _Watching(program := program_of(model, "forward", inputs))
    with torch.no_grad():
        run_program(model, program, inputs, watching.run)
    return watching.found


def write(directory: Path, about: Mapping[str, Any], rows: Sequence[Any]) -> None:
    """Put a certificate, for programs and for readers, into a directory, each whole or not at all."""
    data = {**about, "holds": all(one.holds for one in rows), "rows": [asdict(one) for one in rows]}
    lines = [f"# Certificate: {'holds' if data['holds'] else 'does NOT hold'}", ""]
    lines += [f"- {name}: {_told(value)}" for name, value in about.items()]
    lines += [
        "",
        "| | cases | largest difference | mean | at most | KL | same choice |",
        "|---|" + "---|" * 6,
    ]
    lines += [_line(one) for one in rows]
    bounds = dict.fromkeys(one.why for one in rows if one.why)
    lines += ["", *(f"- a bound is {one}" for one in bounds), ""]
    for name, text in ((JSON, json.dumps(data, indent=1) + "\n"), (PAGE, "\n".join(lines))):
        half = directory / f".{name}"
        half.write_text(text)
        half.replace(directory / name)


def _line(one: Row) -> str:
    """A row of the page; what is one number has no scale, no mean and no choices."""
    what = one.what if one.holds else f"FAILED: {one.what}"
    what += f" (first in {one.module})" if one.module else ""
    bound = "" if one.bound is None else f"{one.bound:.1e}"
    if one.moved is not None:
        what += f" (moved by {one.moved:.1e})"
    if one.cases == 1 and not one.scale:
        return f"| {what} | | {one.error:.3g} | | {bound} | | |"
    cells = f"{one.cases} | {one.error:.1e} of {one.scale:.1e} | {one.mean:.1e} | {bound}"
    return f"| {what} | {cells} | {one.divergence:.1e} | {one.agreement:.1%} |"


def about(model: CompiledModel) -> dict[str, Any]:
    """What a certificate is of, and was made with."""
    return {
        "class": type(model).__name__,
        "dtype": str(model.dtype).removeprefix("torch."),
        "versions": versions(),
        "specs": {name: digest(plan.spec) for name, plan in model.parts().items()},
        "backbone": fingerprint_under(model, model.in_use),
    }


def _told(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_told(v)}" for k, v in value.items())
    return str(value)[:16] if isinstance(value, str) and len(value) == 64 else str(value)
