"""The course of the learning rate."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.train.schedule import FLOOR, WSD_DECAY, factor

NAMES = ["constant", "linear", "cosine", "wsd"]


def course(name: str, steps: int = 100, warmup: float = 0.1) -> list[float]:
    return [factor(n, steps, name, warmup) for n in range(steps)]


@pytest.mark.parametrize("name", NAMES)
def test_warm_up_rises_evenly_to_the_peak(name):
    assert course(name)[:11] == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0])
    assert course(name, warmup=0.0)[0] == 1.0


def test_the_end_of_each():
    assert course("constant")[-1] == 1.0
    assert course("linear")[-1] == pytest.approx(1 / 90)  # one step before 0: no step is wasted at rate 0
    assert course("wsd")[-1] == pytest.approx(1 / 20)
    assert FLOOR < course("cosine")[-1] < FLOOR + 1e-3


def test_cosine_by_hand():
    assert factor(50, 100, "cosine", 0.0) == pytest.approx((1 + FLOOR) / 2)
    assert factor(25, 100, "cosine", 0.0) == pytest.approx(FLOOR + (1 - FLOOR) * (1 + 2**-0.5) / 2)


def test_linear_by_hand():
    assert factor(55, 100, "linear", 0.1) == pytest.approx(0.5)


def test_wsd_is_stable_until_its_last_fifth():
    assert course("wsd")[10:81] == pytest.approx([1.0] * 71)
    assert WSD_DECAY == 0.2
    assert course("wsd")[81:] == pytest.approx([n / 20 for n in range(19, 0, -1)])


@given(st.integers(1, 400), st.sampled_from(NAMES), st.floats(0, 1))
def test_never_negative_never_above_the_peak(steps, name, warmup):
    values = course(name, steps, warmup)
    assert all(0 < v <= 1 for v in values)
    top = values.index(max(values))
    assert values[: top + 1] == sorted(values[: top + 1])
    assert values[top:] == sorted(values[top:], reverse=True)
