"""The grid: sizes and paddings of batches on which two ways to compute the same are compared."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from dataclasses import astuple, dataclass

import torch
from torch.nn import functional

from peftc.graph.arguments import argument

ROWS = (1, 3)
LENGTHS = (1, 7, 33)
PADDINGS = ("none", "left", "right")


@dataclass(frozen=True)
class Case:
    """Sizes of one batch: `length` is that of the mask, `past` and `query` a step's; `padding` is none, left or right
    and reaches into the first row."""

    rows: int
    length: int
    past: int
    query: int
    padding: str

    def __str__(self) -> str:
        tokens = f" × {self.length} tokens" if self.length else ""
        step = f", {self.past} past and {self.query} new" if self.past or self.query else ""
        padded = "" if self.padding == "none" else f", padded {self.padding}"
        return f"a batch of {self.rows}{tokens}{step}{padded}"


def cases(sizes: Iterable[tuple[int, int, int]], most: int, full: bool = True) -> list[Case]:
    """Each (length, past, query) with each padding and number of rows; a single token has nothing to pad. Of these, if
    not `full`, so many that any two values of two axes that can meet do meet."""
    every = [
        Case(rows, *one, padding)
        for one in sizes
        if one[0] <= most
        for padding in (PADDINGS if one[0] > 2 else ("none",))
        for rows in ROWS
    ]
    return every if full else _paired(every)


def _paired(every: Iterable[Case]) -> list[Case]:
    """The cases that show all pairs of values; taken greedily, those first that show most."""
    pairs = {one: frozenset(itertools.combinations(enumerate(astuple(one)), 2)) for one in every}
    left = set().union(*pairs.values())
    chosen = []
    while left:
        chosen.append(best := max(pairs, key=lambda one: len(pairs[one] & left)))
        left -= pairs[best]
    return sorted(chosen, key=astuple)


def mask_of(case: Case, length: int) -> torch.Tensor:
    """[rows, length] of ones, two zeros in the first row where it is padded."""
    mask = torch.ones(case.rows, length, dtype=torch.long)
    if case.padding != "none":
        mask[0, slice(0, 2) if case.padding == "left" else slice(-2, None)] = 0
    return mask


def drawn(values: torch.Tensor, size: tuple[int, int], generator: torch.Generator) -> torch.Tensor:
    """Values of a tensor, in any order."""
    pool = values.reshape(-1).cpu()
    return pool[torch.randint(0, len(pool), size, generator=generator)]


def fed(
    inputs: Mapping[str, torch.Tensor], case: Case, generator: torch.Generator
) -> dict[str, torch.Tensor]:
    """A batch for a case: ids of `inputs` anew, padded as it says, in two segments where there are segments; what a
    decoder reads, as long as the case's query; noise for what is no text."""
    made: dict[str, torch.Tensor] = {}
    for name, real in inputs.items():
        row = argument(name)
        if row.role == "mask":
            made[name] = mask_of(case, case.length)
        elif row.role == "segments":
            made[name] = (torch.arange(case.length) * 2 // case.length).repeat(case.rows, 1)
        elif real.is_floating_point():
            made[name] = torch.randn((case.rows, *real.shape[1:]), generator=generator).to(real)
        else:
            length = case.query if row.follows == "target" else case.length
            made[name] = drawn(real, (case.rows, length), generator)
    return made


def real(value: torch.Tensor, mask: torch.Tensor | None, axis: int | None) -> torch.Tensor:
    """`value` where `mask` [batch, length] is set along `axis`, from the end on: the rows in front are no padding."""
    if axis is None or mask is None:
        return value
    size = value.shape[axis]
    mask = functional.pad(mask, (max(size - mask.shape[1], 0), 0), value=1).bool()
    return value.movedim(axis, 1)[mask[:, mask.shape[1] - size :]]
