"""The order of a run: a pure function of lengths, seed and settings, in which nothing is lost or taken twice."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.data.loader import Batching, RunOrder, apportioned, pack, pack_shared, permutation
from trivium.errors import DataError
from trivium.forest import Example, TokenSequence, lay_out
from trivium.train.processes import dealt

SIZES = st.lists(st.integers(0, 50), min_size=1, max_size=40)


@st.composite
def plans(draw) -> tuple[list[int], Batching]:
    by_size = draw(st.booleans())
    by_epochs = draw(st.booleans())
    batching = Batching(
        seed=draw(st.integers(0, 2**40)),
        micro_batch_tokens=draw(st.integers(1, 200)),
        batch_size=draw(st.integers(1, 50)) if by_size else None,
        batch_tokens=None if by_size else draw(st.integers(1, 300)),
        epochs=draw(st.sampled_from([0.3, 1, 1.5, 2, 3])) if by_epochs else None,
        max_steps=None if by_epochs else draw(st.integers(1, 12)),
    )
    sizes = draw(SIZES)
    return (sizes if sum(sizes) else [*sizes, 1]), batching


def steps(order: RunOrder) -> list[list[int]]:
    return [[i for batch in order[n] for i in batch] for n in range(len(order))]


@given(plans())
@settings(max_examples=200, deadline=None)
@pytest.mark.promise(9)
def test_every_example_exactly_once_per_epoch(plan):
    sizes, batching = plan
    order = RunOrder(sizes, batching)
    # a step is a set; the stream within it is that of the plan's own permutations, cut where the steps end
    counts = Counter(i for step in steps(order) for i in step)
    total = sum(counts.values())
    assert total == order.bounds[-1]
    assert set(counts.values()) <= {total // len(sizes), total // len(sizes) + 1}
    assert order.epochs == total / len(sizes)
    stream = [int(i) for e in range(total // len(sizes) + 1) for i in permutation(len(sizes), batching.seed, e)]
    place = 0
    for step in steps(order):
        assert sorted(step) == sorted(stream[place : place + len(step)])
        place += len(step)


@given(plans())
@settings(max_examples=200, deadline=None)
def test_steps_are_as_many_and_as_large_as_asked(plan):
    sizes, batching = plan
    order = RunOrder(sizes, batching)
    found = steps(order)
    assert all(found), "no step is empty"
    if batching.max_steps:
        assert len(order) == batching.max_steps
    else:
        assert sum(map(len, found)) == max(1, round(batching.epochs * len(sizes)))
    for number, step in enumerate(found):
        last = number == len(found) - 1 and batching.max_steps is None
        if batching.batch_size:
            assert len(step) == batching.batch_size or (last and len(step) <= batching.batch_size)
            continue
        tokens = sum(sizes[i] for i in step)
        assert tokens >= batching.batch_tokens or last
        # one example less would not have been enough: the step stops at the first that reaches its tokens
        at = order.bounds[number + 1] - 1
        assert tokens - sizes[order._at(at)] < batching.batch_tokens


@given(plans())
@settings(max_examples=50, deadline=None)
@pytest.mark.promise(9)
def test_the_plan_is_a_pure_function(plan):
    sizes, batching = plan
    one = [RunOrder(sizes, batching)[n] for n in range(len(RunOrder(sizes, batching)))]
    permutation.cache_clear()
    other = RunOrder(list(sizes), batching)
    assert [other[n] for n in reversed(range(len(other)))][::-1] == one, "in any order, with or without the cache"


@given(SIZES, st.integers(1, 120))
@settings(max_examples=200, deadline=None)
@pytest.mark.promise(9)
def test_packing_loses_nothing_and_keeps_to_the_limit(sizes, limit):
    chosen = [*range(len(sizes)), *range(0, len(sizes), 3)]  # a step across two epochs may hold an example twice
    batches = pack(chosen, sizes, limit)
    assert sorted(i for batch in batches for i in batch) == sorted(chosen)
    for batch in batches:
        assert batch
        assert sum(sizes[i] for i in batch) <= limit or len([i for i in batch if sizes[i]]) == 1
    filled = sorted(sum(sizes[i] for i in batch) for batch in batches)
    if len(filled) > 1:
        assert filled[0] + filled[1] > limit, "two batches that would fit in one"


def test_packing_by_hand():
    assert pack([0, 1, 2, 3, 4], [5, 9, 3, 12, 1], 10) == [[3], [1, 4], [0, 2]]


def test_a_seed_and_an_epoch_have_their_own_order():
    orders = {tuple(permutation(50, seed, epoch).tolist()) for seed in (0, 1) for epoch in (0, 1, 2)}
    assert len(orders) == 6
    assert all(sorted(o) == list(range(50)) for o in orders)


def test_the_order_of_a_seed_never_changes():
    """Runs are resumed and repeated across versions: these numbers are part of the format."""
    assert permutation(8, 0, 0).tolist() == [3, 2, 1, 6, 0, 7, 4, 5]
    assert permutation(8, 7, 3).tolist() == [2, 4, 7, 3, 5, 1, 0, 6]


def test_a_step_straddles_two_epochs():
    order = RunOrder([1] * 5, Batching(seed=3, micro_batch_tokens=2, batch_size=4, epochs=2))
    found = steps(order)
    assert [len(s) for s in found] == [4, 4, 2]
    first, second = permutation(5, 3, 0).tolist(), permutation(5, 3, 1).tolist()
    assert sorted(found[0]) == sorted(first[:4])
    assert sorted(found[1]) == sorted(first[4:] + second[:3])
    assert sorted(found[2]) == sorted(second[3:])
    assert all(len(batch) <= 2 for n in range(3) for batch in order[n])


def test_packing_and_micro_batches_do_not_change_what_a_step_takes():
    plain = {"seed": 1, "batch_size": 6, "epochs": 3.0}
    sizes = [3, 8, 2, 9, 4, 4, 7, 1, 5, 6, 2]
    small, large = (RunOrder(sizes, Batching(micro_batch_tokens=n, **plain)) for n in (9, 1000))
    assert [sorted(s) for s in steps(small)] == [sorted(s) for s in steps(large)]
    assert all(len(large[n]) == 1 for n in range(len(large)))
    assert any(len(small[n]) > 2 for n in range(len(small)))


def test_nothing_to_train_on():
    with pytest.raises(DataError, match="nothing to train on"):
        RunOrder([], Batching(seed=0, micro_batch_tokens=1, batch_size=1, epochs=1))


MIXES = st.lists(st.tuples(st.integers(1, 12), st.floats(0.1, 10)), min_size=2, max_size=4)


@given(mix=MIXES, seed=st.integers(0, 9), epochs=st.integers(1, 4))
@settings(max_examples=100, deadline=None)
def test_a_mix_gives_each_source_its_share(mix, seed, epochs):
    count = sum(n for n, _ in mix)
    order = RunOrder([1] * count, Batching(seed, 100, batch_size=1, epochs=epochs), mix)
    seen = Counter(i for step in steps(order) for i in step)
    assert sum(seen.values()) == epochs * count
    shares = apportioned([weight for _, weight in mix], count)
    first = 0
    for (own, weight), share in zip(mix, shares, strict=True):
        of_it = [seen[i] for i in range(first, first + own)]
        assert sum(of_it) == epochs * share
        assert abs(share - weight / sum(w for _, w in mix) * count) < 1
        assert max(of_it) - min(of_it) <= 1  # no row again before all have been seen
        first += own
    assert order.used().tolist() == sorted(seen)
    again = RunOrder([1] * count, Batching(seed, 100, batch_size=1, epochs=epochs), mix)
    assert steps(again) == steps(order)


def test_a_mix_without_weights_is_all_rows_once():
    batching = Batching(1, 100, batch_size=2, epochs=1)
    assert steps(RunOrder([1] * 6, batching, [(4, None), (2, None)])) == steps(RunOrder([1] * 6, batching))


def test_a_source_without_rows_cannot_be_mixed_in():
    with pytest.raises(DataError, match="no usable row"):
        RunOrder([1, 1], Batching(1, 100, batch_size=2, epochs=1), [(2, 1.0), (0, 1.0)])


@given(st.lists(st.floats(0.01, 100), min_size=1, max_size=6), st.integers(0, 1000))
def test_apportioned_shares_sum_up(weights, count):
    shares = apportioned(weights, count)
    assert sum(shares) == count
    assert all(abs(s - w / sum(weights) * count) < 1 for s, w in zip(shares, weights, strict=True))


def rows_of(*tokens: list[int]) -> list[Example]:
    made = [np.array(t) for t in tokens]
    return [Example((TokenSequence(t, np.r_[np.zeros(len(t) - 1), 1].astype(np.float32)),)) for t in made]


def test_what_rows_have_in_common_takes_its_place_once():
    system = list(range(40))
    rows = rows_of(*([*system, 50 + n, 60, 70, 80] for n in range(6)), list(range(90, 120)))
    sizes = [row.tokens for row in rows]
    assert len(pack(range(7), sizes, 100)) == 4, "by their sizes alone"
    groups = pack_shared(rows, sizes, 100)
    assert sorted(map(sorted, groups)) == [[0, 1, 2, 3, 4, 5, 6]], "40 and six times 3, and 29"
    small = pack_shared(rows, sizes, 50)
    assert sorted(n for group in small for n in group) == list(range(7))
    assert all(len(lay_out([rows[n] for n in group]).tokens) <= 50 for group in small)


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30), st.integers(2, 30)), min_size=1, max_size=12),
    limit=st.integers(1, 120),
)
def test_packing_by_what_is_shared_keeps_every_row_and_the_limit(rows, limit):
    made = rows_of(*([*range(100 * trunk, 100 * trunk + cut), *range(1000 + 50 * n, 1000 + 50 * n + own)]
                     for n, (trunk, cut, own) in enumerate(rows)))  # fmt: skip
    sizes = [row.tokens for row in made]
    groups = pack_shared(made, sizes, limit)
    assert sorted(n for group in groups for n in group) == list(range(len(made)))
    for group in groups:
        assert len(group) == 1 or len(lay_out([made[n] for n in group]).tokens) <= limit


def test_what_is_packed_is_read_a_block_at_a_time(monkeypatch):
    """A data set need not fit in memory for the passes over all of it."""
    from trivium import stage_data

    read: list[int] = []

    class Rows(list):
        def __getitem__(self, index):
            if isinstance(index, slice):
                read.extend(range(*index.indices(len(self))))
            return super().__getitem__(index)

    monkeypatch.setattr(stage_data, "BLOCK", 4)
    made = Rows(rows_of(*([n, n + 1, n + 2] for n in range(10))))
    passes = stage_data.packed(made, 100, "cpu")
    assert len(next(passes).examples) == 4
    assert read == [0, 1, 2, 3]
    assert sum(len(forest.examples) for forest in passes) == 6


@given(st.lists(st.integers(2, 60), min_size=1, max_size=12), st.integers(1, 5), st.integers(20, 300))
@settings(max_examples=60, deadline=None)
def test_no_process_is_idle_where_a_step_has_a_row_for_each(lengths, processes, tokens):
    """However few passes would hold the step."""
    from trivium.stage_data import packed

    made = rows_of(*(range(100 * n, 100 * n + length) for n, length in enumerate(lengths)))
    forests = list(packed(made, tokens, "cpu", processes))
    assert sorted(id(e) for f in forests for e in f.examples) == sorted(map(id, made))
    assert all(len(f.examples) == 1 or len(f.tokens) <= tokens for f in forests)
    work = [len(f.tokens) for f in forests]
    hands = [sum(work[n] for n in hand) for hand in dealt(work, processes)]
    assert sum(hand > 0 for hand in hands) == min(processes, len(made))
    assert max(hands) - min(hands) <= (max(row.tokens for row in made) if len(work) <= processes else max(work))
