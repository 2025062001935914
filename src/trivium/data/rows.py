"""Rows of any usual file, each knowing its file and line; a row that cannot be read is a ``BadRow``, never a crash.

    for row in read_rows(Path("data/")):
        print(row.origin, row.reason if isinstance(row, BadRow) else row.value)

What a "line" is: the line for JSON lines, the element's number for a JSON array, the first line of a CSV record,
the row's number for parquet; all count from 1. A text file is one row, ``{"text": ...}``, at line 1.

Cost: one pass, streaming; only ``.json``, ``.txt`` and compressed ``.parquet`` files are held whole in memory.
"""

from __future__ import annotations

import csv
import glob
import gzip
import hashlib
import io
import json
import os
import re
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from trivium.errors import DataError, listed, nearest


@dataclass(frozen=True, slots=True)
class Row:
    """One row as it stands in its file."""

    value: dict[str, Any]
    file: str
    line: int

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class BadRow:
    """A place in a file that could not be read as a row, and why."""

    file: str
    line: int
    reason: str

    @property
    def origin(self) -> str:
        return f"{self.file}:{self.line}"


def read_rows(path: Path) -> Iterator[Row | BadRow]:
    """All rows of a file, a folder or a glob, in the order of ``files_of``.

    Raises DataError where there is no such file or it cannot be opened; whatever is wrong *inside* a file is a
    ``BadRow`` at its line.
    """
    for file in files_of(path):
        read = READERS[_ending(file)]
        count = 0
        try:
            with _opened(file) as stream:
                for row in read(stream, str(file)):
                    count = row.line
                    yield row
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            yield BadRow(str(file), count + 1, f"the compressed file is cut off or broken here ({error})")
        except OSError as error:
            raise DataError(
                f"cannot read {file}: {error.strerror or error}", "Check the file and its rights."
            ) from None


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
        found = [Path(p) for p in sorted(glob.glob(str(path), recursive=True))]
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
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                one.update(block)
        whole.update(one.digest())
    return whole.hexdigest()


def _missing(path: Path) -> DataError:
    parent = path.parent
    while not parent.is_dir() and parent != parent.parent:
        path, parent = parent, parent.parent
    names = sorted(os.listdir(parent)) if os.access(parent, os.R_OK) else []
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
        return gzip.open(path, "rb")  # type: ignore[return-value]
    if path.suffix.lower() != ".zst":
        return open(path, "rb")
    try:
        from compression import zstd  # type: ignore[import-not-found]  # Python 3.14
    except ImportError:
        try:
            import zstandard as zstd  # type: ignore[import-not-found]
        except ImportError:
            raise DataError(
                f"{path} is compressed with zstandard, which is not installed",
                "Install it: pip install zstandard. Or compress the file with gzip.",
            ) from None
    try:
        return zstd.open(path, "rb")
    except zstd.ZstdError as error:
        raise DataError(f"{path} is not a zstandard file: {error}", "Compress it again.") from None


# --- JSON


