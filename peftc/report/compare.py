"""Two specs on one model, side by side: what each changes, trains and costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape

from peftc.plan.design import rows as design
from peftc.report.costs import Costs
from peftc.report.page import figures, html, table
from peftc.report.report import FIGURES, pictures
from peftc.report.subject import Subject

_SITES = "sites: "


@dataclass(frozen=True)
class Line:
    """One thing that both have: a number, or words."""

    what: str
    values: tuple[int | float | str, int | float | str]

    @property
    def ratio(self) -> str:
        """The second as a share of the first, where both are numbers."""
        one, other = self.values
        if isinstance(one, str) or isinstance(other, str) or not one:
            return ""
        return f"{other / one:.3g}"


def lines(pair: Sequence[Subject], spent: Sequence[Costs]) -> tuple[Line, ...]:
    """What is compared, sites first."""
    one, other = (_facts(*both) for both in zip(pair, spent, strict=True))
    names = sorted(dict.fromkeys((*one, *other)), key=lambda name: not name.startswith(_SITES))
    return tuple(Line(name, (one.get(name, 0), other.get(name, 0))) for name in names)


def _facts(subject: Subject, spent: Costs) -> dict[str, int | float | str]:
    plan = subject.plan
    found: dict[str, int | float | str] = {
        f"{_SITES}{kind}": count for kind, count in plan.site_counts.items()
    }
    found |= {
        "left alone": len(plan.misses),
        "weights, as papers count": plan.parameters.weights,
        "parameters that train": plan.parameters.training,
        "parameters that are stored": plan.parameters.stored,
    }
    for name, costs in (("kernels", spent.kernels), ("FLOPs", spent.flops)):
        if costs:
            found[f"{name} of a forward"] = costs[1]
    if spent.saved:
        found["bytes that a step saves"] = spent.saved[1]
    return found


def said(value: int | float | str) -> str:
    """A number with its thousands apart."""
    return value if isinstance(value, str) else f"{value:,}"


def page(pair: Sequence[Subject], found: Sequence[Line]) -> str:
    """The comparison as a page, with the pictures of both."""
    one, other = pair
    title = f"{one.title} beside {other.title}"
    rows = ([escape(line.what), *map(said, line.values), line.ratio] for line in found)
    heads = ("", one.title, other.title, "second : first")
    body = [
        f'<header class="wrap"><h1>{escape(title)}</h1><p class="quiet">on {escape(one.backbone)}</p></header>',
        '<div class="wrap below"><section aria-label="Numbers">',
        table(heads, rows, numbers=(1, 2, 3)),
        '</section><div class="two">',
        *_sides(pair),
        "</div></div>",
    ]
    return html(title, "\n".join(body))


def _sides(pair: Sequence[Subject]) -> Iterator[str]:
    for subject in pair:
        yield f'<section aria-label="{escape(subject.title, quote=True)}"><h2>{escape(subject.title)}</h2>'
        rows = (
            [escape(getattr(row, key)) for key in ("method", "functional_form", "modified_representation", "insertion", "composition")]
            for row in design(subject.plan)
        )  # fmt: skip
        yield table(("method", "form", "at", "insertion", "composition"), rows)
        yield figures(pictures(subject)[:FIGURES]) + "</section>"
