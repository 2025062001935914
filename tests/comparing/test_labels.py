"""Names in a plot: none over another, each led to its mark; the text plot fits a terminal."""

from __future__ import annotations

import random
import re

import pytest

from trivium.comparing.axes import Axis, Point
from trivium.comparing.labels import Mark, merged, placed
from trivium.comparing.svg_plot import svg_plot
from trivium.comparing.text_plot import text_plot

X, Y = Axis("trained parameters", log=True), Axis("requests met", "%")
NAMES = ["full", "lora", "dora", "qlora", "houlsby", "pfeiffer", "parallel", "ia3", "prefix", "prompt", "bitfit"]


@pytest.mark.parametrize("seed", range(20))
def test_no_name_lies_over_another_or_over_a_mark(seed):
    rng = random.Random(seed)
    marks = [Mark(rng.randint(0, 30), rng.randint(4, 10), name) for name in NAMES]
    columns, rows = 68, 17
    labels = placed(marks, columns, rows)
    assert len(merged(marks)) - len(labels) <= 2
    taken = {(m.column, m.row) for m in merged(marks)}
    for label in labels:
        cells = {(label.column + n, label.row) for n in range(len(label.mark.name))}
        assert all(0 <= column < columns and 0 <= row < rows for column, row in cells)
        assert not cells & taken
        taken |= cells


def test_a_name_without_a_place_is_under_the_plot():
    rng = random.Random(0)
    crowd = [Point(f"a-rather-long-name-{n}", 10 ** rng.uniform(5, 5.5), rng.random()) for n in range(60)]
    crowd += [Point("few", 1e3, 0), Point("many", 1e9, 1)]
    text = text_plot(crowd, X, Y)
    assert re.search(r"(?m)^1: a-rather-long-name-\d+", text)
    assert all(re.search(rf"\b{p.name}\b", text) for p in crowd)


@pytest.mark.parametrize("seed", range(10))
def test_where_rows_are_low_names_keep_a_letters_height(seed):
    rng = random.Random(seed)
    labels = placed([Mark(rng.randint(0, 60), rng.randint(0, 40), name) for name in NAMES], 80, 50, reach=1)
    assert labels
    for n, one in enumerate(labels):
        for other in labels[:n]:
            across = range(max(one.column, other.column), min(one.column + len(one.mark.name),
                                                              other.column + len(other.mark.name)))  # fmt: skip
            assert not across or abs(one.row - other.row) >= 3


def test_marks_in_one_cell_share_their_names():
    assert merged([Mark(1, 1, "a"), Mark(2, 1, "b"), Mark(1, 1, "c")]) == [Mark(1, 1, "a, c"), Mark(2, 1, "b")]


@pytest.mark.parametrize("seed", range(5))
def test_a_text_plot_fits_and_names_everything(seed):
    rng = random.Random(seed)
    points = [Point(name, 10 ** rng.uniform(3, 8), rng.random()) for name in NAMES]
    text = text_plot(points, X, Y)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 24
    assert all(re.search(rf"\b{name}\b", text) for name in NAMES)


@pytest.mark.parametrize(
    "points",
    [
        [Point("one", 1000, 0.5)],
        [Point("a", 1000, 0.5), Point("b", 1000, 0.5)],
        [Point("a", 1000, 0.0), Point("b", 1001, 1e-9)],
        [Point("a", 5, 0.5, 0.1), Point("b", 3e12, 0.7, 0.2)],
        [Point("no parameters", 0, 0.5), Point("nan", 10, float("nan")), Point("a", 10, 0.5)],
    ],
)
def test_odd_numbers_are_drawn(points):
    assert "●" in text_plot(points, X, Y)
    svg = svg_plot(points, X, Y, {p.name: "c0" for p in points})
    numbers = [float(n) for n in re.findall(r'\b(?:cx|cy|x|y)="(-?[\d.]+)"', svg)]
    assert all(0 <= n <= 460 for n in numbers)


def test_nothing_is_drawn_of_nothing():
    assert text_plot([], X, Y) == svg_plot([], X, Y, {}) == ""


def test_a_page_names_all_and_believes_no_name():
    evil = "<b>&"
    svg = svg_plot([Point(evil, 1000, 0.5, 0.1), Point("b", 2000, 0.6)], X, Y, {evil: "c0", "b": "c1"})
    assert "<b>" not in svg
    assert "&lt;b&gt;&amp;: 50.0% ± 10.0%" in svg


def test_ticks_of_a_log_axis():
    assert X.ticks(900, 2e6) == [1e3, 1e4, 1e5, 1e6]
    assert X.ticks(150, 700) == [200, 500]
    assert [X.said(t) for t in (200, 2000, 1e5, 5e6, 2e9)] == ["200", "2k", "100k", "5M", "2G"]
