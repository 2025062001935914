"""Line charts and interval charts as SVG text that takes its colours from the page, so that dark and print work.

Own drawing rather than a plotting library's: the page's style sheet colours every line (a picture cannot follow the
reader's theme), a chart is 10 kB, and nothing has to be installed. Every number that is drawn has a tooltip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from itertools import pairwise

Point = tuple[float, float]

WIDTH, HEIGHT = 360, 230  # in CSS pixels at their natural size: text stays readable on a phone
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 10, 34
MOST_POINTS = 240  # a longer curve is averaged down to so many


@dataclass(frozen=True)
class Series:
    """One curve. ``colour`` is one of the page's: c0, c1, ...; a faint one is drawn thin, without dots."""

    name: str
    points: Sequence[Point]
    colour: str
    faint: bool = False


def line_chart(series: Sequence[Series], x: str, y: str, title: str, unit: str = "", whole: bool = False) -> str:
    """The curves on common axes, with a legend under them; "" where no curve has a point.

    ``unit`` "%" shows shares as percentages; ``whole`` lets the y axis go from 0 to 1, at least.
    """
    drawn = [Series(s.name, thinned(finite(s.points)), s.colour, s.faint) for s in series if finite(s.points)]
    if not drawn:
        return ""
    xs = [p[0] for s in drawn for p in s.points]
    ys = [p[1] for s in drawn for p in s.points]
    span = [0.0, 1.0, *ys] if whole else ys
    x_ticks, y_ticks = ticks(min([0.0, *xs]), max(xs), 5), ticks(min(span), max(span), 5)
    place = _Scale(x_ticks[0], max(xs), y_ticks[0], max(y_ticks[-1], max(ys)))
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{escape(title)}">']
    for value in y_ticks:
        at = place.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>')
        parts.append(
            f'<text class="tick" x="{LEFT - 6}" y="{at + 3.5:.1f}" text-anchor="end">{label(value, unit)}</text>'
        )
    for value in x_ticks:
        if value <= max(xs):
            where = f'x="{place.x(value):.1f}" y="{HEIGHT - BOTTOM + 15}"'
            parts.append(f'<text class="tick" {where} text-anchor="middle">{label(value)}</text>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{escape(x)}</text>')
    parts.append(f'<text class="axis" transform="translate(10 {TOP + 80}) rotate(-90)" '
                 f'text-anchor="middle">{escape(y)}</text>')  # fmt: skip
    parts += [_curve(s, place, unit) for s in drawn]
    return "".join([*parts, "</svg>", _legend(drawn)])


def _curve(series: Series, place: _Scale, unit: str) -> str:
    line = " ".join(f"{place.x(x):.1f},{place.y(y):.1f}" for x, y in series.points)
    kind = "curve faint" if series.faint else "curve"
    parts = [
        f'<polyline class="{kind} {series.colour}" points="{line}"><title>{escape(series.name)}</title></polyline>'
    ]
    if not series.faint:
        for x, y in series.points:
            said = f"{series.name}, {label(x)}: {label(y, unit, exact=True)}"
            parts.append(f'<circle class="dot {series.colour}" cx="{place.x(x):.1f}" cy="{place.y(y):.1f}" r="2.6">'
                         f"<title>{escape(said)}</title></circle>")  # fmt: skip
    return "".join(parts)


def _legend(series: Sequence[Series]) -> str:
    if len(series) < 2:
        return ""
    items = (f'<li><span class="swatch {s.colour}{" faint" if s.faint else ""}"></span>{escape(s.name)}</li>'
             for s in series)  # fmt: skip
    return f'<ul class="legend">{"".join(items)}</ul>'


@dataclass(frozen=True)
class Bar:
    """A share of 0 to 1 with its 95% interval."""

    name: str
    share: float
    low: float
    high: float
    said: str  # the tooltip


def interval_chart(bars: Sequence[Bar], title: str, colour: str) -> str:
    """Shares as bars from 0 to 100%, each with its interval as a line across its end."""
    row, names, right = 20, 92, 40
    height = row * len(bars) + 4
    parts = [f'<svg viewBox="0 0 {WIDTH} {height}" class="chart" role="img" aria-label="{escape(title)}">']
    span = WIDTH - names - right
    for n, bar in enumerate(bars):
        top, middle = n * row + 4, n * row + 11
        low, high = names + span * bar.low, names + span * bar.high
        parts.append(
            f'<text class="tick" x="{names - 6}" y="{middle + 4}" text-anchor="end">{escape(bar.name)}</text>'
            f'<rect class="track" x="{names}" y="{top}" width="{span}" height="14" rx="2"/>'
            f'<rect class="bar {colour}" x="{names}" y="{top}" width="{span * bar.share:.1f}" height="14" rx="2">'
            f"<title>{escape(bar.said)}</title></rect>"
            f'<path class="interval" d="M{low:.1f} {middle}H{high:.1f}M{low:.1f} {top + 3}v8M{high:.1f} {top + 3}v8"/>'
            f'<text class="tick" x="{WIDTH - 2}" y="{middle + 4}" text-anchor="end">{bar.share:.0%}</text>'
        )
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class _Scale:
    x0: float
    x1: float
    y0: float
    y1: float

    def x(self, value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (value - self.x0) / ((self.x1 - self.x0) or 1)

    def y(self, value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * (value - self.y0) / ((self.y1 - self.y0) or 1)


def finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]


def thinned(points: list[Point], most: int = MOST_POINTS) -> list[Point]:
    """At most ``most`` points, each the average of consecutive ones."""
    if len(points) <= most:
        return points
    cuts = [round(n * len(points) / most) for n in range(most + 1)]
    groups = [points[a:b] for a, b in pairwise(cuts)]
    return [(sum(p[0] for p in g) / len(g), sum(p[1] for p in g) / len(g)) for g in groups]


def ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers from at or under ``low`` up to at or over ``high``, some ``about`` of them."""
    span = high - low or abs(high) or 1.0
    rough = span / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(n * step, 12) for n in range(first, max(last, first + 1) + 1)]


def label(value: float, unit: str = "", exact: bool = False) -> str:
    """A number as short as it can be said: 1,200; 0.35; 35%."""
    if unit == "%":
        return f"{value:.1%}" if exact else f"{value:.0%}"
    if exact and value != int(value):
        return f"{value:.4f}"
    return f"{value:,.0f}" if value == int(value) else f"{value:.6g}"
