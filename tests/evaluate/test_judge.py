"""Shares and their intervals, against values worked out elsewhere."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.evaluate.judge import interval, judged, shares


@pytest.mark.parametrize(
    ("met", "of", "low", "high"),
    [(0, 200, 0.0, 0.018846), (200, 200, 0.981154, 1.0), (100, 200, 0.431361, 0.568639), (1, 10, 0.017876, 0.404150)],
)
def test_wilsons_interval(met, of, low, high) -> None:
    assert interval(met, of) == pytest.approx((low, high), abs=1e-5)


@given(of=st.integers(1, 1000), data=st.data())
def test_an_interval_holds_its_share(of: int, data: st.DataObject) -> None:
    met = data.draw(st.integers(0, of))
    low, high = interval(met, of)
    assert 0 <= low <= met / of + 1e-12
    assert met / of - 1e-12 <= high <= 1
    assert interval(of - met, of) == pytest.approx((1 - high, 1 - low))


def test_verdicts_as_numbers_and_with_what_they_rest_on() -> None:
    verdicts = {"met": (150, 200), "length": 12.5, "never asked": (0, 0)}
    assert shares(verdicts) == {"met": 0.75, "length": 12.5}
    found = judged(verdicts)
    assert found["length"] == {"value": 12.5}
    assert (found["met"]["met"], found["met"]["of"], found["met"]["share"]) == (150, 200, 0.75)
