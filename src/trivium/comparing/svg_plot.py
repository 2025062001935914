"""A plot of ways as SVG for a page, which colours it: a mark and a name for each, none over another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from html import escape

from trivium.comparing.axes import Axis, Point, drawable, scales
from trivium.comparing.labels import Label, Mark, placed
from trivium.report.chart import label as said

WIDTH, HEIGHT = 460, 300  # in CSS pixels at their natural size
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 36
CELL_WIDTH, CELL_HEIGHT, REACH = 6.4, 5.0, 1  # a letter is three cells high

Place = Callable[[float], float]  # of a value, in pixels


def svg_plot(points: Sequence[Point], x: Axis, y: Axis, colours: Mapping[str, str]) -> str:
    """The points with their names, a line through each for its spread, and tooltips; "" where there are none."""
    points = drawable(points, x)
    if not points:
        return ""
    across, up = scales(points, x, y)

    def at_x(value: float) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * across.share(value)

    def at_y(value: float) -> float:
        return HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * up.share(value)

    title = escape(f"{y.title} against {x.title}")
    parts = [f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" class="chart" role="img" aria-label="{title}">']
    for t in up.ticks:
        at, where = at_y(t), f'x="{LEFT - 6}" y="{at_y(t) + 3.5:.1f}"'
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at:.1f}" y2="{at:.1f}"/>'
                     f'<text class="tick" {where} text-anchor="end">{y.said(t)}</text>')  # fmt: skip
    for t in across.ticks:
        where = f'x="{at_x(t):.1f}" y="{HEIGHT - BOTTOM + 15}"'
        parts.append(f'<text class="tick" {where} text-anchor="middle">{x.said(t)}</text>')
    middle, turned = (LEFT + WIDTH - RIGHT) / 2, f"translate(10 {(TOP + HEIGHT - BOTTOM) / 2}) rotate(-90)"
    parts.append(f'<text class="axis" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x.title)}</text>'
                 f'<text class="axis" transform="{turned}" text-anchor="middle">{escape(y.title)}</text>')  # fmt: skip
    parts += [_name(label, place) for label, place in _labels({p.name: (at_x(p.x), at_y(p.y)) for p in points})]
    return "".join([*parts, *(_mark(p, x, y, at_x, at_y, colours[p.name]) for p in points), "</svg>"])


def _mark(point: Point, x: Axis, y: Axis, at_x: Place, at_y: Place, tint: str) -> str:
    within = f" ± {said(point.spread, y.unit, exact=True)}" if point.spread else ""
    tip = f"{point.name}: {said(point.y, y.unit, exact=True)}{within}; {x.title} {said(point.x, exact=not x.log)}"
    across, line = at_x(point.x), ""
    if point.spread:
        low, high = at_y(point.y - point.spread), at_y(point.y + point.spread)
        line = f'<path class="curve {tint}" d="M{across:.1f} {low:.1f}V{high:.1f}"/>'
    circle = f'<circle class="dot {tint}" cx="{across:.1f}" cy="{at_y(point.y):.1f}" r="4.5">'
    return f"{line}{circle}<title>{escape(tip)}</title></circle>"


def _labels(places: Mapping[str, tuple[float, float]]) -> list[tuple[Label, tuple[float, float]]]:
    """The names of marks, laid out on cells, each with its mark's place in pixels."""
    columns, rows = int((WIDTH - LEFT) / CELL_WIDTH), int((HEIGHT - TOP - BOTTOM) / CELL_HEIGHT)
    marks = [
        Mark(int((across - LEFT) / CELL_WIDTH), int((down - TOP) / CELL_HEIGHT), name)
        for name, (across, down) in places.items()
    ]
    first = {(m.column, m.row): places[m.name] for m in reversed(marks)}
    return [(label, first[label.mark.column, label.mark.row]) for label in placed(marks, columns, rows, REACH)]


def _name(label: Label, place: tuple[float, float]) -> str:
    """A name beside its mark, or in another row with a line to it."""
    across, down = place
    right = label.side == "right"
    away = (
        (label.column - label.mark.column) if right else (label.mark.column - label.column - len(label.mark.name) + 1)
    )
    edge = across + (1 if right else -1) * (8 + (away - 2) * CELL_WIDTH)
    middle, line = down, ""
    if label.row != label.mark.row:
        middle = TOP + (label.row + 0.5) * CELL_HEIGHT
        line = (f'<path class="interval leader" d="M{across:.1f} {down:.1f}V{middle:.1f}'
                f'H{edge - (3 if right else -3):.1f}"/>')  # fmt: skip
    anchor = "start" if right else "end"
    text = f'<text class="name" x="{edge:.1f}" y="{middle + 4:.1f}" text-anchor="{anchor}">'
    return f"{line}{text}{escape(label.mark.name)}</text>"
