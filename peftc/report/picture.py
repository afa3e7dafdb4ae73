"""The picture of a layer as people draw it, in SVG: a column of sub-layers, deltas beside it in the colour of their entry."""

from __future__ import annotations

import colorsys
from collections.abc import Sequence
from dataclasses import dataclass, field
from html import escape

from peftc.report.flow import ADD, Element
from peftc.report.sketch import Layer, Mark, Part, Sizes, joins, reads, runs

HUES = (262, 22, 152, 322, 202, 46, 96, 0)
_BOX, _GAP, _PILL = 236, 30, 22  # width of a sub-layer; between elements; height of a stage
_SIDE = 138  # width of a delta
_NEUTRAL = "currentColor"


def hue(group: int) -> int:
    """Of a delta of the spec."""
    return HUES[group % len(HUES)]


def colour(group: int) -> str:
    red, green, blue = colorsys.hls_to_rgb(hue(group) / 360, 0.55, 0.66)
    return f"#{round(255 * red):02x}{round(255 * green):02x}{round(255 * blue):02x}"


def figure(
    layer: Layer,
    column: Sequence[Element],
    folded: frozenset[int] = frozenset(),
    alone: bool = False,
) -> str:
    """The picture; `alone` is for a file of its own, else for a page. Of deltas that are `folded` a shadow is left."""
    return _Figure(layer, column, folded).svg(alone)


@dataclass
class _Canvas:
    """What is drawn so far; y goes up, as a network does, and is turned at the end."""

    shapes: list[str] = field(default_factory=list)

    def text(
        self,
        x: float,
        y: float,
        said: str,
        size: float = 11,
        anchor: str = "middle",
        more: str = "",
    ) -> None:
        self.shapes.append(
            f'<text x="{x:g}" y="{-y + size * 0.35:g}" font-size="{size:g}" text-anchor="{anchor}"{more}>{escape(said)}</text>'
        )

    def path(self, points: str, ink: str = _NEUTRAL, more: str = ' fill="none"') -> None:
        self.shapes.append(f'<path d="{points}" stroke="{ink}"{more}/>')

    def line(self, *points: tuple[float, float], ink: str = _NEUTRAL, dashed: bool = False) -> None:
        said = " L".join(f"{x:g} {-y:g}" for x, y in points)
        self.path(f"M{said}", ink, ' fill="none"' + (' stroke-dasharray="4 3"' if dashed else ""))

    def arrow(
        self, *points: tuple[float, float], ink: str = _NEUTRAL, dashed: bool = False
    ) -> None:
        """A line with a head at its last point."""
        self.line(*points, ink=ink, dashed=dashed)
        (x0, y0), (x, y) = points[-2:]
        length = max(abs(x - x0), abs(y - y0)) or 1
        dx, dy = 5 * (x - x0) / length, 5 * (y - y0) / length
        corners = (
            (x, y),
            (x - dx - dy * 0.6, y - dy + dx * 0.6),
            (x - dx + dy * 0.6, y - dy - dx * 0.6),
        )
        said = " L".join(f"{a:g} {-b:g}" for a, b in corners)
        self.path(f"M{said}Z", ink, f' fill="{ink}"')

    def box(
        self, x: float, y: float, wide: float, high: float, ink: str = _NEUTRAL, round_: float = 6
    ) -> None:
        """Of the lower left corner x, y."""
        fill = f' fill="{ink}" fill-opacity="{0.05 if ink == _NEUTRAL else 0.14}"'
        self.shapes.append(
            f'<rect x="{x:g}" y="{-y - high:g}" width="{wide:g}" height="{high:g}" rx="{round_:g}" stroke="{ink}"{fill}/>'
        )

    def trapezoid(self, x: float, y: float, sizes: Sizes, ink: str) -> None:
        """A matrix of `sizes`, its input below: as wide there and above as it is wide."""
        a, b = (_SIDE * (0.92 if n == max(sizes) else 0.58) / 2 for n in sizes)
        top = y + _PILL
        self.path(
            f"M{x - a:g} {-y:g} L{x + a:g} {-y:g} L{x + b:g} {-top:g} L{x - b:g} {-top:g}Z",
            ink,
            f' fill="{ink}" fill-opacity="0.14"',
        )

    def sum(self, x: float, y: float, ink: str = _NEUTRAL) -> None:
        self.shapes.append(
            f'<circle cx="{x:g}" cy="{-y:g}" r="8" stroke="{ink}" fill="{ink}" fill-opacity="0.1"/>'
        )
        self.line((x - 4, y), (x + 4, y), ink=ink)
        self.line((x, y - 4), (x, y + 4), ink=ink)


