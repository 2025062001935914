"""The batch: one line of tokens plus one integer per token (design idea 1).

Sequences that begin alike form a tree; a batch is a forest of such trees, laid out depth-first on one line.
The whole attention rule is

    token i sees token j   if and only if   j <= i < subtree_end[j]

and a token's position is its depth. Documents packed side by side, the two answers of a preference pair behind
one prompt, many rows under one system prompt: all are this, and what is shared is computed once.

Shapes:  T tokens on the line,  K entries of the loss,  S sequences (numbered in the order they came).

Cost: the layout is numpy on the host, linear in the tokens (a sort of S keys), about a millisecond a batch.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

# Two sequences share their beginning only when it is at least this long: a shared piece is one more attention
# call, and for a lone begin-of-sequence token that costs more than it saves.
MIN_SHARED = 16


@dataclass(frozen=True, slots=True, eq=False)
class TokenSequence:
    """What every stage's data becomes: token ids ``[n]`` and a weight per token ``[n]``.

    ``weights[i]`` is the weight with which token ``i`` is predicted from the tokens before it; 0 trains nothing.
    """

    tokens: np.ndarray
    weights: np.ndarray

    @property
    def inputs(self) -> np.ndarray:
        """The tokens a model must read: all before the last trained one."""
        trained = np.flatnonzero(self.weights[1:])
        return self.tokens[: trained[-1] + 1] if len(trained) else self.tokens[:0]

    @property
    def trained_tokens(self) -> int:
        return int(np.count_nonzero(self.weights[1:]))


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One row of data: its sequences (1 for text and chat, several answers to one prompt for preferences), and where
    it came from. ``scores`` are of its sequences, where rows have such: of two the higher is the better one, and a
    rating is 1 or -1."""

    sequences: tuple[TokenSequence, ...]
    origin: str = ""
    text_bytes: int = 0  # UTF-8 bytes of what is trained, stop tokens not counted, for bits per byte; 0: not said
    key: Hashable = None  # tells it from any other, where it is made anew each time it is asked for
    adapter: str | None = None  # which adapter of the model its tree is under, where trees of a batch name theirs
    scores: tuple[float, ...] = ()
    weight: float = 1.0  # of the row, against others
    margin: float = 0.0  # by how much the better answer is to be better

    @property
    def identity(self) -> Hashable:
        """The same for the same example of the same data."""
        return id(self) if self.key is None else self.key

    @property
    def tokens(self) -> int:
        """Tokens that this example alone takes on a line, shared beginnings counted once."""
        if len(self.sequences) == 1:
            return len(self.sequences[0].inputs)
        return len(_lines([s.inputs for s in self.sequences], MIN_SHARED)[0])

    @property
    def trained_tokens(self) -> int:
        return sum(s.trained_tokens for s in self.sequences)

    @property
    def pairs(self) -> tuple[tuple[int, int], ...]:
        """Which of its sequences is better than which other, as numbers of sequences; never two that are the same."""
        better = ((a, b) for a, x in enumerate(self.scores) for b, y in enumerate(self.scores) if x > y)
        told = self.sequences
        return tuple((a, b) for a, b in better if not np.array_equal(told[a].tokens, told[b].tokens))


@dataclass(frozen=True, eq=False)
class Forest:
    """A batch. The hidden state at ``source[k]`` predicts ``target[k]``, with ``weight[k]``, in ``sequence[k]``.

    Entries are ordered by sequence, then by position, so that each sequence's entries are consecutive.
    """

    tokens: torch.Tensor  # [T] int64
    subtree_end: torch.Tensor  # [T] int64, one past the last token of the subtree under each token
    position: torch.Tensor  # [T] int64, depth in the tree
    source: torch.Tensor  # [K] int64
    target: torch.Tensor  # [K] int64
    weight: torch.Tensor  # [K] float32
    sequence: torch.Tensor  # [K] int64
    sequences: int  # S
    segments: tuple[Segment, ...]
    examples: tuple[Example, ...] = ()  # what it was laid out from, in order of their sequences
    adapters: tuple[tuple[str | None, int], ...] = ()  # where trees name adapters: each one's name and tokens, in order

    def to(self, device: torch.device | str) -> Forest:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return Forest(**{k: v.to(device) if hasattr(v, "to") else v for k, v in moved.items()})

    @cached_property
    def longest(self) -> int:
        """Tokens on the longest path from a root to a leaf."""
        return max((s.depth + s.length for s in self.segments), default=0)

    def path(self, segment: int) -> list[int]:
        """The segments from the root down to ``segment``, itself included."""
        path = []
        while segment >= 0:
            path.append(segment)
            segment = self.segments[segment].parent
        return path[::-1]


@dataclass(frozen=True, slots=True)
class Segment:
    """An unbranched run of tokens ``[start, start + length)`` that hangs under segment ``parent`` (-1: a root)."""

    start: int
    length: int
    depth: int
    parent: int


