"""Budgets: the size of a method that fits a number of parameters, by planning it at one size after another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from peftc.errors import PeftcError
from peftc.language.reader import parse_spec
from peftc.language.spec import Spec
from peftc.plan.plan import Plan

MOST = 1 << 20  # the largest size that is tried
Planner = Callable[[Spec], Plan]


class BudgetError(PeftcError):
    """A budget that cannot be read, or that no size of the method fits."""


@dataclass(frozen=True)
class Solved:
    """The largest size within the budget, and the plan at it."""

    argument: str
    value: int
    plan: Plan


def elements(budget: str, backbone: int) -> int:
    """`6.7%` of the backbone, or a number of weights such as `2000000`. Raises BudgetError."""
    text = budget.strip().replace("_", "")
    share = text.endswith("%")
    try:
        value = float(text.rstrip("%"))
    except ValueError:
        value = -1.0
    if not 0 < value < 1e15:
        raise BudgetError(f"'{budget}' is no budget; write 6.7% or a number of weights")
    return int(value * backbone / 100) if share else int(value)


def solve(spec: Spec, budget: str, plan: Planner) -> Solved:
    """The largest value of the spec's `auto` argument, or else of the one that weighs most, whose weights,
    as the paper counts them, stay within the budget. Raises BudgetError: no size fits, none is to be decided."""
    if not spec.text:
        raise BudgetError(f"'{spec.name}' is several specs, which have no one size; size each")
    argument = spec.auto or _heaviest(spec, plan)
    step, least = _step(spec, argument, plan)
    limit = elements(budget, least.parameters.backbone)

    def fits(count: int) -> bool:
        return plan(at(spec, argument, count * step)).parameters.weights <= limit

    if least.parameters.weights > limit:
        raise BudgetError(
            f"{spec.name} takes {least.parameters.weights:,} weights at {argument} = {step}, more than "
            f"{limit:,} ({budget})"
        )
    low, high = 1, 2
    while high <= MOST and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return Solved(argument, low * step, plan(at(spec, argument, low * step)))


def _step(spec: Spec, argument: str, plan: Planner) -> tuple[int, Plan]:
    """The smallest size that the method takes, and its plan: some must divide by another argument."""
    first: PeftcError | None = None
    for step in range(1, 65):
        try:
            return step, plan(at(spec, argument, step))
        except PeftcError as error:
            first = first or error
    assert first is not None
    raise first


def at(spec: Spec, argument: str, value: int) -> Spec:
    """The spec with one argument set: read anew, for sizes of what it uses may follow from it."""
    given = {k: v for k, v in spec.arguments.items() if k != spec.auto}
    made = parse_spec(spec.text, spec.path, **{**given, argument: value})
    worded = zip(made.entries, spec.entries, strict=True)  # words may have been given since
    return replace(made, entries=tuple(replace(new, words=old.words) for new, old in worded))


def _heaviest(spec: Spec, plan: Planner) -> str:
    """The argument that adds most weights when it doubles."""

    def growth(name: str) -> int:
        value = int(spec.arguments[name])
        try:
            before, after = (plan(at(spec, name, v)).parameters.weights for v in (value, 2 * value))
        except PeftcError:  # twice as much does not fit the model
            return 0
        return after - before

    found = {name: growth(name) for name, v in spec.arguments.items() if isinstance(v, int)}
    heaviest = max(found, key=found.__getitem__, default="")
    if not found or found[heaviest] <= 0:
        raise BudgetError(f"{spec.name} has no argument that sets its size")
    return heaviest
