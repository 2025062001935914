"""Rows of any usual file, each knowing its file and line; a row that cannot be read is a ``BadRow``, never a crash.

    for row in read_rows(Path("data/")):
        print(row.origin, row.reason if isinstance(row, BadRow) else row.value)

What a "line" is, always counted from 1: the line, for JSON lines; the line on which an element of a JSON array begins,
or its number where several stand on one line; the first line of a CSV record; the row's number in parquet. A text file
is one row, ``{"text": ...}``, or several passages of at most 32 kB, each at its first line.

Cost: one pass, streaming; only compressed ``.parquet`` files are held whole in memory.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import hashlib
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import IO, Any, cast

from trivium.data.blocks import ROWS, BadRow, Block, Row
from trivium.data.formats import Fields, RowError, Text, mapped, parse
from trivium.data.readers import READERS, rows_of
from trivium.errors import DataError, beside, nearest, said

_ENDINGS = ", ".join(READERS) + ", each also with .gz or .zst"


@dataclass(frozen=True, eq=False)
class Listed:
    """Rows in memory, as a file called ``name`` would hold them: the first is at line 1."""

    rows: Sequence[Any]
    name: str = "rows"

    def __str__(self) -> str:
        return self.name

    def blocks(self) -> Iterator[Block]:
        """The rows as they would come out of a JSON file: plain values, whatever objects they were made of."""
        for first in range(0, len(self.rows), ROWS):
            some = enumerate(self.rows[first : first + ROWS], first + 1)
            yield Block("rows", read=[(line, *_plain(value), False) for line, value in some])


def _plain(value: Any) -> tuple[Any, str | None]:
    """(a row's value, None), or (how it begins, why it is none)."""
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        return str(value)[:200], f"a row is a mapping with named fields, not {type(value).__name__}"
    try:
        plain = json.loads(json.dumps(value, ensure_ascii=False, default=str).encode("utf-8"))
    except (ValueError, TypeError, RecursionError) as error:
        return None, f"holds what no file of rows can hold: {str(error)[:80]}"
    return plain, None


Source = Path | Listed


@dataclass(frozen=True)
class Mix:
    """One of the sources of a data set: where its rows are, its share of the examples against the other sources'
    ``weight`` (None: as many as it has), and what its fields are called, ours by theirs."""

    source: Source
    weight: float | None = None
    fields: Fields = ()

    def files(self) -> list[Path]:
        """Its files; none where the rows are in memory. Raises DataError."""
        return [] if isinstance(self.source, Listed) else files_of(self.source)


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a file, a folder or a glob, in the order of ``files_of``, or those in memory.

    Raises DataError where there is no such file or it cannot be opened; whatever is wrong *inside* a file is a
    ``BadRow`` at its line.
    """
    if isinstance(source, Listed):
        for block in source.blocks():
            yield from rows_of(block, source.name)
        return
    for file in files_of(source):
        for block in blocks_of(file):
            yield from rows_of(block, str(file))


def blocks_of(file: Path, told: Callable[[int], None] = lambda _: None) -> Iterator[Block]:
    """A file's blocks in order; ``told`` how many of its bytes have been read, after each.

    Raises DataError where it cannot be opened or read.
    """
    try:
        with file.open("rb") as raw, _unpacked(raw, file) as stream:
            last = 0
            for block in READERS[_ending(file)](stream):
                last = block.read[-1][0] if block.read else block.line - 1
                yield block
                told(0 if raw.closed else raw.tell())
            if broken := getattr(stream, "broken", None):
                reason = f"the compressed file is cut off or broken here ({broken})"
                yield Block("rows", read=[(last + 1, None, reason, False)])
    except OSError as error:
        raise DataError(f"cannot read {file}: {error.strerror or error}", "check the file and its rights") from None


def good_rows(
    sources: Iterable[Source | Mix], wanted: Callable[[dict[str, Any]], bool] | None = None
) -> Iterator[dict[str, Any]]:
    """The values of the rows that can be read, their fields under our names; ``wanted`` chooses among them by what
    stands in the file."""
    for given in sources:
        mix = given if isinstance(given, Mix) else Mix(given)
        for row in read_rows(mix.source):
            if isinstance(row, Row) and (wanted is None or wanted(row.value)):
                with contextlib.suppress(RowError):
                    yield mapped(row.value, mix.fields)


def texts_of(sources: Iterable[Source | Mix], wanted: Callable[[dict[str, Any]], bool] | None = None) -> Iterator[str]:
    """The text of every good row that is one; ``wanted`` chooses among the rows."""
    for value in good_rows(sources, wanted):
        with contextlib.suppress(RowError):
            read = parse(value, "text")
            if isinstance(read, Text):
                yield read.text


def files_of(path: Path) -> list[Path]:
    """The data files that ``path`` stands for: itself, all in and under a folder, or all that a glob matches.

    Sorted. In folders, hidden files and the papers that lie beside data (README, LICENSE, dataset_info) are left out.
    Raises DataError naming what is missing and the nearest name there is.
    """
    path = Path(path)
    try:
        here = path.is_file()
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}", "check the file and its rights") from None
    if path.is_dir() and not os.access(path, os.R_OK | os.X_OK):
        raise DataError(f"cannot read {path}: no permission", "check the folder and its rights")
    if here:
        if _ending(path) not in READERS:
            raise DataError(f"cannot tell what {path} holds from its ending", f"files that are read: {_ENDINGS}")
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if _is_data(p.relative_to(path)) and p.is_file()]
    elif any(c in str(path) for c in "*?["):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (Path.glob wants a root)
        found = [p for p in found if _ending(p) in READERS and p.is_file()]
    else:
        raise _missing(path)
    if not found:
        raise DataError(f"no data files in {path}", f"files that are read: {_ENDINGS}")
    return found


def sha256_of(files: Iterable[Path]) -> str:
    """A hash of the files' contents in order; their names and places do not count."""
    whole = hashlib.sha256()
    for file in files:
        stat = file.stat()
        whole.update(_digest(file, stat.st_size, stat.st_mtime_ns, stat.st_ino))
    return whole.hexdigest()


@lru_cache(maxsize=4096)
def _digest(file: Path, *_: int) -> bytes:
    """A file's hash, taken once while its size, time and number stay."""
    one = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(1 << 20):
            one.update(block)
    return one.digest()


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = [p.name for p in parent.iterdir()] if os.access(parent, os.R_OK) else []
    there = (
        f"name one that is there{beside(path)}" if names else f"{parent} is empty: put it there, or name another place"
    )
    return DataError(f"no such file or folder: {path}{nearest(path.name, names)}", there)


def _is_data(path: Path) -> bool:
    """Whether a file found in a folder is data: a known ending, not hidden, not a paper that lies beside data."""
    paper = re.match(r"(readme|license|licence|dataset_infos?|dataset_dict)\b", path.name, re.IGNORECASE)
    return not paper and not any(part.startswith(".") for part in path.parts) and _ending(path) in READERS


def _ending(path: Path) -> str:
    """``.jsonl`` for ``x.JSONL.gz``: the ending without the compression."""
    suffixes = [s.lower() for s in path.suffixes]
    if suffixes and suffixes[-1] in (".gz", ".zst"):
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


class _Unpacked:
    """A decompressed stream that ends where the compressed one breaks off; ``broken`` then says how."""

    def __init__(self, stream: IO[bytes]) -> None:
        self.stream, self.broken = stream, ""

    def read(self, size: int = -1) -> bytes:
        pieces, left = [], size
        try:
            # One small piece after the other: what was read before the break is kept.
            while left and not self.broken and (piece := self.stream.read1(left)):  # type: ignore[attr-defined]
                pieces.append(piece)
                left = left - len(piece) if size > 0 else left
        except _cut_off() as error:
            self.broken = said(error)
        return b"".join(pieces)

    # what an io.TextIOWrapper asks for
    readable, writable, seekable = (lambda self: True), (lambda self: False), (lambda self: False)
    closed = False

    def read1(self, size: int = -1) -> bytes:
        return self.read(size if size > 0 else 8192)

    def flush(self) -> None: ...

    def close(self) -> None:
        self.stream.close()

    def __enter__(self) -> _Unpacked:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _unpacked(raw: IO[bytes], path: Path) -> Any:
    """The bytes of an open file, decompressed."""
    if path.suffix.lower() == ".gz":
        return _Unpacked(cast("IO[bytes]", gzip.open(raw, "rb")))
    if path.suffix.lower() != ".zst":
        return raw
    if (zstd := _zstd()) is None:
        raise DataError(
            f"{path} is compressed with zstandard, which is not installed",
            "pip install backports.zstd, or compress the file with gzip",
        )
    return _Unpacked(cast("IO[bytes]", zstd.open(raw, "rb")))


def _zstd() -> Any:
    """The module that reads zstandard files: Python's own from 3.14 on, before that its backport, else None.

    The older package ``zstandard`` ends a file that is cut off without a word.
    """
    for name in ("compression.zstd", "backports.zstd"):
        try:
            return import_module(name)
        except ImportError:
            continue
    return None


def _cut_off() -> tuple[type[Exception], ...]:
    """What the decompressors raise inside a broken file."""
    zstd = _zstd()
    return (EOFError, gzip.BadGzipFile, zlib.error, *([] if zstd is None else [zstd.ZstdError]))