def lay_out(examples: Iterable[Example], share: bool = True) -> Forest:
    """Build the forest of some examples; ``share=False`` keeps every sequence a tree of its own.

    Sequence numbers follow the order of the examples, whatever the layout, so an objective finds its pairs.
    """
    import torch

    examples = tuple(examples)
    flat = [s for e in examples for s in e.sequences]
    names = [e.adapter for e in examples for _ in e.sequences]
    line, where, end, adapters = _by_adapter([s.inputs for s in flat], names, MIN_SHARED if share else None)
    depth = np.empty(len(line), np.int64)
    source, target, weight, sequence = [], [], [], []
    for number, (s, at) in enumerate(zip(flat, where, strict=True)):
        depth[at] = np.arange(len(at))
        trained = np.flatnonzero(s.weights[1:])
        source.append(at[trained])
        target.append(s.tokens[trained + 1])
        weight.append(s.weights[trained + 1])
        sequence.append(np.full(len(trained), number))

    def tensor(parts: list[np.ndarray], dtype: type) -> torch.Tensor:
        joined = np.concatenate(parts) if parts else np.empty(0)
        return torch.from_numpy(joined.astype(dtype))

    return Forest(
        tokens=torch.from_numpy(line.astype(np.int64)),
        subtree_end=torch.from_numpy(end),
        position=torch.from_numpy(depth),
        source=tensor(source, np.int64),
        target=tensor(target, np.int64),
        weight=tensor(weight, np.float32),
        sequence=tensor(sequence, np.int64),
        sequences=len(flat),
        segments=segments_of(end, depth),
        examples=examples,
        adapters=adapters,
    )


def _by_adapter(
    inputs: list[np.ndarray], names: list[str | None], min_shared: int | None
) -> tuple[np.ndarray, list[np.ndarray], np.ndarray, tuple[tuple[str | None, int], ...]]:
    """`_lines` of what is under each adapter, one after the other, sharing nothing; and what is whose."""
    wanted = list(dict.fromkeys(names))
    if wanted in ([], [None]):
        return *_lines(inputs, min_shared), ()
    where: list[np.ndarray] = [np.empty(0, np.int64)] * len(inputs)
    lines, ends, adapters, start = [], [], [], 0
    for name in wanted:
        own = [n for n, other in enumerate(names) if other == name]
        line, places, end = _lines([inputs[n] for n in own], min_shared)
        for n, at in zip(own, places, strict=True):
            where[n] = at + start
        lines.append(line)
        ends.append(end + start)
        adapters.append((name, len(line)))
        start += len(line)
    return np.concatenate(lines), where, np.concatenate(ends), tuple(adapters)


def _lines(inputs: list[np.ndarray], min_shared: int | None) -> tuple[np.ndarray, list[np.ndarray], np.ndarray]:
    """Lay sequences out depth-first: (tokens ``[T]``, each sequence's places on the line, subtree_end ``[T]``).

    Sorted sequences are a trie read depth-first: each keeps the longest beginning it has in common with the one
    before it and adds the rest. ``min_shared=None`` shares nothing and keeps the given order.
    """
    order: Iterable[int] = range(len(inputs))
    if min_shared is not None:
        # big-endian bytes sort as the numbers do
        keys = [i.astype(">u4").tobytes() for i in inputs]
        order = sorted(order, key=keys.__getitem__)
    where: list[np.ndarray] = [np.empty(0, np.int64)] * len(inputs)
    end = np.empty(sum(map(len, inputs)), np.int64)
    pieces: list[np.ndarray] = []
    previous, path, length = np.empty(0, np.int64), np.empty(0, np.int64), 0
    for number in order:
        tokens = inputs[number]
        shared = 0 if min_shared is None else common_prefix(previous, tokens)
        shared = shared if shared and shared >= (min_shared or 0) else 0
        end[path[shared:]] = length
        path = np.concatenate([path[:shared], np.arange(length, length + len(tokens) - shared)])
        pieces.append(tokens[shared:])
        length += len(tokens) - shared
        where[number], previous = path, tokens
    end[path] = length
    return np.concatenate(pieces) if pieces else np.empty(0, np.int64), where, end[:length]


def common_prefix(a: np.ndarray, b: np.ndarray) -> int:
    """How many leading elements two arrays have in common."""
    n = min(len(a), len(b))
    differ = np.flatnonzero(a[:n] != b[:n])
    return int(differ[0]) if len(differ) else n


def segments_of(end: np.ndarray, depth: np.ndarray) -> tuple[Segment, ...]:
    """Cut the line where it branches. A token goes on the segment before it if it is that one's only child."""
    if not len(end):
        return ()
    goes_on = (end[1:] == end[:-1]) & (depth[1:] == depth[:-1] + 1)
    starts = np.concatenate([[0], np.flatnonzero(~goes_on) + 1]).tolist()
    found: list[Segment] = []
    stack: list[int] = []  # the open segments, root first
    for number, (start, stop) in enumerate(zip(starts, [*starts[1:], len(end)], strict=True)):
        while stack and end[found[stack[-1]].start] <= start:
            stack.pop()
        found.append(Segment(start, stop - start, int(depth[start]), stack[-1] if stack else -1))
        stack.append(number)
    return tuple(found)
