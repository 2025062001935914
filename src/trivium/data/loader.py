"""The order of a run: which examples each optimizer step takes, and how they are packed into micro-batches.

The whole plan is a pure function of (lengths, seed, batch settings): order depends on (seed, epoch, index) alone, a
step chooses its examples first, and packing only arranges them. Nothing is read or drawn while training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count as count_from

import numpy as np

from trivium.errors import DataError
from trivium.forest import MIN_SHARED, Example, common_prefix


@dataclass(frozen=True)
class Batching:
    """How much a step and a pass hold. Exactly one of ``batch_size`` and ``batch_tokens`` is given, and one of
    ``epochs`` and ``max_steps``."""

    seed: int
    micro_batch_tokens: int
    batch_size: int | None = None
    batch_tokens: int | None = None
    epochs: float | None = None
    max_steps: int | None = None


class RunOrder:
    """``len(order)`` optimizer steps; ``order[n]`` is step ``n``: micro-batches of example indices.

    ``sources``: how many of the examples are of each source, one after the other, and its weight. With weights, an
    epoch is as many examples as there are, of which each source gives its share: each in its own order, which begins
    again when all of them have been seen, so that a small source may be seen several times in an epoch of all.
    """

    def __init__(
        self, sizes: Sequence[int] | np.ndarray, batching: Batching, sources: Sequence[tuple[int, float | None]] = ()
    ) -> None:
        if not len(sizes):
            raise DataError("nothing to train on", "give data with at least one usable row")
        self.sizes = np.asarray(sizes)
        self.batching = batching
        weighted = any(weight is not None for _, weight in sources)
        self.counts = [n for n, _ in sources] if weighted else [len(self.sizes)]
        self.shares = apportioned([w or 0.0 for _, w in sources], len(self.sizes)) if weighted else self.counts
        for count, share in zip(self.counts, self.shares, strict=True):
            if share and not count:
                raise DataError("one of the sources has no usable row to mix in", "mend its rows, or leave it out")
        self._epoch = lru_cache(maxsize=2)(self._ordered)  # a step may straddle two
        self.bounds = self._bounds()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, step: int) -> list[list[int]]:
        return pack(self.chosen(step), self.sizes, self.batching.micro_batch_tokens)

    def chosen(self, step: int) -> list[int]:
        """The examples of a step, in the order in which they were chosen, however they are packed."""
        return [self._at(place) for place in range(self.bounds[step], self.bounds[step + 1])]

    def step_tokens(self) -> np.ndarray:
        """Tokens of each step, shared beginnings counted for every row. Cost: eight bytes for each example seen."""
        last = math.ceil(self.bounds[-1] / len(self.sizes))
        seen = np.concatenate([self.sizes[self._ordered(epoch)] for epoch in range(last)])
        return np.add.reduceat(seen[: self.bounds[-1]], self.bounds[:-1])

    @property
    def epochs(self) -> float:
        """Passes over the data in all."""
        return self.bounds[-1] / len(self.sizes)

    def used(self) -> np.ndarray:
        """The examples that the run will see, each once, in ascending order."""
        epochs, rest = divmod(self.bounds[-1], len(self.sizes))
        if len(self.counts) == 1 and epochs:
            return np.arange(len(self.sizes))
        seen = [self._ordered(epoch) for epoch in range(epochs)]
        return np.unique(np.concatenate([*seen, self._ordered(epochs)[:rest]]))

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self.sizes))
        return int(self._epoch(epoch)[index])

    def _ordered(self, epoch: int) -> np.ndarray:
        """The examples of an epoch in order: a function of the seed and the epoch alone."""
        seed, count = self.batching.seed, len(self.sizes)
        mixed = permutation(count, seed, epoch)
        if len(self.counts) == 1:
            return mixed
        owner = np.repeat(np.arange(len(self.shares)), self.shares)[mixed]
        order = np.empty(count, np.int64)
        first = 0
        for number, (own, share) in enumerate(zip(self.counts, self.shares, strict=True)):
            turns = np.arange(epoch * share, (epoch + 1) * share)
            found = [permutation(own, seed, int(e), number + 1)[turns[turns // own == e] % own]
                     for e in np.unique(turns // own)] if share else []  # fmt: skip
            order[owner == number] = first + np.concatenate([np.empty(0, np.int64), *found])
            first += own
        return order

    def _bounds(self) -> list[int]:
        """Where in the endless stream of epochs each step begins; the last step may be smaller."""
        b = self.batching
        end = math.inf if b.max_steps else max(1, round((b.epochs or 1) * len(self.sizes)))
        bounds = [0]
        if b.batch_size:
            steps = b.max_steps or math.ceil(end / b.batch_size)
            return [int(min(n * b.batch_size, end)) for n in range(steps + 1)]
        place, tokens = 0, 0
        for epoch in count_from(0):
            for size in self.sizes[self._epoch(epoch)].tolist():
                tokens += size
                place += 1
                if tokens >= (b.batch_tokens or 1) or place == end:
                    bounds.append(place)
                    tokens = 0
                if place >= end or (b.max_steps is not None and len(bounds) > b.max_steps):
                    return bounds
        raise AssertionError("an endless stream ended")


def apportioned(weights: Sequence[float], count: int) -> list[int]:
    """``count`` shared out by weight in whole numbers: the largest remainders get what is left over."""
    exact = [weight / sum(weights) * count for weight in weights]
    shares = [int(e) for e in exact]
    ranked = sorted(range(len(exact)), key=lambda i: (shares[i] - exact[i], i))
    for i in ranked[: count - sum(shares)]:
        shares[i] += 1
    return shares


@lru_cache(maxsize=8)
def permutation(count: int, seed: int, epoch: int, *more: int) -> np.ndarray:
    """The order of an epoch. Raw output of a named generator, whose stream numpy promises not to change."""
    raw = np.random.PCG64([seed, epoch, *more]).random_raw(count)
    return np.argsort(raw, kind="stable")


def pack(chosen: Sequence[int], sizes: Sequence[int] | np.ndarray, limit: int) -> list[list[int]]:
    """Arrange examples in micro-batches of at most ``limit`` tokens (one alone may be longer): first fit, longest
    first, which also brings examples of like length together."""
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(chosen, key=lambda i: (-sizes[i], i)):
        for number, left in enumerate(room):
            if sizes[index] <= left:
                batches[number].append(index)
                room[number] -= sizes[index]
                break
        else:
            batches.append([index])
            room.append(limit - sizes[index])
    return batches


def pack_shared(rows: Sequence[Example], sizes: Sequence[int] | np.ndarray, limit: int) -> list[list[int]]:
    """`pack`, where what ``rows`` begin with in common takes its place once: numbers of rows, by micro-batch.

    Rows that share nothing are packed as by their sizes alone. Cost: a sort of the rows by their first tokens.
    """
    plain = pack(range(len(rows)), sizes, limit)
    if len(plain) == 1:
        return plain
    first = [row.sequences[0].inputs for row in rows]
    items: list[list[int]] = []
    taken: list[int] = []
    before: np.ndarray | None = None
    for n in sorted(range(len(rows)), key=lambda n: first[n].astype(">u4").tobytes()):
        shared = 0 if before is None else common_prefix(before, first[n])
        same = before is not None and rows[items[-1][-1]].adapter == rows[n].adapter
        if same and shared >= MIN_SHARED and taken[-1] + sizes[n] - shared <= limit:
            items[-1].append(n)
            taken[-1] += int(sizes[n]) - shared
        else:
            items.append([n])
            taken.append(int(sizes[n]))
        before = first[n]
    if len(items) == len(rows):
        return plain
    return [[n for item in group for n in items[item]] for group in pack(range(len(items)), taken, limit)]
