"""Rows of any usual file, each knowing its file and line; a row that cannot be read is a ``BadRow``, never a crash.

    for row in read_rows(Path("data/")):
        print(row.origin, row.reason if isinstance(row, BadRow) else row.value)

What a "line" is: the line for JSON lines, the element's number for a JSON array, the first line of a CSV record,
the row's number for parquet; all count from 1. A text file is one row, ``{"text": ...}``, at line 1.

Cost: one pass, streaming; only ``.json``, ``.txt`` and compressed ``.parquet`` files are held whole in memory.
"""

from __future__ import annotations

import glob
import gzip
import hashlib
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

from trivium.data.readers import READERS, BadRow, Row
from trivium.errors import DataError, listed, nearest

_ENDINGS = ", ".join(READERS) + ", each also with .gz or .zst"


@dataclass(frozen=True, eq=False)
class Listed:
    """Rows in memory, as a file called ``name`` would hold them: the first is at line 1."""

    rows: Sequence[Any]
    name: str = "rows"

    def __str__(self) -> str:
        return self.name


Source = Path | Listed


def read_rows(source: Source) -> Iterator[Row | BadRow]:
    """All rows of a file, a folder or a glob, in the order of ``files_of``, or those in memory.

    Raises DataError where there is no such file or it cannot be opened; whatever is wrong *inside* a file is a
    ``BadRow`` at its line.
    """
    if isinstance(source, Listed):
        for number, value in enumerate(source.rows, 1):
            good = isinstance(value, dict) and all(isinstance(key, str) for key in value)
            reason = f"a row is a mapping with named fields, not {type(value).__name__}"
            yield Row(value, source.name, number) if good else BadRow(source.name, number, reason)
        return
    for file in files_of(source):
        read = READERS[_ending(file)]
        count = 0
        try:
            with _opened(file) as stream:
                for row in read(stream, str(file)):
                    count = row.line
                    yield row
        except _cut_off() as error:
            yield BadRow(str(file), count + 1, f"the compressed file is cut off or broken here ({error})")
        except OSError as error:
            raise DataError(
                f"cannot read {file}: {error.strerror or error}", "Check the file and its rights."
            ) from None


def texts_of(sources: Iterable[Source], wanted: Callable[[dict[str, Any]], bool] | None = None) -> Iterator[str]:
    """The ``text`` of every good row that has one; ``wanted`` chooses among the rows."""
    for row in chain.from_iterable(map(read_rows, sources)):
        if isinstance(row, Row) and isinstance(row.value.get("text"), str) and (wanted is None or wanted(row.value)):
            yield row.value["text"]


def files_of(path: Path) -> list[Path]:
    """The data files that ``path`` stands for: itself, all in and under a folder, or all that a glob matches.

    Sorted. In folders, hidden files and the papers that lie beside data (README, LICENSE, dataset_info) are left out.
    Raises DataError naming what is missing and the nearest name there is.
    """
    path = Path(path)
    if path.is_file():
        if _ending(path) not in READERS:
            raise DataError(f"cannot tell what {path} holds from its ending", f"Files that are read: {_ENDINGS}.")
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.rglob("*")) if _is_data(p.relative_to(path)) and p.is_file()]
    elif any(c in str(path) for c in "*?["):
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207 (Path.glob wants a root)
        found = [p for p in found if _ending(p) in READERS and p.is_file()]
    else:
        raise _missing(path)
    if not found:
        raise DataError(f"no data files in {path}", f"Files that are read: {_ENDINGS}.")
    return found


def sha256_of(files: Iterable[Path]) -> str:
    """A hash of the files' contents in order; their names and places do not count."""
    whole = hashlib.sha256()
    for file in files:
        one = hashlib.sha256()
        with file.open("rb") as stream:
            while block := stream.read(1 << 20):
                one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(p.name for p in parent.iterdir()) if os.access(parent, os.R_OK) else []
    there = f"In {parent} there is: {listed(names)}." if names else f"{parent} is empty."
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


def _opened(path: Path) -> IO[bytes]:
    """The file's bytes, decompressed."""
    if path.suffix.lower() == ".gz":
        return cast("IO[bytes]", gzip.open(path, "rb"))
    if path.suffix.lower() != ".zst":
        return path.open("rb")
    if (zstd := _zstd()) is None:
        raise DataError(
            f"{path} is compressed with zstandard, which is not installed",
            "Install it: pip install backports.zstd. Or compress the file with gzip.",
        )
    return cast("IO[bytes]", zstd.open(path, "rb"))


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
