"""The order of a run: which examples each optimizer step takes, and how they are packed into micro-batches.

The whole plan is a pure function of (lengths, seed, batch settings): order depends on (seed, epoch, index) alone, a
step chooses its examples first, and packing only arranges them. Nothing is read or drawn while training.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from trivium.errors import DataError


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
    """``len(order)`` optimizer steps; ``order[n]`` is step ``n``: micro-batches of example indices."""

    def __init__(self, sizes: list[int], batching: Batching) -> None:
        if not sizes:
            raise DataError("nothing to train on", "give data with at least one usable row")
        self.sizes = sizes
        self.batching = batching
        self.bounds = self._bounds()

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, step: int) -> list[list[int]]:
        chosen = [self._at(place) for place in range(self.bounds[step], self.bounds[step + 1])]
        return pack(chosen, self.sizes, self.batching.micro_batch_tokens)

    @property
    def epochs(self) -> float:
        """Passes over the data in all."""
        return self.bounds[-1] / len(self.sizes)

    def _at(self, place: int) -> int:
        epoch, index = divmod(place, len(self.sizes))
        return int(permutation(len(self.sizes), self.batching.seed, epoch)[index])

    def _bounds(self) -> list[int]:
        """Where in the endless stream of epochs each step begins; the last step may be smaller."""
        b = self.batching
        end = math.inf if b.max_steps else max(1, round((b.epochs or 1) * len(self.sizes)))
        bounds = [0]
        if b.batch_size:
            steps = b.max_steps or math.ceil(end / b.batch_size)
            return [int(min(n * b.batch_size, end)) for n in range(steps + 1)]
        place, tokens = 0, 0
        while place < end and (b.max_steps is None or len(bounds) <= b.max_steps):
            tokens += self.sizes[self._at(place)]
            place += 1
            if tokens >= (b.batch_tokens or 1) or place == end:
                bounds.append(place)
                tokens = 0
        return bounds


@lru_cache(maxsize=4)  # a step may straddle two epochs
def permutation(count: int, seed: int, epoch: int) -> np.ndarray:
    """The order of an epoch. Raw output of a named generator, whose stream numpy promises not to change."""
    raw = np.random.PCG64([seed, epoch]).random_raw(count)
    return np.argsort(raw, kind="stable")


def pack(chosen: list[int], sizes: list[int], limit: int) -> list[list[int]]:
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
