"""What is left of a plan once some of its edits folded or became constants: a plan of its own."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace

from peftc.plan.counts import count, numel
from peftc.plan.edit import Edit
from peftc.plan.plan import Plan

# An edit among those of its plan: the number of its entry, and the name of its site.
Key = tuple[int, str]


def keep(plan: Plan, edits: Sequence[Edit]) -> Plan:
    """The plan with these of its edits, in the form that they have now, and numbers of theirs alone.

    `matches` keeps a row for each entry of the spec, of no site where all of it is gone; a miss goes with the
    last edit of its method.
    """
    counts = count(edits, plan.unfrozen, {})
    matches = []
    for index, match in enumerate(plan.matches):
        if not match.entry.train:
            mine = [edit for edit in edits if edit.index == index]
            match = replace(match, sites=len(mine), parameters=numel(mine))
        matches.append(match)
    methods = {edit.entry.method for edit in edits}
    return replace(
        plan,
        edits=tuple(edits),
        misses=tuple(miss for miss in plan.misses if miss.entry in methods),
        matches=tuple(matches),
        parameters=replace(counts, backbone=plan.parameters.backbone),
    )


def named(edits: Sequence[Edit], keys: Collection[Key]) -> tuple[Edit, ...]:
    """The edits of these keys. Raises KeyError with a key that none has."""
    by_key = {edit.key: edit for edit in edits}
    wanted = set(keys)
    for one in keys:
        by_key[one]
    return tuple(edit for one, edit in by_key.items() if one in wanted)
