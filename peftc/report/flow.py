"""The flow of a layer: its sub-layers, norms and sums in the order of the graph, and where each sum's other side is from."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from peftc.language.ports import SITES
from peftc.plan.plan import Plan
from peftc.report.changes import FOLDED, INSERTED, Step
from peftc.report.sketch import Layer, Part

ADD = "+"


@dataclass(frozen=True)
class Element:
    """What stands in the column of a layer: a sub-layer, a sum, or what is between these. `other` is the element (-1:
    what the layer reads) that a sum adds to what comes from below."""

    what: str
    part: Part | None = None
    other: int | None = None


def elements(layer: Layer, plan: Plan, steps: Sequence[Step]) -> tuple[Element, ...]:
    """The column of a layer, from its input on."""
    path = layer_path(layer.parts[0].scope)
    mine = [one for one in steps if any(p == path for p, _ in one.modules)] if path else []
    if not mine:
        return tuple(Element(part.title, part) for part in layer.parts)
    between = {one.scope: SITES[one.at].between for one in plan.sites if SITES[one.at].between}
    found = sorted(_spans(layer, path, mine, between), key=lambda one: one[0])
    elements: list[Element] = []
    owners: list[int] = []  # of each step, the element that it came of
    ends = {first: (last, element) for first, last, element in found}
    names = {step.name: i for i, step in enumerate(mine)}
    now, until = -1, -1
    for i, step in enumerate(mine):
        if i in ends and i > until:
            until, element = ends[i]
            elements.append(element)
            now = len(elements) - 1
        elif i > until and _is_sum(step):
            others = [owners[names[one]] if one in names else -1 for one in step.reads]
            other = min(others, default=-1)
            elements.append(Element(ADD, other=other if other < now else None))
            now = len(elements) - 1
            owners.append(now)
            continue
        owners.append(now if i <= until else max(_sources(step, names, owners), default=-1))
    return tuple(elements)


def layer_path(scope: str) -> str:
    """The path of the layer that a module is in: up to its first number."""
    found = re.match(r"(?:.*?\.)?\d+(?=\.|$)", scope)
    return found[0] if found else ""


def _sources(step: Step, names: Mapping[str, int], owners: Sequence[int]) -> list[int]:
    return [owners[names[one]] if one in names else -1 for one in step.reads]


def _spans(
    layer: Layer, path: str, steps: Sequence[Step], between: Mapping[str, str]
) -> Iterator[tuple[int, int, Element]]:
    """The first and last step of each sub-layer, and of what is between them."""
    taken: list[range] = []
    for part in layer.parts:
        places = [i for i, step in enumerate(steps) if _is_of(step, part, path)]
        if places:
            taken.append(range(places[0], places[-1] + 1))
            yield places[0], places[-1], Element(part.title, part)
    for scope, title in sorted(between.items()):
        places = [i for i, one in enumerate(steps) if any(p == scope for p, _ in one.modules)]
        if places and not any(places[0] in one for one in taken):
            yield places[0], places[-1], Element(title)


def _is_of(step: Step, part: Part, path: str) -> bool:
    if step.state in (INSERTED, FOLDED):
        return False
    if part.scope != path and any(one == part.scope for one, _ in step.modules):
        return True
    return any(one.path in part.paths for one in step.tensors)


def _is_sum(step: Step) -> bool:
    kept = step.state not in (INSERTED, FOLDED)
    return kept and step.op in ("add", "add_") and len(step.reads) == 2 and not step.minor
