"""The small picture that `peftc plan` shows: a layer, and where the deltas sit; for 80 columns, plain in a pipe."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich.console import Group, RenderableType
from rich.text import Text

from peftc.plan.plan import Plan
from peftc.report.sketch import Layer, Mark, joins, reads, runs, sketches

# One a delta of the spec, in turn.
STYLES = ("magenta", "cyan", "green", "yellow", "blue", "red")
MOST = 3  # sorts of layers; others are told by their number
_ARROW = " ─▶ "
Signs = Mapping[int, str]


# What a pipe gets for what a terminal draws.
PLAIN = str.maketrans(
    {"│": "|", "├": "+", "─": "-", "▶": ">", "▼": "v", "●": "*", "→": "->", "×": "x", "⊕": "+"}
    | {"…": "...", "−": "-"}
)


def picture(plan: Plan, width: int, plain: bool = False) -> RenderableType:
    """A layer of each sort in which the plan changes something; `plain` is ASCII."""
    found = sketches(plan)
    lines = [line for one in found[:MOST] for line in _layer(one, width, PLAIN if plain else {})]
    more = len(found) - MOST
    if more > 0:
        lines += [Text(), Text(f"and {more} more sorts of layers; peftc report draws all", "dim")]
    return Group(*lines)


def _layer(layer: Layer, width: int, signs: Signs) -> Iterator[Text]:
    yield Text()
    yield Text(title(layer), style="bold")
    for part in layer.parts:
        yield Text(" │".translate(signs), style="dim")
        sizes = " → ".join(map(str, dict.fromkeys(part.sizes))) if any(part.sizes) else ""
        first, last = " ├─ ".translate(signs), f"  {sizes}".translate(signs)
        yield Text.assemble((first, "dim"), part.title, (last, "dim"))
        for mark in part.marks:
            yield from _mark(mark, width, signs)
    yield Text(" ▼".translate(signs), style="dim")


def title(layer: Layer) -> str:
    """`decoder, layers 0-11: 12 alike`."""
    numbers = [one for one in layer.layers if one is not None]
    if not numbers:
        return f"{layer.stack}, outside of its layers"
    if len(numbers) == 1:
        return f"{layer.stack}, layer {numbers[0]}"
    return f"{layer.stack}, layers {runs(numbers)}: {len(numbers)} alike"


def _mark(mark: Mark, width: int, signs: Signs) -> Iterator[Text]:
    style = STYLES[mark.group % len(STYLES)]
    at = f" at {', '.join(mark.pieces)}" if mark.pieces else ""
    first, second = (f" │{' ' * n}".translate(signs) for n in (3, 5))
    said = f"● {mark.method}{at}, {mark.insertion}".translate(signs)
    yield Text.assemble((first, "dim"), (said, style))
    ways = (
        _way(mark, sizes, most).replace("× ", "* " if signs else "× ").translate(signs)
        for sizes, most in ((True, 9), (False, 9), (False, 2))
    )
    way = next((one for one in ways if len(one) <= width - len(second)), "")
    if way:
        yield Text.assemble((second, "dim"), (way, style))


def _way(mark: Mark, sizes: bool, most: int) -> str:
    """What a delta reads, its ops, and what it becomes part of."""
    stages = [
        f"{one.text} {one.sizes[0]}×{one.sizes[1]}" if sizes and one.sizes else one.text
        for one in mark.stages
    ]
    if len(stages) > most:
        stages[1:-1] = ["…"]
    if mark.insertion == "in place":
        return f"{', '.join(mark.ports)} trains"
    end = f"{'⊕ ' if joins(mark) else ''}{', '.join(mark.ports)}"
    start = [reads(mark)] if reads(mark) else []
    return _ARROW.join([*start, *stages, *([mark.scale] if mark.scale else []), end])
