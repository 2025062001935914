"""The layout of a batch, against what the sequences say themselves: over random tries, with hypothesis."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.forest import MIN_SHARED, Example, TokenSequence, common_prefix, lay_out, segments_of


def sequence(tokens: list[int], weights: list[float] | None = None) -> TokenSequence:
    weights = [1.0] * len(tokens) if weights is None else weights
    return TokenSequence(np.array(tokens, np.int64), np.array(weights, np.float32))


def example(*rows: list[int]) -> Example:
    return Example(tuple(sequence(row) for row in rows))


@st.composite
def tries(draw) -> list[Example]:
    """Examples that grow out of each other: every row begins with a piece of an earlier one, at any length."""
    vocabulary = draw(st.sampled_from([2, 5, 70_000]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows: list[np.ndarray] = [np.empty(0, np.int64)]
    sequences = []
    for _ in range(draw(st.integers(1, 7))):
        trunk = rows[rng.integers(len(rows))]
        kept = int(rng.integers(len(trunk) + 1)) if rng.random() < 0.7 else len(trunk)
        grown = np.concatenate([trunk[:kept], rng.integers(0, vocabulary, rng.integers(0, 40))])
        rows.append(grown)
        weights = (rng.random(len(grown)) < rng.choice([0.0, 0.2, 1.0])) * rng.choice([0.5, 1.0, 2.0], len(grown))
        sequences.append(TokenSequence(grown.astype(np.int64), weights.astype(np.float32)))
    cuts = sorted({0, len(sequences), *rng.integers(0, len(sequences) + 1, 2).tolist()})
    return [Example(tuple(sequences[a:b])) for a, b in itertools.pairwise(cuts)]


def flat(examples: list[Example]) -> list[TokenSequence]:
    return [s for e in examples for s in e.sequences]


def ancestors(forest) -> list[list[int]]:
    """Every token's path from the root, itself last, from the order and the depths of a depth-first line alone."""
    paths, open_path = [], []
    for place, depth in enumerate(forest.position.tolist()):
        open_path = [*open_path[:depth], place]
        paths.append(open_path)
    return paths


def longest_shared(rows: list[np.ndarray]) -> int:
    return max((common_prefix(a, b) for n, a in enumerate(rows) for b in rows[:n]), default=0)


