"""Prepared rows on disk or in memory: one Arrow file per part, memory-mapped, and examples made of it when asked for.

    part = encode_part(made, file=0)            # the bytes of an Arrow file
    store = Store([part], ["chats.jsonl"], key)
    store.examples(np.arange(5))[0]             # an Example; its tokens are read from the file just now

What a run holds in memory of a data set are `COLUMNS`, 37 bytes an example, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import numpy as np

from trivium.data.examples import Made
from trivium.forest import Example, TokenSequence

if TYPE_CHECKING:
    import pyarrow as pa

# Of every example, held in memory: numbers that order, mix and account for rows without reading their tokens.
COLUMNS = {
    "digest": np.uint64,  # of its row
    "first": np.bool_,  # whether it is its row's first
    "line": np.int64,
    "file": np.int32,
    "size": np.int32,  # tokens that it alone takes on a line, shared beginnings counted once
    "total": np.int32,  # tokens of its sequences
    "longest": np.int32,  # tokens of its longest sequence
    "trained": np.int32,
}
OPEN = 128  # parts held open at a time


def encode_part(made: Made, file: int) -> bytes:
    """The examples of a block as an Arrow file: ``COLUMNS``, and ``tokens`` (of all sequences in a row), ``lengths``
    (of each sequence), ``spans`` (where weights are 1: start, end, start, ...), ``bytes`` (of the trained text), and
    the row's ``weight``, ``margin`` and ``scores`` (of each sequence)."""
    import pyarrow as pa

    sequences = [e.sequences for e in made.examples]
    total = np.array([sum(len(s.tokens) for s in some) for some in sequences], np.int64)
    weights = np.concatenate([*(s.weights for some in sequences for s in some), np.zeros(1, np.float32)]) != 0
    owner, turns = _turns(total, weights)
    trained = np.bincount(owner, turns[:, 1] - turns[:, 0], len(sequences)).astype(np.int64)
    # a lone sequence is read up to before its last trained token
    reads = np.zeros(len(sequences), np.int64)
    np.maximum.at(reads, owner, turns[:, 1] - 1)
    numbers: dict[str, Any] = {
        "digest": made.digests,
        "first": made.firsts,
        "line": made.lines,
        "file": [file] * len(sequences),
        "size": [int(reads[n]) if len(e.sequences) == 1 else e.tokens for n, e in enumerate(made.examples)],
        "total": total,
        "longest": [max(len(s.tokens) for s in some) for some in sequences],
        "trained": trained,
    }
    tokens = [s.tokens for some in sequences for s in some]
    each = np.array([len(some) for some in sequences], np.int64)
    columns = {name: pa.array(np.array(numbers[name], dtype)) for name, dtype in COLUMNS.items()}
    columns |= {
        "bytes": pa.array(np.array([e.text_bytes for e in made.examples], np.int64)),
        "tokens": _lists(total, tokens),
        "lengths": _lists(each, [np.array([len(t) for t in tokens])]),
        "spans": _lists(2 * np.bincount(owner, minlength=len(sequences)), [turns.reshape(-1)]),
    }
    scores = [e.scores for e in made.examples]
    columns |= {
        "weight": pa.array(np.array([e.weight for e in made.examples], np.float32)),
        "margin": pa.array(np.array([e.margin for e in made.examples], np.float32)),
        "scores": _lists([len(s) for s in scores], [np.array([x for s in scores for x in s])], np.float32),
    }
    batch = pa.record_batch(columns)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


def _lists(lengths: Sequence[int] | np.ndarray, values: list[np.ndarray], dtype: type = np.int32) -> pa.Array:
    """A column of lists of these lengths, their values one after the other."""
    import pyarrow as pa

    ends = np.concatenate([[0], np.cumsum(lengths)])
    flat: np.ndarray = np.concatenate(values).astype(dtype, copy=False) if values else np.empty(0, dtype)
    return pa.LargeListArray.from_arrays(pa.array(ends.astype(np.int64)), pa.array(flat))


