"""A plot of ways as text for a terminal: a mark and a name for each, none over another."""

from __future__ import annotations

from collections.abc import Sequence

from trivium.comparing.axes import Axis, Point, Scale, drawable, scales
from trivium.comparing.labels import Mark, leader, merged, placed

COLUMNS, ROWS = 68, 17  # of the plot, without its axes
CORNERS = {("right", True): "╭", ("left", True): "╮", ("right", False): "╰", ("left", False): "╯"}  # side, upwards

Grid = list[list[str]]


def text_plot(points: Sequence[Point], x: Axis, y: Axis) -> str:
    """Lines of at most 80 characters; "" where there is nothing to draw."""
    points = drawable(points, x)
    if not points:
        return ""
    across, up = scales([Point(p.name, p.x, p.y) for p in points], x, y)
    grid, legend = _drawn([Mark(_column(across, p.x), _row(up, p.y), p.name) for p in points])
    numbers = {_row(up, t): y.said(t) for t in up.ticks}
    width = max(map(len, numbers.values()), default=0)
    lines = [y.title]
    lines += [f"{numbers.get(n, ''):>{width}} {'┤' if n in numbers else '│'}{''.join(r)}" for n, r in enumerate(grid)]
    foot, under = ["─"] * COLUMNS, [" "] * COLUMNS
    for t in across.ticks:
        at, told = _column(across, t), x.said(t)
        start = max(0, min(COLUMNS - len(told), at - len(told) // 2))
        foot[at] = "┬"
        under[start : start + len(told)] = told
    lines += [f"{'':>{width}} └{''.join(foot)}"]
    lines += [f"{'':>{width}}  {line}" for line in ("".join(under), f"{x.title:^{COLUMNS}}")]
    return "\n".join(line.rstrip() for line in [*lines, *legend])


def _column(across: Scale, value: float) -> int:
    return round(across.share(value) * (COLUMNS - 1))


def _row(up: Scale, value: float) -> int:
    return round((1 - up.share(value)) * (ROWS - 1))


def _drawn(marks: Sequence[Mark]) -> tuple[Grid, list[str]]:
    """The plot's cells; and lines for marks whose names found no place in it, which have a number instead."""
    grid = [[" "] * COLUMNS for _ in range(ROWS)]
    labels = placed(marks, COLUMNS, ROWS)
    for label in labels:
        mark = label.mark
        grid[label.row][label.column : label.column + len(mark.name)] = mark.name
        for column, row in leader(label):
            straight = "│" if column == mark.column else "─"
            corner = (column, row) == (mark.column, label.row)
            grid[row][column] = CORNERS[label.side, row < mark.row] if corner else straight
        grid[mark.row][mark.column] = "●"
    named = {label.mark for label in labels}
    unnamed = [mark for mark in merged(marks) if mark not in named]
    for number, mark in enumerate(unnamed, 1):
        grid[mark.row][mark.column] = str(number)[-1]
    return grid, [f"{number}: {mark.name}" for number, mark in enumerate(unnamed, 1)]
