"""One cell of the sweep: what becomes of a method on a class of models."""

from __future__ import annotations

import copy
import re
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from nature import Nature
from transformers import PreTrainedModel

import peftc
from peftc import merging
from peftc.driver import survey
from peftc.errors import CaptureError
from peftc.language.reader import load_spec
from peftc.language.spec import Spec
from peftc.plan.plan import PlanError

METHODS: dict[str, Spec] = {
    "lora": load_spec("lora", r=4, alpha=8),
    "mam": load_spec("mam", l=5, m=6, r=4),
    "prompt_tuning": load_spec("prompt_tuning", l=5),
    "houlsby_adapter": load_spec("houlsby_adapter", r=4),
}
# What is the bare function where all deltas are zero; rows in front are not.
ADDS = ("lora", "houlsby_adapter")
# A kind of site, and what eager code has where there is such a place.
PLACES = {"attention": "attention", "ffn": "feed_forward", "embedding": "table"}
HOLDS, NO_PLACE, REFUSED, FAILS = "holds", "no place", "refused", "fails"
# Of the largest output: float32, some layers, weights four times as wide as at the start of a training.
CLOSE = 2e-4
MASKED = 1e30  # what is more stands where a mask is


@dataclass(frozen=True)
class Cell:
    """What became of a method: one of four outcomes, the step at which, and why."""

    outcome: str
    step: str = ""
    reason: str = ""


class _Wrong(Exception):
    """A number that is not what it should be."""


class _Absent(Exception):
    """What a method needs, and eager code has not."""


def cell(
    method: str, model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], nature: Nature
) -> Cell:
    """The outcome of a shipped method on a model, of which this takes copies."""
    step = ["plan"]
    try:
        for name in _steps(method, model, inputs):
            step[0] = name
    except PlanError as error:
        if step[0] != "plan":
            return Cell(FAILS, step[0], _line(error))
        there = _contradicted(str(error), nature)
        return Cell(REFUSED if there else NO_PLACE, "plan", there or _line(error))
    except CaptureError as error:
        return Cell(REFUSED, step[0], " ".join(str(error).split())[:400])
    except _Absent as error:
        return Cell(NO_PLACE, step[0], str(error))
    except _Wrong as error:
        return Cell(FAILS, step[0], str(error))
    except Exception as error:  # whatever it is, a user would see it
        last = traceback.extract_tb(error.__traceback__)[-1]
        place = f"{Path(last.filename).name}:{last.lineno}"
        return Cell(FAILS, step[0], f"{type(error).__name__} ({place}): {_line(error)}")
    return Cell(HOLDS)


def _contradicted(problems: str, nature: Nature) -> str:
    """What is said to have no place, and has one in the eager code."""
    for at in re.findall(r"'([\w.]+)' of ", problems):
        what = PLACES.get(at.partition(".")[0], "")
        if what and getattr(nature, what):
            return f"'{at}': eager code has {getattr(nature, what)}; {_line(problems)}"
    return ""


