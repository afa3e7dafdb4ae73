"""The page: one HTML file of a report, with its style and its script inside; nothing is fetched."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from string import Template

from peftc.plan.plan import Plan
from peftc.report import panes
from peftc.report.layers import Tree
from peftc.report.source import Sheet
from peftc.report.subject import Check
from peftc.rewrite.folding import Outcome

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Tile:
    """A figure at the top: what it counts, before and after, and a note."""

    name: str
    after: str
    before: str = ""
    note: str = ""


@dataclass(frozen=True)
class Page:
    """What a page shows: `graph` and, of a bundle, `onnx` by the roles of its graphs; `links` has for each ONNX node the
    step that it came of."""

    title: str
    about: str
    tiles: Sequence[Tile]
    figures: Sequence[str]
    plan: Plan
    sheets: Sequence[Sheet]
    graph: Tree
    onnx: Mapping[str, Tree]
    links: Mapping[str, str]
    outcomes: Sequence[Outcome]
    checks: Sequence[Check]

    def html(self) -> str:
        """All of it."""
        ids = panes.Ids.of(self.graph, self.plan)
        three = " three" if self.onnx else ""
        body = [
            f'<header class="wrap"><h1>{escape(self.title)}</h1><p class="quiet">{escape(self.about)}</p>',
            tiles(self.tiles),
            figures(self.figures),
            f'</header><main><div class="panes{three}">',
            *panes.spec(self.plan, self.sheets, self.outcomes, ids),
            *panes.graph(self.graph, ids),
            *panes.onnx(self.onnx, self.links, self.plan, ids),
            '</div></main><div class="wrap below">',
            *_left_alone(self.plan),
            *_certificate(self.checks),
            "</div>",
        ]
        return html(self.title, "\n".join(body))


def html(title: str, body: str) -> str:
    """A whole document."""
    parts = {name: (_HERE / f"report.{name}").read_text() for name in ("html", "css", "js")}
    return Template(parts["html"]).substitute(
        title=escape(title), style=parts["css"], script=parts["js"], body=body
    )


def tiles(found: Iterable[Tile]) -> str:
    said = []
    for one in found:
        before = f'<span class="from">{escape(one.before)} →</span> ' if one.before else ""
        note = f'<span class="note">{escape(one.note)}</span>' if one.note else ""
        after = f'<span class="to">{escape(one.after)}</span>'
        said.append(f"<div><dt>{escape(one.name)}</dt><dd>{before}{after}{note}</dd></div>")
    return f'<dl class="tiles">{"".join(said)}</dl>'


def figures(found: Iterable[str]) -> str:
    inside = "".join(f"<figure>{one}</figure>" for one in found)
    if not inside:
        return ""
    return (
        '<details class="drawn" open><summary><h2>Layers as people draw them</h2></summary>'
        f'<div class="figures" tabindex="0" role="group" aria-label="pictures">{inside}</div></details>'
    )


def _left_alone(plan: Plan) -> Iterator[str]:
    groups: dict[tuple[str, str], list[str]] = {}
    for miss in plan.misses:
        groups.setdefault((miss.entry, miss.reason), []).append(miss.site)
    yield '<section aria-label="What was left alone"><h2>Left alone</h2>'
    if not groups:
        yield '<p class="quiet">Every place that the spec names was changed.</p></section>'
        return
    rows = (
        [escape(entry), escape(reason), f'<span title="{escape(", ".join(sites), quote=True)}">{len(sites)}: {escape(sites[0])}</span>']
        for (entry, reason), sites in groups.items()
    )  # fmt: skip
    yield table(("by", "because", "places"), rows) + "</section>"


def _certificate(checks: Sequence[Check]) -> Iterator[str]:
    yield '<section aria-label="Certificate"><h2>Certificate</h2>'
    if not checks:
        yield '<p class="quiet">None yet: <code>peftc verify</code> writes one beside deltas, merged checkpoints and bundles.</p></section>'
        return
    failed = sum(not one.holds for one in checks)
    word = (
        f'<span class="fails">{failed} fail</span>'
        if failed
        else '<span class="holds">holds</span>'
    )
    yield f"<p>{len(checks)} {'comparison' if len(checks) == 1 else 'comparisons'}: {word}</p>"
    each = [one for one in checks if one.one and one.holds]
    yield _compared([one for one in checks if one not in each])
    if each:
        many = f"{len(each)} rewrites, each by itself, hold"
        yield f"<details><summary>{many}</summary>{_compared(each)}</details>"
    yield "</section>"


def _compared(checks: Sequence[Check]) -> str:
    rows = (
        [
            escape(one.what),
            f"{one.error:.3g}",
            "" if one.bound is None else f"{one.bound:.1e}",
            '<span class="holds">✓ holds</span>'
            if one.holds
            else '<span class="fails">✗ fails</span>',
        ]
        for one in checks
    )
    return table(("", "difference", "at most", ""), rows, numbers=(1, 2))


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """Rows of HTML; `numbers` are the columns to the right."""
    kinds = [' class="number"' if i in numbers else "" for i in range(len(heads))]
    top = "".join(f'<th scope="col"{kind}>{escape(one)}</th>' for one, kind in zip(heads, kinds))
    said = []
    for row in rows:
        cells = [f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds)]
        said.append(f"<tr>{''.join(cells)}</tr>")
    return f"<table><thead><tr>{top}</tr></thead><tbody>{''.join(said)}</tbody></table>"
