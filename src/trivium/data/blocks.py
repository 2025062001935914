"""What files are cut into: rows, places that are none, and blocks of either, which any process can read.

The sizes are looked up where they are used, as ``blocks.BLOCK``, so that a test can make them small.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

BLOCK = 2**21  # bytes of a block, about
LONGEST_LINE = 2**25  # bytes of a line or an array's element that is still read; a longer one is no row
PASSAGE = 2**15  # bytes of a text file that are one row, at most
KEPT = 2000  # characters of a row that cannot be read, for whoever is to mend it
ROWS = 500  # rows of a block, where they are cut one by one


Read = tuple[int, Any, str | None, bool]  # a row's line, its value, or why it has none, and whether a text goes on


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file."""

    value: dict[str, Any]
    file: str
    line: int
    goes_on: bool = False  # a piece of a text that the next row goes on with

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A place in a file that could not be read as a row, why, and how what is there begins."""

    file: str
    line: int
    reason: str
    raw: str = ""

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive rows of a file: as ``data`` that is still to be read from line ``line`` on, or already read, as
    ``read``. See `readers.rows_of`."""

    form: str
    line: int = 1
    data: bytes = b""
    read: list[Read] = field(default_factory=list)


def in_blocks(rows: Iterable[Read]) -> Iterator[Block]:
    """Rows that were cut one by one, many together."""
    rows = iter(rows)
    while some := list(islice(rows, ROWS)):
        yield Block("rows", read=some)


def shown(data: bytes) -> str:
    """How a row that cannot be read begins."""
    return data[: 4 * KEPT].decode("utf-8", "backslashreplace")[:KEPT]