def _turns(lengths: np.ndarray, trained: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of examples of so many tokens in a row, and whether each token is trained (one more at the end, that is not):
    the example of every trained span ``[S]``, and where in it the span starts and ends ``[S, 2]``.

    Every sequence's first token is not trained, so that no span goes from one to the next."""
    starts = np.flatnonzero(trained[1:] & ~trained[:-1]) + 1
    ends = np.flatnonzero(~trained[1:] & trained[:-1]) + 1
    begins = np.concatenate([[0], np.cumsum(lengths)])
    owner = np.searchsorted(begins, starts, "right") - 1
    return owner, np.stack([starts - begins[owner], ends - begins[owner]], 1)


class Store:
    """Prepared examples, in the order of the rows that they were made of.

    ``parts`` are files, or their bytes; ``files``: what each file's rows are called; ``key`` tells stores apart.
    """

    def __init__(self, parts: Sequence[Path | bytes], files: Sequence[str], key: str) -> None:
        self.parts, self.files, self.key = parts, files, key
        self.batch = lru_cache(maxsize=OPEN)(self._opened)  # a part's columns
        columns = [self._numbers(n) for n in range(len(parts))]
        self.starts = np.cumsum([0, *(len(c["line"]) for c in columns)])  # of each part, in examples
        joined = {n: np.concatenate([np.empty(0, t), *(c[n] for c in columns)]) for n, t in COLUMNS.items()}
        self.digest, self.first, self.line, self.file = (joined[n] for n in ("digest", "first", "line", "file"))
        self.size, self.total, self.longest = (joined[n] for n in ("size", "total", "longest"))
        self.trained = joined["trained"]

    def __len__(self) -> int:
        return int(self.starts[-1])

    def _opened(self, part: int) -> pa.RecordBatch:
        import pyarrow as pa

        source = self.parts[part]
        opened = pa.memory_map(str(source)) if isinstance(source, Path) else pa.BufferReader(source)
        return pa.ipc.open_file(opened).get_batch(0)

    def _numbers(self, part: int) -> dict[str, np.ndarray]:
        batch = self._opened(part)
        return {n: _numpy(batch.column(n)).astype(t) for n, t in COLUMNS.items()}

    def example(self, number: int) -> Example:
        """Example ``number``, its tokens still lying where they are stored."""
        part = int(np.searchsorted(self.starts, number, "right")) - 1
        batch = self.batch(part)
        at = number - int(self.starts[part])
        tokens, lengths, spans = (_list_at(batch.column(n), at) for n in ("tokens", "lengths", "spans"))
        weights = np.zeros(len(tokens), np.float32)
        for start, end in spans.reshape(-1, 2).tolist():
            weights[start:end] = 1
        cuts = np.cumsum(lengths)[:-1]
        pieces = zip(np.split(tokens, cuts), np.split(weights, cuts), strict=True)
        text_bytes, weight, margin = (batch.column(n)[at].as_py() for n in ("bytes", "weight", "margin"))
        return Example(
            tuple(TokenSequence(t, w) for t, w in pieces),
            f"{self.files[int(self.file[number])]}:{int(self.line[number])}",
            text_bytes,
            (self.key, number),
            scores=tuple(_list_at(batch.column("scores"), at).tolist()),
            weight=weight,
            margin=margin,
        )

    def examples(self, numbers: np.ndarray) -> Examples:
        return Examples(self, numbers)


def _list_at(column: pa.LargeListArray, at: int) -> np.ndarray:
    ends = _numpy(column.offsets[at : at + 2])
    return _numpy(column.values.slice(int(ends[0]), int(ends[1] - ends[0])))


def _numpy(array: pa.Array) -> np.ndarray:
    """Numbers, none of them missing, where they lie; pyarrow's own way imports pandas where that is installed."""
    if array.type.bit_width == 1:
        bits = np.frombuffer(array.buffers()[1] or b"", np.uint8)
        return np.unpackbits(bits, bitorder="little")[array.offset : array.offset + len(array)].astype(bool)
    kind = np.dtype(array.type.to_pandas_dtype())  # a type of NumPy
    return np.frombuffer(array.buffers()[1] or b"", kind)[array.offset : array.offset + len(array)]


@dataclass(frozen=True, eq=False)
class Examples(Sequence[Example]):
    """Some of a store's examples, each made when it is asked for."""

    store: Store
    numbers: np.ndarray  # of each in the store

    def __len__(self) -> int:
        return len(self.numbers)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Examples: ...
    def __getitem__(self, index: int | slice) -> Example | Examples:
        if isinstance(index, slice):
            return Examples(self.store, self.numbers[index])
        return self.store.example(int(self.numbers[index]))

    def __iter__(self) -> Iterator[Example]:
        return (self.store.example(int(n)) for n in self.numbers)

    @property
    def sizes(self) -> np.ndarray:
        """Tokens that each takes on a line: ``[n]``."""
        return np.asarray(self.store.size[self.numbers])

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of each: ``[n]``."""
        return np.asarray(self.store.trained[self.numbers])

    def flat(self) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]]:
        """Part by part: the examples' numbers, all their tokens in a row, 1 for each that is trained, and how many
        tokens each example has."""
        store = self.store
        part_of = np.searchsorted(store.starts, self.numbers, "right") - 1
        for part in np.unique(part_of):
            numbers = np.sort(self.numbers[part_of == part])
            batch, at = store.batch(int(part)), numbers - store.starts[part]
            ends = _numpy(batch.column("tokens").offsets)
            values, turns = (_numpy(batch.column(n).values) for n in ("tokens", "spans"))
            edges = _numpy(batch.column("spans").offsets)
            # spans count from their example's first token; +1 where one starts, -1 where it ends
            owner = np.repeat(np.arange(batch.num_rows), np.diff(edges))
            steps = np.zeros(len(values) + 1, np.int8)
            np.add.at(steps, turns + ends[owner], np.where(np.arange(len(turns)) % 2 == 0, 1, -1))
            weights = np.cumsum(steps[:-1], dtype=np.int8)
            mine = np.zeros(batch.num_rows, bool)
            mine[at] = True
            wanted = np.repeat(mine, np.diff(ends))
            yield numbers, values[wanted], weights[wanted], np.diff(ends)[at]

    def at(self, indexes: Sequence[int] | np.ndarray) -> Examples:
        """The examples at these places, in this order."""
        return Examples(self.store, self.numbers[np.asarray(indexes, np.int64)])