@dataclass
class _Figure:
    layer: Layer
    column: Sequence[Element]
    folded: frozenset[int]
    canvas: _Canvas = field(default_factory=_Canvas)

    def svg(self, alone: bool) -> str:
        left = max((self._left(e.part) for e in self.column if e.part), default=0)
        right = max((self._right(e.part) for e in self.column if e.part), default=0)
        self.x = 40 + left * (_SIDE + 16) + _BOX / 2 + 30
        wide = self.x + _BOX / 2 + 30 + right * (_SIDE + 16) + 10
        tops = [14.0]
        self.canvas.text(self.x, 0, self._size_in(), 10)
        for element in self.column:
            tops.append(self._element(element, tops))
        high = tops[-1] + 30
        self.canvas.arrow((self.x, tops[-1]), (self.x, tops[-1] + 16))
        title = self._title()
        self.canvas.text(self.x, high + 4, title, 12, more=' font-weight="600"')
        space = ' xmlns="http://www.w3.org/2000/svg"' if alone else ""
        box = f"0 {-high - 18:g} {wide:g} {high + 34:g}"
        size = f' width="{wide:g}" height="{high + 34:g}"'
        return (
            f'<svg{space} class="figure" viewBox="{box}"{size} role="img" aria-label="{escape(self._said(), quote=True)}" '
            'font-family="ui-sans-serif, Helvetica, Arial, sans-serif" fill="currentColor" stroke-width="1.2">'
            f"<title>{escape(title)}</title>" + "".join(self.canvas.shapes) + "</svg>\n"
        )

    def _title(self) -> str:
        numbers = [one for one in self.layer.layers if one is not None]
        if not numbers:
            return self.layer.stack
        times = f", × {len(numbers)}" if len(numbers) > 1 else ""
        return f"{self.layer.stack} layer {runs(numbers)}{times}"

    def _said(self) -> str:
        """The picture in words, for who does not see it."""
        said = [self._title()]
        for one in self.column:
            marks = one.part.marks if one.part else ()
            what = "".join(
                f"; {m.method} {m.insertion} at {', '.join(m.pieces) or 'it'}: {', '.join(s.text for s in m.stages)}"
                for m in marks
            )
            said.append(one.what + what)
        return ". ".join(said)

    def _size_in(self) -> str:
        sizes = [e.part.sizes[0] for e in self.column if e.part and e.part.sizes[0]]
        return str(sizes[0]) if sizes else "x"

    @staticmethod
    def _left(part: Part) -> int:
        return len(_before(part))

    @staticmethod
    def _right(part: Part) -> int:
        return len(_beside(part))

    def _element(self, element: Element, tops: Sequence[float]) -> float:
        """Draw an element on what is below it; gives its top."""
        x, low = self.x, tops[-1]
        if element.part is not None:
            return self._part(element.part, low)
        self.canvas.arrow((x, low), (x, low + 16))
        if element.what != ADD:
            self.canvas.box(x - 60, low + 16, 120, 20, round_=10)
            self.canvas.text(x, low + 26, element.what, 10)
            return low + 36
        self.canvas.sum(x, low + 24)
        if element.other is not None:
            start = tops[element.other + 1] + 7
            edge = x - _BOX / 2 - 16
            self.canvas.arrow((x, start), (edge, start), (edge, low + 24), (x - 8, low + 24))
        return low + 32

    def _part(self, part: Part, low: float) -> float:
        x, half = self.x, _BOX / 2
        beside, before = _beside(part), _before(part)
        tall = max([len(one.stages) + bool(one.scale) for one in (*beside, *before)], default=0)
        trained = [one for one in part.marks if one.insertion == "in place"]
        high = max((122.0 if part.pieces else 40.0) + 12 * bool(trained), tall * (_PILL + 9) + 4.0)
        foot = low + _GAP
        self.canvas.arrow((x, low), (x, foot))
        ink = colour(trained[0].group) if trained else _NEUTRAL
        self.canvas.box(x - half, foot, _BOX, high, ink)
        self.canvas.text(x, foot + high - 14, part.title, 12, more=' font-weight="600"')
        if trained:
            said = ", ".join(f"{', '.join(one.ports)} trains" for one in trained)
            self.canvas.text(x, foot + high - 28, said, 9)
        if part.pieces:
            self._pieces(part, foot, high)
        if part.sizes[0]:
            self.canvas.text(x + 6, low + 8, str(part.sizes[0]), 7.5, "start")
        top = foot + high
        for i, mark in enumerate(before):
            self._mark(mark, x - half - 30 - (i + 0.5) * (_SIDE + 16) + 8, foot, high, -1)
        for i, mark in enumerate(beside):
            self._mark(
                mark, x + half + 22 + (i + 0.5) * (_SIDE + 16), foot, high, 1, _is_inner(mark, part)
            )
        if any(joins(one) and not one.pieces for one in beside):
            self.canvas.line((x, top), (x, top + 14))
            self.canvas.sum(x, top + 22)
            top += 30
        return top

    def _pieces(self, part: Part, foot: float, high: float) -> None:
        """Projections of the input below, what is between, the last one above."""
        x, inside = self.x, _BOX - 16
        inked = {name: colour(one.group) for one in part.marks for name in one.pieces}
        first = [one for one in part.pieces if one[0] != part.last]
        last = [one for one in part.pieces if one[0] == part.last]
        top = foot + high - 54 - 12 * any(one.insertion == "in place" for one in part.marks)
        for row, y in ((first, foot + 6), (last, top)):
            width = inside / max(len(row), 1) if row is first else inside / 2
            left = x - width * len(row) / 2
            for i, (name, sizes) in enumerate(row):
                self.canvas.box(
                    left + i * width + 2, y, width - 4, 26, inked.get(name, _NEUTRAL), 4
                )
                middle = left + (i + 0.5) * width
                self.canvas.text(middle, y + 18, name, 10)
                self.canvas.text(middle, y + 7, f"{sizes[0]}→{sizes[1]}", 7.5)
        if part.core and last:
            y = (foot + 32 + top) / 2
            self.canvas.line((x, foot + 32), (x, y - 8))
            self.canvas.line((x, y + 8), (x, top))
            self.canvas.text(x, y, part.core, 9.5)

    def _mark(
        self, mark: Mark, x: float, foot: float, high: float, side: int, inner: bool = False
    ) -> None:
        """A delta as a stack of its ops, with what it reads below and what it becomes part of above; `inner`: it reads
        what the last projection does."""
        gone = mark.group in self.folded
        if gone:
            self.canvas.shapes.append('<g opacity="0.45" stroke-dasharray="3 2">')
        ink, y = colour(mark.group), foot + 2
        edge = self.x + side * _BOX / 2
        whole = joins(mark) and not mark.pieces
        if reads(mark) == "x" and inner:
            start, out = foot + high - 58, x - side * (_SIDE / 2 + 4)
            self.canvas.arrow(
                (self.x, start), (out, start), (out, foot - 6), (x, foot - 6), (x, y), ink=ink
            )
        elif reads(mark) == "x":
            self.canvas.arrow((self.x, foot - 12), (x, foot - 12), (x, y), ink=ink)
        elif reads(mark) == "h":
            start = foot + high + 7
            out = x + side * (_SIDE / 2 + 4)
            self.canvas.arrow(
                (self.x, start), (out, start), (out, foot - 6), (x, foot - 6), (x, y), ink=ink
            )
        for number, (said, sizes) in enumerate(_stages(mark)):
            if sizes is None:
                self.canvas.box(x - _SIDE * 0.4, y, _SIDE * 0.8, _PILL, ink, 11)
            else:
                self.canvas.trapezoid(x, y, sizes, ink)
            self.canvas.text(x, y + _PILL / 2, said, 9.5 if len(said) < 19 else 8)
            if number < len(_stages(mark)) - 1:
                self.canvas.arrow((x, y + _PILL), (x, y + _PILL + 9), ink=ink)
                self.canvas.text(x + 6, y + _PILL + 4.5, _between(mark, number), 7.5, "start")
            y += _PILL + 9
        y -= 9
        name = mark.method + (f" · {', '.join(mark.pieces)}" if mark.pieces else "")
        end = foot + high + 22 if whole else max(y + 8, foot + high - 14)
        goal = (self.x + 8, end) if whole else (edge, end)
        self.canvas.arrow(
            (x, y), (x, end), goal, ink=ink, dashed=mark.insertion == "reparametrised"
        )
        if not whole:
            said = "⊕" if joins(mark) else ", ".join(mark.ports)
            self.canvas.text(edge + side * 21, end + 7, said, 9, "start" if side > 0 else "end")
        if gone:
            self.canvas.shapes.append("</g>")
            name += ", folded"
        self.canvas.text(x, end + 9, name, 9.5, more=f' font-weight="600" fill="{ink}"')


