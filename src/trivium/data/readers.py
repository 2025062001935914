"""A reader per kind of file: a stream of bytes becomes rows, and whatever is wrong in it a ``BadRow`` at its line.

To add one: write ``def _x(stream, file) -> Iterator[Row | BadRow]`` and name its ending in ``READERS``.
"""

from __future__ import annotations

import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any


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
