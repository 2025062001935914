"""From a forest back to the rows it was made of, and to the filled line."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from trivium.forest import Example, TokenSequence, lay_out
from trivium.model.layout import filled, sequence_rows


def grown(seed: int) -> list[TokenSequence]:
    """Rows that begin with pieces of earlier rows, some with nothing to train."""
    rng = np.random.default_rng(seed)
    kept: list[np.ndarray] = [np.empty(0, np.int64)]
    found = []
    for _ in range(6):
        trunk = kept[rng.integers(len(kept))]
        kept.append(np.r_[trunk[: rng.integers(len(trunk) + 1)], rng.integers(0, 9, rng.integers(1, 40))])
        found.append(TokenSequence(kept[-1], (rng.random(len(kept[-1])) < rng.choice([0.0, 0.1, 1.0])) * 1.0))
    return found


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=100, deadline=None)
def test_rows_are_the_sequences_again(seed, share):
    sequences = grown(seed)
    forest = lay_out([Example(tuple(sequences))], share)
    rows = sequence_rows(forest)
    assert len(rows) == len(sequences)
    for (places, entries), one in zip(rows, sequences, strict=True):
        assert forest.tokens[places].tolist() == one.inputs.tolist()
        assert entries.tolist() == np.flatnonzero(one.weights[1:]).tolist()


@given(st.integers(0, 10_000), st.sampled_from([1, 7, 64]))
@settings(max_examples=50, deadline=None)
def test_a_filled_line_has_a_tail_that_sees_itself_alone(seed, multiple):
    forest = lay_out([Example(tuple(grown(seed)))])
    longer, length = filled(forest, multiple), len(forest.tokens)
    assert len(longer.tokens) == len(longer.position) == len(longer.subtree_end) == -(-length // multiple) * multiple
    assert longer.subtree_end[length:].tolist() == list(range(length + 1, len(longer.tokens) + 1))
    for name in ("tokens", "position", "subtree_end"):
        assert getattr(longer, name)[:length].tolist() == getattr(forest, name).tolist()
    assert longer.source is forest.source
    assert longer.segments is forest.segments