@given(tries(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_rule_is_ancestor_or_itself(examples, share):
    forest = lay_out(examples, share)
    end = forest.subtree_end.numpy()
    assert len(end) == len(forest.tokens) == len(forest.position)
    for i, path in enumerate(ancestors(forest)):
        assert [j for j in range(len(end)) if j <= i < end[j]] == path


@given(tries(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_every_path_spells_its_sequence_and_entries_follow_it(examples, share):
    forest = lay_out(examples, share)
    paths, tokens = ancestors(forest), forest.tokens.numpy()
    source, target = forest.source.numpy(), forest.target.numpy()
    assert forest.sequences == len(flat(examples))
    assert forest.examples == tuple(examples)
    at = 0
    for number, s in enumerate(flat(examples)):
        for place in np.flatnonzero(s.weights[1:]):
            # the hidden state behind tokens[0..place] predicts tokens[place + 1]
            assert tokens[paths[source[at]]].tolist() == s.tokens[: place + 1].tolist()
            assert (target[at], forest.weight[at], forest.sequence[at]) == (
                s.tokens[place + 1],
                s.weights[place + 1],
                number,
            )
            at += 1
    assert at == len(source)


@given(tries(), st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_line_holds_nothing_that_no_one_reads(examples, share):
    forest = lay_out(examples, share)
    paths, read = ancestors(forest), set()
    for place in forest.source.tolist():
        read.update(paths[place])
    assert read == set(range(len(forest.tokens)))
    assert not share or len(forest.tokens) <= sum(len(s.inputs) for s in flat(examples))


@given(tries())
@settings(max_examples=150, deadline=None)
def test_sharing_follows_the_longest_beginning(examples):
    """The number of tokens is what a trie would hold that never shares a beginning shorter than MIN_SHARED."""
    forest = lay_out(examples)
    trie = {row.tobytes() for s in flat(examples) for row in [s.inputs[: n + 1] for n in range(len(s.inputs))]}
    rows = [s.inputs for s in flat(examples)]
    if longest_shared(rows) < MIN_SHARED:
        assert len(forest.tokens) == sum(map(len, rows))
    prefixes = {tuple(row[:MIN_SHARED].tolist()) for row in rows}
    starts = sum(1 for s in forest.segments if s.parent < 0)
    alone = sum(1 for row in rows if 0 < len(row) < MIN_SHARED)
    assert starts == len({p for p in prefixes if len(p) == MIN_SHARED}) + alone
    if alone == 0:  # every row is long: what is held twice are beginnings that differ within the first MIN_SHARED
        deep = {p for p in trie if len(p) // 8 >= MIN_SHARED}
        assert len(forest.tokens) == len(deep) + starts * (MIN_SHARED - 1)


@given(tries())
@settings(max_examples=100, deadline=None)
def test_unshared_is_each_sequence_after_the_other(examples):
    forest = lay_out(examples, share=False)
    rows = [s.inputs for s in flat(examples)]
    assert forest.tokens.tolist() == [t for row in rows for t in row.tolist()]
    assert forest.position.tolist() == [n for row in rows for n in range(len(row))]
    ends = np.repeat(np.cumsum([len(r) for r in rows]), [len(r) for r in rows])
    assert forest.subtree_end.tolist() == ends.tolist()


@given(tries(), st.booleans())
@settings(max_examples=100, deadline=None)
def test_segments_partition_the_line_at_its_branches(examples, share):
    forest = lay_out(examples, share)
    paths, end = ancestors(forest), forest.subtree_end.numpy()
    covered = []
    children = dict.fromkeys(range(-1, len(end)), 0)
    for path in paths:
        children[path[-2] if len(path) > 1 else -1] += 1
    for number, segment in enumerate(forest.segments):
        places = list(range(segment.start, segment.start + segment.length))
        covered += places
        assert segment.length > 0
        assert len(set(end[places])) == 1
        assert forest.position[places].tolist() == list(range(segment.depth, segment.depth + segment.length))
        above = [forest.segments[n] for n in forest.path(number)]
        spelled = [place for a in above for place in range(a.start, a.start + a.length)]
        assert spelled == paths[places[-1]]
        before = paths[places[0]][-2] if segment.depth else -1
        assert before < 0 or children[before] > 1, "a segment begins only behind a branching"
    assert covered == list(range(len(end)))
    assert forest.longest == max(map(len, paths), default=0)


@given(tries())
@settings(max_examples=100, deadline=None)
def test_an_example_knows_its_tokens(examples):
    for one in examples:
        assert one.tokens == len(lay_out([one]).tokens)
        assert one.trained_tokens == len(lay_out([one]).source)
        assert one.trained_tokens == sum(s.trained_tokens for s in one.sequences)


@given(st.permutations(range(4)), tries())
@settings(max_examples=50, deadline=None)
def test_the_tree_does_not_depend_on_the_order_of_the_rows(order, examples):
    examples = (examples * 4)[:4]
    one, other = lay_out(examples), lay_out([examples[n] for n in order])
    for name in ("tokens", "subtree_end", "position"):
        assert getattr(one, name).tolist() == getattr(other, name).tolist()


@pytest.mark.parametrize(("common", "tokens"), [(MIN_SHARED - 1, 2 * (MIN_SHARED + 2)), (MIN_SHARED, MIN_SHARED + 4)])
def test_a_short_shared_beginning_is_not_shared(common, tokens):
    trunk = list(range(100, 100 + common))
    tail = MIN_SHARED + 3 - common
    forest = lay_out([example(trunk + [1] * tail, trunk + [2] * tail)])
    assert len(forest.tokens) == tokens  # the last token of a row is never read


def test_rows_that_share_nothing_enough_stay_roots_beside_those_that_do():
    trunk = list(range(MIN_SHARED))
    forest = lay_out([example([*trunk, 50, 1], [*trunk[:4], 99, 1], [*trunk, 60, 1])])
    assert [(s.depth, s.length) for s in forest.segments if s.parent < 0] == [(0, MIN_SHARED), (0, 5)]
    assert len(forest.tokens) == MIN_SHARED + 2 + 5


def test_large_token_ids_sort_as_numbers():
    """65,535, 65,536 and 16,777,216 fall apart when compared as little-endian bytes, or in 16 bits."""
    trunk = [65_536, 1, 70_000, 16_777_216] * 5
    rows = [[*trunk, n, 7] for n in (65_535, 3, 65_536, 131_072, 65_539, 16_777_216, 256)]
    forest = lay_out([example(*rows)])
    assert len(forest.tokens) == len(trunk) + len(rows)
    assert forest.tokens[len(trunk) :].tolist() == [3, 256, 65_535, 65_536, 65_539, 131_072, 16_777_216]
    # equal in their lower 16 bits only: nothing is shared
    apart = lay_out([example([65_536 + 5] * 20, [5] * 20)])
    assert len(apart.tokens) == 38


def test_the_same_row_twice_is_read_once_and_trained_twice():
    row = list(range(30))
    forest = lay_out([example(row), example(row)])
    assert len(forest.tokens) == 29
    assert len(forest.source) == 58
    assert forest.sequence.tolist() == [0] * 29 + [1] * 29


def test_sequences_without_anything_to_train_take_no_room():
    empty, untrained = sequence([]), sequence([1, 2, 3], [1.0, 0.0, 0.0])  # the first token is predicted by nothing
    trained = sequence([5, 6, 7, 8], [0.0, 0.0, 1.0, 0.0])
    forest = lay_out([Example((empty, trained, untrained))])
    assert forest.tokens.tolist() == [5, 6]
    assert (forest.source.tolist(), forest.target.tolist(), forest.sequence.tolist()) == ([1], [7], [1])
    assert forest.sequences == 3


@pytest.mark.parametrize("rows", [[], [[sequence([])]], [[sequence([9]), sequence([4, 4], [1, 0])]]])
def test_a_batch_of_nothing(rows):
    examples = [Example(tuple(row)) for row in rows]
    forest = lay_out(examples)
    assert len(forest.tokens) == len(forest.source) == len(forest.segments) == forest.longest == 0
    assert forest.sequences == len(flat(examples))
    assert all(e.tokens == e.trained_tokens == 0 for e in examples)


def test_moving_keeps_everything():
    forest = lay_out([example(list(range(20)), [*range(18), 7, 7])])
    moved = forest.to("cpu")
    assert moved.segments == forest.segments
    assert moved.examples == forest.examples
    assert moved.tokens.tolist() == forest.tokens.tolist()


def test_segments_of_a_small_tree_by_hand():
    #   0 1 2 ─ 3 4
    #         └ 5 ─ 6
    #             └ 7        8 9 (a second tree)
    end = np.array([8, 8, 8, 5, 5, 8, 7, 8, 10, 10])
    depth = np.array([0, 1, 2, 3, 4, 3, 4, 4, 0, 1])
    found = [(s.start, s.length, s.depth, s.parent) for s in segments_of(end, depth)]
    assert found == [(0, 3, 0, -1), (3, 2, 3, 0), (5, 1, 3, 0), (6, 1, 4, 2), (7, 1, 4, 2), (8, 2, 0, -1)]
