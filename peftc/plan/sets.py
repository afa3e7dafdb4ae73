"""Sets: the plans of several specs for one model as one, where each was made by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from peftc.language.spec import Spec, combine
from peftc.plan.checks import behind_rows
from peftc.plan.counts import Counts, Unfrozen, count
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan, PlanError


def under(plan: Plan, name: str) -> Plan:
    """The plan with the tensors of its deltas below `name`; at their own paths where there is none."""
    return replace(plan, edits=tuple(edit.under(name) for edit in plan.edits))


def nothing(plan: Plan) -> Plan:
    """What no spec does to the model of `plan`."""
    return replace(
        plan,
        spec=Spec(name="none", title="No deltas", arguments={}, entries=()),
        edits=(),
        unfrozen=(),
        misses=(),
        matches=(),
        parameters=Counts(plan.parameters.backbone, 0, 0, 0),
    )


def together(plans: Sequence[Plan]) -> Plan:
    """The first plan, and behind it what the others do. Raises PlanError where two train one weight of the
    backbone, or one acts on tokens behind the rows of another."""
    if len(plans) == 1:
        return plans[0]
    spec = combine([plan.spec for plan in plans])
    edits: list[Edit] = []
    unfrozen: list[Unfrozen] = []
    first = 0
    for plan in plans:
        edits += [edit.under(edit.of, first) for edit in plan.edits]
        unfrozen += [replace(one, index=first + one.index) for one in plan.unfrozen]
        first += len(plan.spec.entries)
    paths = [one.path for one in unfrozen]
    problems = [f"'{one}' is trained by two of them" for one in paths if paths.count(one) > 1][:1]
    problems += behind_rows(edits)
    if problems:
        raise PlanError("\n".join(problems))
    matches = [match for plan in plans for match in plan.matches]
    return replace(
        plans[0],
        spec=spec,
        edits=tuple(edits),
        unfrozen=tuple(unfrozen),
        misses=tuple(miss for plan in plans for miss in plan.misses),
        matches=tuple(
            replace(one, entry=entry) for one, entry in zip(matches, spec.entries, strict=True)
        ),
        parameters=replace(count(edits, unfrozen, {}), backbone=plans[0].parameters.backbone),
    )


def apart(plans: Sequence[Plan], edits: Sequence[Edit]) -> list[tuple[Edit, ...]]:
    """Of `edits`, which came from those of `plans` together, each one's, as its own plan counts them."""
    found = []
    first = 0
    for one in plans:
        last = first + len(one.spec.entries)
        found.append(tuple(e.under(e.of, -first) for e in edits if first <= e.index < last))
        first = last
    return found
