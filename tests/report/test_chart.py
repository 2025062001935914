"""Charts: round ticks, every point in its place, nothing that a reader's eyes would trip over."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.report import chart
from trivium.report.chart import Bar, Series, interval_chart, label, line_chart, thinned, ticks
from trivium.report.lineage import Box, lineage

NUMBERS = st.floats(-1e9, 1e9, allow_nan=False).map(lambda v: float(f"{v:.6f}"))


@given(low=NUMBERS, high=NUMBERS)
def test_ticks_are_round_and_cover(low: float, high: float) -> None:
    low, high = min(low, high), max(low, high)
    found = ticks(low, high, 5)
    assert 2 <= len(found) <= 9
    assert found[0] <= low + 1e-6 * max(1, abs(low), high - low)
    assert found[-1] >= high - 1e-6 * max(1, abs(high), high - low)
    steps = {float(f"{b - a:.6g}") for a, b in pairwise(found)}
    assert len(steps) == 1
    mantissa = float(f"{steps.pop():e}".split("e")[0])
    assert any(math.isclose(mantissa, m, rel_tol=1e-3) for m in (1, 2, 2.5, 5))


def test_points_lie_where_their_numbers_say() -> None:
    svg = line_chart([Series("a", [(0, 0), (50, 1), (100, 0.5)], "c0")], "step", "loss", "t")
    points = [tuple(map(float, p.split(","))) for p in re.search(r'points="([^"]*)"', svg).group(1).split()]
    left, right = chart.LEFT, chart.WIDTH - chart.RIGHT
    top, bottom = chart.TOP, chart.HEIGHT - chart.BOTTOM
    expected = [(left, bottom), ((left + right) / 2, top), (right, (top + bottom) / 2)]
    assert sum(points, ()) == pytest.approx(sum(expected, ()), abs=0.06)
    assert svg.count("<circle") == 3
    assert "a, 50: 1" in svg


def test_what_is_not_finite_is_left_out_and_nothing_makes_no_chart() -> None:
    nan = float("nan")
    assert line_chart([], "x", "y", "t") == ""
    assert line_chart([Series("a", [(0, nan), (1, math.inf)], "c0")], "x", "y", "t") == ""
    svg = line_chart([Series("a", [(0, 1), (1, nan), (2, 3)], "c0")], "x", "y", "t")
    assert "nan" not in svg
    assert svg.count("<circle") == 2


@pytest.mark.parametrize("points", [[(0, 5.0)], [(3, 0.0), (3, 0.0)], [(0, 1e-12), (1, 1e-12)], [(0, -4), (9, -4)]])
def test_flat_and_single_curves(points) -> None:
    svg = line_chart([Series("a", points, "c0")], "x", "y", "t")
    places = [float(v) for v in re.findall(r'c[xy]="([^"]*)"', svg)]
    assert all(0 <= v <= chart.WIDTH for v in places)


def test_a_long_curve_is_averaged() -> None:
    points = [(float(n), float(n % 2)) for n in range(10_000)]
    found = thinned(points, 100)
    assert len(found) == 100
    assert sum(y for _, y in found) / 100 == pytest.approx(0.5)
    assert thinned(points[:50], 100) == points[:50]


def test_names_are_escaped() -> None:
    svg = line_chart([Series("<b>", [(0, 1)], "c0"), Series("&", [(0, 2)], "c1")], "<x>", "<y>", '"t"')
    assert "<b>" not in svg
    assert "<x>" not in svg
    assert "&lt;b&gt;" in svg
    assert 'aria-label="&quot;t&quot;"' in svg


@pytest.mark.parametrize(
    ("value", "unit", "exact", "said"),
    [(1200, "", False, "1,200"), (0.25, "", False, "0.25"), (0.345, "%", False, "34%"), (0.3456, "%", True, "34.6%"),
     (2.34567, "", True, "2.3457"), (3.0, "", True, "3"), (1e-7, "", False, "1e-07")],
)  # fmt: skip
def test_labels(value, unit, exact, said) -> None:
    assert label(value, unit, exact) == said


def test_intervals() -> None:
    svg = interval_chart([Bar("name", 0.5, 0.4, 0.6, "100 of 200"), Bar("toy", 0.0, 0.0, 0.02, "0 of 66")], "t", "c1")
    widths = [float(v) for v in re.findall(r'class="bar c1"[^>]*width="([^"]*)"', svg)]
    track = float(re.search(r'class="track"[^>]*width="([^"]*)"', svg).group(1))
    assert widths == pytest.approx([track / 2, 0])
    assert "100 of 200" in svg
    assert "50%" in svg


def test_lineage_puts_children_right_of_parents_and_never_two_in_one_place() -> None:
    boxes = [
        Box("a", None, "model", (), "plain"), Box("b", "a", "base", ("x",), "c0"), Box("c", "b", "chat", (), "c1"),
        Box("d", "b", "tutor", (), "c2"), Box("e", "d", "judged", (), "c3"), Box("f", "c", "aligned", (), "c4"),
    ]  # fmt: skip
    svg = lineage(boxes, "t")
    rects = re.findall(r'<rect class="box [^"]*" x="(\d+)" y="(\d+)"', svg)
    at = {box.key: (int(x), int(y)) for box, (x, y) in zip(boxes, rects, strict=True)}
    assert len(set(at.values())) == len(boxes)
    assert all(at[box.key][0] > at[box.parent][0] for box in boxes if box.parent)
    assert at["a"][1] == at["b"][1] == at["c"][1] == at["f"][1], "a first child stands beside its parent"
    assert svg.count('class="arrow"') == 5