def _steps(method: str, bare: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Each step by its name, before it is done."""
    spec, eager = METHODS[method], outputs(bare, inputs)
    yield "plan"
    peftc.plan(bare, spec, example=inputs)
    yield "compile"
    model = peftc.compile(copy.deepcopy(bare), spec, example=inputs).eval()
    yield "forward"
    if method in ADDS:
        with torch.no_grad():
            for one in model.deltas.parameters():
                one.zero_()
        _same(outputs(model, inputs), eager, "without deltas it is not the bare model")
    _stir(model)
    changed = outputs(model, inputs)
    moved = _distance(changed, eager)
    if not moved > CLOSE and not moved > 8 * _rounding(bare, inputs, eager):
        if model.plan.room and not _mixes(bare, inputs):
            raise _Absent("in eager code no token sees another")
        if not model.plan.room and not _hangs(model, bare, inputs):
            raise _Absent("in eager code nothing hangs on these places")
        raise _Wrong("deltas change nothing")
    yield "gradient"
    without = _unreached(model, bare, inputs)
    if without and model.plan.room and not _mixes(bare, inputs):
        raise _Absent("in eager code no token sees another")
    if without:
        raise _Wrong(f"no gradient reaches {len(without)} deltas; the first: {without[0]}")
    yield "train"
    torch.manual_seed(0)
    loss = _loss(model.train(), inputs)
    loss.backward()
    if not loss.isfinite():
        raise _Wrong("the loss is no number")
    model.eval()
    yield "save and load"
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        again = peftc.load(folder, copy.deepcopy(bare), example=inputs).eval()
    _same(outputs(again, inputs), changed, "what was loaded computes something else", 0.0)
    del again
    yield "fold"
    folded, report = peftc.merge(model, example=inputs)
    after = outputs(folded.eval(), inputs)
    if not _distance(after, changed) <= CLOSE:  # a model may round more; both do
        _same(after, changed, "folded is another function", 2 * _rounding(folded, inputs, after))
    if bare.can_generate():
        yield "generate"
        _generates(bare, model, None if report.kept else folded, inputs)


def _unreached(
    model: PreTrainedModel, bare: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> list[str]:
    """The deltas that no gradient reaches, with any of some values (a relu of few units may be dead with one), but for
    those at weights that none reaches in eager code either."""
    left = [one.path for edit in model.plan.edits for one in edit.parameters if one.trainable]
    for seed in (2, 3, 4):
        _stir(model, seed)
        _loss(model, inputs).backward()
        values = dict(model.deltas.named_parameters())
        left = [path for path in left if values[path].grad is None or not values[path].grad.any()]
        if not left:
            break
    _stir(model)
    if not left:
        return []
    eager = copy.deepcopy(bare).requires_grad_(True)
    _loss(eager, inputs).backward()
    dead = {k for k, v in eager.named_parameters() if v.grad is None or not v.grad.any()}
    values_of = {one.scope: one for one in survey(bare) if one.at == "attention.v"}
    unused = {
        one.path
        for edit in model.plan.edits
        for site in (edit.site, values_of.get(edit.site.scope, edit.site))
        if any(weight.path in dead for weight in site.weights.values())
        for one in edit.parameters
    }
    return [path for path in left if path not in unused]


def _hangs(
    model: PreTrainedModel, bare: PreTrainedModel, inputs: Mapping[str, torch.Tensor]
) -> bool:
    """Whether what the bare model gives changes with the weights at the places of the deltas."""
    other = copy.deepcopy(bare)
    paths = {one.path for edit in model.plan.edits for one in edit.site.weights.values()}
    with torch.no_grad():
        for path in paths:
            other.get_parameter(path).mul_(-1.5)
    return _distance(outputs(other, inputs), outputs(bare, inputs)) != 0


def _mixes(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> bool:
    """Whether what is said of a token, or of all, hangs on the second one too."""
    others = dict(inputs)
    others["input_ids"] = inputs["input_ids"].clone()
    others["input_ids"][:, 1] += 1
    one, other = (outputs(model, given) for given in (inputs, others))
    length = inputs["input_ids"].shape[1]
    for name, value in one.items():
        pairs = (value, other[name])
        if value.ndim > 1 and value.shape[1] == length:
            pairs = tuple(torch.cat([v[:, :1], v[:, 2:]], 1) for v in pairs)
        if not torch.equal(*pairs):
            return True
    return False


def _generates(
    bare: PreTrainedModel,
    model: PreTrainedModel,
    folded: PreTrainedModel | None,
    inputs: Mapping[str, torch.Tensor],
) -> None:
    """With a cache as without one, where no token sees a later one, and as what is folded writes in eager code."""
    given = {k: v for k, v in inputs.items() if not k.startswith(("decoder_", "labels"))}
    try:
        eager = [_written(bare, given, cached) for cached in (True, False)]
    except Exception:  # a class that says it generates, and does not on such inputs
        return
    ours = [_written(model, given, cached) for cached in (True, False)]
    if folded is not None:
        # Granite Speech writes without its adapters where it hears nothing.
        folded = folded if model.active_adapters() else bare
        for cached, mine in zip((True, False), ours, strict=True):
            if not torch.equal(mine.sequences, _written(folded, given, cached).sequences):
                raise _Wrong(f"tokens are not those of the folded model (cache: {cached})")
    if _alike(*eager) and _is_causal(bare, inputs) and not _alike(*ours):
        raise _Wrong("tokens with a cache are not those without")


def _alike(one: Any, other: Any) -> bool:
    """Whether the same tokens were written, of the same scores: with padding, eager code may have them by luck."""
    close = _distance(_numbered(one.logits), _numbered(other.logits)) < CLOSE
    return close and torch.equal(one.sequences, other.sequences)


def _numbered(several: Sequence[torch.Tensor]) -> dict[str, torch.Tensor]:
    return {str(i): one for i, one in enumerate(several)}


def _is_causal(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> bool:
    if model.config.is_encoder_decoder:
        return True
    shorter = {
        k: v[:, :-1] if k in ("input_ids", "attention_mask") else v for k, v in inputs.items()
    }
    whole, part = (outputs(model, one)["logits"] for one in (inputs, shorter))
    return part.ndim == 3 and _distance({"": whole[:, :-1]}, {"": part}) < CLOSE


def _written(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], cached: bool) -> Any:
    """Five tokens, greedily, with their scores."""
    options = dict(max_new_tokens=5, min_new_tokens=5, do_sample=False, num_beams=1)
    asked = dict(use_cache=cached, return_dict_in_generate=True, output_logits=True)
    with torch.no_grad():
        return model.generate(**inputs, **options, **asked)


def outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Floating outputs in evaluation mode."""
    with torch.no_grad():
        return _outputs(model, inputs)


def _outputs(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    fields = model(**inputs, **({"use_cache": False} if model.can_generate() else {}))
    return {
        k: v
        for k, v in fields.items()
        if isinstance(v, torch.Tensor) and v.is_floating_point() and v.numel()
    }


def _loss(model: PreTrainedModel, inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
    model.zero_grad()
    shown = (one.float() for one in _outputs(model, inputs).values())
    means = [one.masked_fill(one.abs() >= MASKED, 0).square().mean() for one in shown]
    return torch.stack(means).sum()


def _same(
    ours: Mapping[str, torch.Tensor],
    wanted: Mapping[str, torch.Tensor],
    otherwise: str,
    close: float = CLOSE,
) -> None:
    if missing := [name for name in wanted if name not in ours]:
        raise _Wrong(f"{otherwise}: there is no '{missing[0]}'")
    error = _distance(ours, wanted)
    if not error <= close:
        raise _Wrong(f"{otherwise}: {error:.1e} of the largest output")


def _distance(ours: Mapping[str, torch.Tensor], wanted: Mapping[str, torch.Tensor]) -> float:
    """The largest difference of any output, of its own largest; not a number where one is at another place."""
    found = 0.0
    for name, value in wanted.items():
        one, finite = ours[name], value.abs() < MASKED
        if one.shape != value.shape or not torch.equal(one.abs() < MASKED, finite):
            return float("nan")
        if finite.any():
            scale = max(float(value[finite].abs().max()), 1e-6)
            found = max(found, float((one - value)[finite].abs().max()) / scale)
    return found


def _rounding(
    model: PreTrainedModel, inputs: Mapping[str, torch.Tensor], found: Mapping[str, torch.Tensor]
) -> float:
    """How far float32 takes a model from what it computes."""
    full = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    return _distance(outputs(merging.wide(model), full), found)


def _stir(model: PreTrainedModel, seed: int = 2) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for one in model.deltas.parameters():
            drawn = torch.randn(one.shape, generator=generator) * 0.3
            one.copy_(drawn + 0.5 if one.ndim == 1 else drawn)  # a bias under which no relu is dead


def _line(error: object) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[0][:300]
