"""What steps that were tried say of a stage's whole."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.loader import Batching, RunOrder
from trivium.planning.trial import Few, Tried, _others, evaluations


def tried(tokens, seconds) -> Tried:
    return Tried(tokens=tokens, seconds=seconds, held_out=0.0, reference=0.0, peak=0, state=0)


def test_a_line_through_steps_of_unlike_sizes():
    found = tried([100, 200, 400], [2.0, 3.0, 5.0])  # one second a step, and one for a hundred tokens
    assert found.training(np.array([100] * 10)) == pytest.approx(20.0)
    assert found.training(np.array([1000, 50])) == pytest.approx(11.0 + 1.5)


@pytest.mark.parametrize("seconds", [[2.0, 2.2, 1.8], [5.0, 3.0, 2.0]])
def test_what_lies_together_or_makes_no_sense_gives_a_mean(seconds):
    tokens = [100, 101, 102] if seconds[0] == 2.0 else [100, 200, 400]
    rate = sum(seconds) / sum(tokens)
    assert tried(tokens, seconds).training(np.array([300, 300])) == pytest.approx(600 * rate)


@given(sizes=st.lists(st.integers(1, 5000), min_size=1, max_size=60), count=st.integers(2, 6))
def test_the_largest_step_is_always_tried_and_none_twice(sizes, count):
    found = _others(np.array(sizes), 0, count)
    assert len(set(found)) == len(found) <= count
    assert max(sizes) in {sizes[n] for n in found}


@pytest.mark.parametrize(
    ("steps", "every", "expected"), [(1, None, 2), (20, None, 4), (9, 3, 4), (10, 3, 5), (5, 100, 2)]
)
def test_evaluations_before_on_the_way_and_after(steps, every, expected):
    assert evaluations(steps, every) == expected


def test_some_steps_of_an_order_are_those_steps():
    order = RunOrder([5, 9, 2, 7, 4, 8], Batching(seed=1, micro_batch_tokens=20, batch_size=2, epochs=2.0))
    few = Few(order, [4, 1])
    assert len(few) == 2
    assert [few.chosen(0), few.chosen(1)] == [order.chosen(4), order.chosen(1)]
    assert few.epochs == order.epochs


@given(
    sizes=st.lists(st.integers(1, 300), min_size=1, max_size=40), seed=st.integers(0, 5), epochs=st.floats(0.2, 3.5),
    batch=st.one_of(st.tuples(st.just("batch_size"), st.integers(1, 9)),
                    st.tuples(st.just("batch_tokens"), st.integers(1, 900))),
)  # fmt: skip
def test_the_tokens_of_all_steps_are_known_beforehand(sizes, seed, epochs, batch):
    order = RunOrder(sizes, Batching(seed=seed, micro_batch_tokens=100, epochs=epochs, **dict([batch])))
    assert order.step_tokens().tolist() == [sum(sizes[i] for i in order.chosen(n)) for n in range(len(order))]
