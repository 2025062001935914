"""Passes and recomputation within a budget of memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.train.budget import PASSES, Cost, fit, in_bytes, least

COST = Cost(
    weights=3e8,
    gradients=1e8,
    moments=2e8,
    readout=1e8,
    runtime=3e8,
    kept=900_000,
    input=2_000,
    working=50_000,
    layers=30,
)


def test_what_fits_is_left_as_it_is():
    plan = fit(10e9, COST, longest=500, asked=1024)
    assert plan is not None
    assert (plan.tokens, plan.layers) == (1024, 0)


def test_tokens_go_first_and_layers_where_a_row_is_long():
    plan = fit(1.65e9, COST, longest=300, asked=1024)
    assert plan is not None
    assert plan.tokens == 512
    assert plan.layers == 0
    long = fit(1.5e9, COST, longest=1000, asked=1024)
    assert long is not None
    assert long.tokens == 1000, "a pass of that row alone"
    assert long.layers > 10


def test_what_does_not_fit_is_said_with_the_least_that_does():
    assert fit(1.02e9, COST, longest=1000, asked=1024) is None
    smallest = least(COST, 1000, 1024)
    assert fit(smallest - 1, COST, longest=1000, asked=1024) is None
    assert fit(smallest, COST, longest=1000, asked=1024) is not None


@given(
    budget=st.floats(1e8, 1e11),
    fixed=st.floats(0, 1e10),
    kept=st.floats(1e3, 1e7),
    share=st.floats(0, 1),
    working=st.floats(0, 1e6),
    layers=st.integers(1, 100),
    longest=st.integers(1, 5000),
    asked=st.integers(1, 20000),
    step=st.integers(1, 40000),
    parts=st.tuples(*[st.floats(0, 1)] * 5),
)
def test_it_keeps_to_the_budget_and_finds_what_is_there(
    budget, fixed, kept, share, working, layers, longest, asked, step, parts
):
    parts = (fixed * part for part in parts)
    cost = Cost(*parts, kept, share * kept / layers, working, layers, step)
    plan = fit(budget, cost, longest, asked)
    if plan is None:
        assert least(cost, longest, asked) > budget
        return
    assert plan.bytes <= budget
    assert longest <= plan.tokens <= max(asked, longest)
    assert 0 <= plan.layers <= layers
    assert plan.bytes == cost.peak(plan.tokens, plan.layers)
    assert plan.tokens == longest or plan.tokens in (asked, step, *PASSES)
    more = fit(2 * budget, cost, longest, asked)
    assert more is not None
    assert 50 / more.tokens + more.layers / layers / 3 <= 50 / plan.tokens + plan.layers / layers / 3 + 1e-12


@pytest.mark.parametrize(("text", "expected"), [("2GB", 2 * 10**9), ("1.4 gb", 1.4e9), ("900MiB", 900 * 2**20)])
def test_amounts(text, expected):
    assert in_bytes(text) == expected


@pytest.mark.parametrize("text", ["", "2", "GB", "-1GB", "0MB", "nanGB", "infGB", "2 elephants", "1e999GB"])
def test_no_amounts(text):
    with pytest.raises(ValueError, match="amount of memory"):
        in_bytes(text)


def test_gradients_wait_beside_a_pass_only_where_a_step_has_several():
    """Of one pass alone they come as it goes; of several those of the first wait while the next is made."""
    one, several = replace(COST, step_tokens=1000), replace(COST, step_tokens=1001)
    rest = COST.weights + COST.moments + COST.readout + COST.runtime
    passing = COST.activations(1000, 0)
    assert one.peak(1000, 0) == rest + max(COST.gradients, passing)
    assert several.peak(1000, 0) == rest + COST.gradients + passing
    assert replace(COST, step_tokens=10).peak(1000, 0) == pytest.approx(rest + max(COST.gradients, passing / 100))