def _beside(part: Part) -> list[Mark]:
    """The deltas at its right, each once, those that read what is inside it first."""
    kinds = ("prepended", "in place")
    found = dict.fromkeys(one for one in part.marks if one.insertion not in kinds)
    return sorted(found, key=lambda one: not _is_inner(one, part))


def _is_inner(mark: Mark, part: Part) -> bool:
    """Whether a delta is at the last projection alone, behind the others."""
    return mark.pieces == (part.last,) and len(part.pieces) > 1


def _before(part: Part) -> list[Mark]:
    """The deltas at its left, each once."""
    return list(dict.fromkeys(one for one in part.marks if one.insertion == "prepended"))


def _stages(mark: Mark) -> list[tuple[str, Sizes | None]]:
    """(words, sizes) of each op, what multiplies the delta last."""
    found: list[tuple[str, Sizes | None]] = []
    for one in mark.stages:
        said = f"{one.text} {one.sizes[0]}×{one.sizes[1]}" if one.sizes else one.text
        found.append((said, one.sizes))
    return [*found, *([(mark.scale, None)] if mark.scale else [])]


def _between(mark: Mark, number: int) -> str:
    """The width of what goes from one stage to the next."""
    known = [one.sizes for one in mark.stages[: number + 1] if one.sizes]
    return str(known[-1][1]) if known else ""