def _loads(text: str) -> Any:
    """``json.loads``; whatever is wrong is a ValueError with a short message."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    return _without_surrogates(value, text)


def _without_surrogates(value: Any, text: str) -> Any:
    r"""Half a UTF-16 pair, ``"\ud83d"``, is legal JSON and no character: no tokenizer can take it."""
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise ValueError(f"half a character: the lone surrogate \\u{ord(half):04x}") from None
    return value


def _decode(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        raise ValueError(f"not UTF-8: byte 0x{bad:02x} at column {error.start + 1}") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kinds = {list: "an array", str: "a string", bool: "a boolean", type(None): "null"}
        raise ValueError(f"{kinds.get(type(value), 'a number')}, not an object with fields")
    return value


def _json_lines(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    for number, data in enumerate(stream, start=1):
        if not data.strip():
            continue
        try:
            yield Row(_object(_loads(_decode(data).strip())), file, number)
        except ValueError as error:
            # Only the last line can lack its end, and what fails there was most likely cut off in writing.
            cut = "" if data.endswith(b"\n") else "; the last line, perhaps cut off"
            yield BadRow(file, number, f"{error}{cut}")


def _json_array(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    """A JSON array, read element by element so that a broken one is named by its number.

    JSON lines and a single object under this ending are read for what they are.
    """
    data = stream.read()
    try:
        text = _decode(data)
    except ValueError as error:
        yield BadRow(file, 1, f"{error}, counted from the start of the file")
        return
    at = _skip(text, 0)
    if text[at : at + 1] != "[":
        yield from _one_object(text, data, file)
        return
    decoder, number, at = json.JSONDecoder(), 0, _skip(text, at + 1)
    while text[at : at + 1] not in ("]", ""):
        number += 1
        try:
            start = at
            value, at = decoder.raw_decode(text, at)
            row: Row | BadRow = _row_or_bad(value, text[start:at], file, number)
        except (ValueError, RecursionError) as error:
            where = f"{error.msg} at line {error.lineno}" if isinstance(error, json.JSONDecodeError) else str(error)
            yield BadRow(file, number, f"not JSON: {where}; nothing after it can be read")
            return
        yield row
        at = _skip(text, at)
        if text[at : at + 1] not in (",", "]"):
            yield BadRow(file, number + 1, "the array ends without its ']', perhaps cut off")
            return
        at = _skip(text, at + 1) if text[at] == "," else at
    if text[at:].strip("] \t\r\n") or not text[at:]:
        yield BadRow(file, number + 1, "the array does not end with its ']'")


def _row_or_bad(value: Any, text: str, file: str, number: int) -> Row | BadRow:
    try:
        return Row(_object(_without_surrogates(value, text)), file, number)
    except ValueError as error:
        return BadRow(file, number, str(error))


def _skip(text: str, at: int) -> int:
    """The first place from ``at`` on that is not white."""
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def _one_object(text: str, data: bytes, file: str) -> Iterator[Row | BadRow]:
    try:
        yield Row(_object(_loads(text)), file, 1)
    except ValueError:
        yield from _json_lines(io.BytesIO(data), file)


# --- the others


def _text(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    data = stream.read()
    try:
        yield Row({"text": data.decode("utf-8-sig")}, file, 1)
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        yield BadRow(file, line, f"not UTF-8: byte 0x{data[error.start]:02x}")


def _csv(stream: IO[bytes], file: str, delimiter: str = ",") -> Iterator[Row | BadRow]:
    # The default limit of 131,072 characters a cell is shorter than many documents.
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    # Bytes that are not UTF-8 become lone surrogates here, so that the record they are in can be named below.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    reader = csv.reader(lines, delimiter=delimiter, strict=True)
    header: list[str] | None = None
    while True:
        first = reader.line_num + 1
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield BadRow(file, first, f"broken CSV: {error}")
            continue
        if not cells:
            continue
        if header is None:
            header = cells
        elif len(cells) != len(header):
            yield BadRow(file, first, f"{len(cells)} cells where the header names {len(header)}")
        elif any(re.search("[\ud800-\udfff]", cell) for cell in cells):
            yield BadRow(file, first, "not UTF-8")
        else:
            yield Row(dict(zip(header, cells, strict=True)), file, first)


def _tsv(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    return _csv(stream, file, delimiter="\t")


def _parquet(stream: IO[bytes], file: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        source = stream if file.lower().endswith(".parquet") else io.BytesIO(stream.read())
        for batch in pq.ParquetFile(source).iter_batches(1024):
            for i in range(batch.num_rows):
                number += 1
                try:
                    yield Row(batch.slice(i, 1).to_pylist()[0], file, number)
                except UnicodeDecodeError:
                    yield BadRow(file, number, "not UTF-8")
    except (pa.ArrowException, OSError) as error:
        yield BadRow(file, number + 1, f"not a whole parquet file: {str(error).splitlines()[0]}")


READERS: dict[str, Callable[[IO[bytes], str], Iterator[Row | BadRow]]] = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json_array,
    ".txt": _text,
    ".md": _text,
    ".csv": _csv,
    ".tsv": _tsv,
    ".parquet": _parquet,
}
_ENDINGS = ", ".join(READERS) + ", each also with .gz or .zst"
