"""Whether held-out rows were trained on: word for word, or by runs of 13 tokens that they share.

Thirteen in a row is the measure by which contamination is told since GPT-3 (Brown et al. 2020, appendix C). Only what
is trained counts: one system prompt in all rows is no overlap. Runs are compared by 64-bit hashes.

Cost: one pass over the training tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from trivium.data.store import Examples

RUN = 13
_FACTOR = np.uint64(0x9E3779B97F4A7C15)
_BITS = np.uint64(22)  # of the table that tells most runs apart at once


@dataclass(frozen=True)
class Overlap:
    """Of ``rows`` held-out examples, those whose row is among the training rows, and those that share a run."""

    rows: int
    exact: int
    run: int

    def lines(self) -> list[str]:
        """What there is to be said of it: nothing where there is none."""
        told = [f"{self.exact:,} stand word for word among the training rows"] if self.exact else []
        told += [f"{self.run:,} share {RUN} trained tokens in a row with one"] if self.run else []
        return [f"of {self.rows:,} held-out examples {' and '.join(told)}"] if told else []


def overlap(trained: Examples, held_out: Examples) -> Overlap:
    """How much of ``held_out`` is in ``trained``."""
    digests = held_out.store.digest[held_out.numbers]
    exact = np.isin(digests, trained.store.digest[trained.numbers])
    owners, runs = [], []
    for owner, hashes in _runs(held_out):
        owners.append(owner)
        runs.append(hashes)
    owner = np.concatenate(owners) if owners else np.empty(0, np.int64)
    hashes = np.concatenate(runs) if runs else np.empty(0, np.uint64)
    known = np.unique(hashes)
    table = np.zeros(1 << int(_BITS), bool)
    table[known >> (np.uint64(64) - _BITS)] = True
    found = [np.empty(0, np.uint64)]
    for _, theirs in _runs(trained) if len(known) else ():
        likely = theirs[table[theirs >> (np.uint64(64) - _BITS)]]
        found.append(np.unique(likely[np.isin(likely, known)]))
    shared = np.unique(owner[np.isin(hashes, np.concatenate(found))])
    return Overlap(len(held_out), int(exact.sum()), len(shared))


def _runs(examples: Examples) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(example, hash) of every run of trained tokens, part by part."""
    for numbers, tokens, weights, lengths in examples.flat():
        if len(tokens) < RUN:
            continue
        count = len(tokens) - RUN + 1
        values = tokens.astype(np.uint64) + np.uint64(1)
        hashes = np.zeros(count, np.uint64)
        for n in range(RUN):
            hashes = hashes * _FACTOR + values[n : n + count]
        hashes ^= hashes >> np.uint64(29)
        hashes *= _FACTOR
        # every sequence begins with a token that is not trained, so that no run goes from one to the next
        whole = np.cumsum(np.concatenate([[0], weights]))
        inside = whole[RUN:] - whole[:-RUN] == RUN
        owner = np.repeat(numbers, lengths)[:count]
        yield owner[inside], hashes[inside]
