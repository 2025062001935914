"""A reader per kind of file. It cuts a stream of bytes into blocks; a block becomes rows, here or in another process.

    for block in READERS[".jsonl"](stream):
        for row in block.rows("chats.jsonl"):      # Row | BadRow

To cut is cheap and in order; to make rows of a block is the work, and needs nothing but the block. Whatever is wrong
inside a file is a ``BadRow`` at its line. To add one: write ``def _x(stream) -> Iterator[Block]`` and name its ending
in ``READERS``.

Cost: one pass; a block, or one row, is what is held in memory.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import IO, Any

BLOCK = 2**21  # bytes of a block, about
LONGEST_LINE = 2**25  # bytes of a line or an array's element that is still read; a longer one is no row
PASSAGE = 2**15  # bytes of a text file that are one row, at most
KEPT = 2000  # characters of a row that cannot be read, for whoever is to mend it
_ROWS = 500  # rows of a block, where they are cut one by one


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
    ``read``: tuples (line, value, reason, goes_on) of which value or reason is None."""

    form: str
    line: int = 1
    data: bytes = b""
    read: list[tuple[int, Any, str | None, bool]] = field(default_factory=list)

    def rows(self, file: str) -> Iterator[Row | BadRow]:
        if self.form != "rows":
            yield from _FORMS[self.form](self.data, self.line, file)
            return
        for line, value, reason, goes_on in self.read:
            yield Row(value, file, line, goes_on) if reason is None else BadRow(file, line, reason, str(value or ""))


# --- JSON


def _loads(text: str) -> Any:
    """``json.loads``; whatever is wrong is a ValueError with a short message."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error.msg} at column {error.colno}") from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except ValueError:  # Python reads no number of more than some thousand digits
        raise ValueError("a number with too many digits") from None
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
    if data[:2] == b"\x1f\x8b":
        raise ValueError("gzip data in a file that is not called .gz")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        bad = data[error.start]
        utf16 = "; perhaps UTF-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"not UTF-8: byte 0x{bad:02x} at column {error.start + 1}{utf16}") from None


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        kinds = {
            list: "an array",
            str: "a string",
            bool: "a boolean",
            type(None): "null",
        }
        hint = "; a file that is one array is called .json" if isinstance(value, list) else ""
        raise ValueError(f"{kinds.get(type(value), 'a number')}, not an object with fields{hint}")
    return value


def _shown(data: bytes) -> str:
    return data[: 4 * KEPT].decode("utf-8", "backslashreplace")[:KEPT]


def _json_lines(data: bytes, first: int, file: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(io.BytesIO(data), start=first):
        if not line.strip():
            continue
        try:
            yield Row(_object(_loads(_decode(line).strip())), file, number)
        except ValueError as error:
            # Only the last line can lack its end, and what fails there was most likely cut off in writing.
            cut = "" if line.endswith(b"\n") else "; the last line, perhaps cut off"
            yield BadRow(file, number, f"{error}{cut}", _shown(line))


def _cut_lines(stream: Any) -> Iterator[Block]:
    line, held = 1, b""
    while True:
        data = stream.read(BLOCK)
        held += data
        end = held.rfind(b"\n") + 1
        if data and not end and len(held) > LONGEST_LINE:
            size, rest = _skip_line(stream, len(held))
            what = f"a line of {size:,} bytes; the longest that is read has {LONGEST_LINE:,}"
            yield Block("rows", read=[(line, _shown(held), what, False)])
            line, held = line + 1, rest
            continue
        if not data:
            # of a compressed file that breaks off, the last line is half a line
            end = held.rfind(b"\n") + 1 if getattr(stream, "broken", None) else len(held)
        elif len(held) < BLOCK or not end:
            continue
        if end:
            # A long line among short ones was read with the block before it: it is found here.
            yield from _long_lines_apart(held[:end], line)
            line += held.count(b"\n", 0, end)
            held = held[end:]
        if not data:
            if getattr(stream, "broken", None):
                yield Block("lines", line)
            return


def _skip_line(stream: IO[bytes], size: int) -> tuple[int, bytes]:
    """Read on to the line's end: (its bytes in all, what of the next line was read along)."""
    while data := stream.read(BLOCK):
        if (at := data.find(b"\n")) >= 0:
            return size + at, data[at + 1 :]
        size += len(data)
    return size, b""


def _long_lines_apart(data: bytes, line: int) -> Iterator[Block]:
    if len(data) <= LONGEST_LINE:
        yield Block("lines", line, data)
        return
    for text in io.BytesIO(data):
        if len(text) > LONGEST_LINE:
            what = f"a line of {len(text):,} bytes; the longest that is read has {LONGEST_LINE:,}"
            yield Block("rows", read=[(line, _shown(text), what, False)])
        else:
            yield Block("lines", line, text)
        line += 1


def _cut_json(stream: IO[bytes]) -> Iterator[Block]:
    """A JSON array, read element by element so that a broken one is named. JSON lines and a single object under this
    ending are read for what they are."""
    start = stream.read(BLOCK)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from _blocks(_elements(_Window(_Chained(start, stream))))
        return
    whole = start + stream.read(LONGEST_LINE)
    try:
        value = _object(_loads(_decode(whole)))
    except ValueError:
        yield from _cut_lines(_Chained(whole, stream))
        return
    yield Block("rows", read=[(1, value, None, False)])


class _Chained(io.RawIOBase):
    """What was read of a stream already, and then the rest of it."""

    def __init__(self, start: bytes, stream: IO[bytes]) -> None:
        self.start, self.stream = start, stream

    def read(self, size: int = -1) -> bytes:
        if not self.start:
            return self.stream.read(size)
        found, self.start = self.start[:size], self.start[size:]
        return found


class _Window:
    """A stretch of a stream as text, that grows at its end and is let go at its beginning."""

    def __init__(self, stream: Any) -> None:
        self.stream, self.text, self.at, self.ended = stream, "", 0, False
        self.line, self.counted = 1, 0  # the line of place ``counted`` in the text
        self.decoder = codecs.getincrementaldecoder("utf-8-sig")()

    def more(self) -> bool:
        data = self.stream.read(BLOCK)
        self.ended = not data
        self.place()
        self.text, self.at = self.text[self.at :] + self.decoder.decode(data, final=self.ended), 0
        self.counted = 0
        return not self.ended

    def white(self) -> str:
        """Pass white space; the character after it, ``""`` at the end."""
        while True:
            match = re.compile(r"[ \t\r\n]*").match(self.text, self.at)
            self.at = match.end() if match else self.at
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def place(self) -> int:
        """The line of the next character."""
        self.line += self.text.count("\n", self.counted, self.at)
        self.counted = self.at
        return self.line

    def value(self) -> tuple[Any, str]:
        """The next JSON value and its text. Raises ValueError."""
        decoder = json.JSONDecoder()
        while True:
            try:
                value, end = decoder.raw_decode(self.text, self.at)
                # a number or word at the very end of the window may go on behind it
                if end < len(self.text) or not self.more():
                    text, self.at = self.text[self.at : end], end
                    return value, text
            except json.JSONDecodeError as error:
                if len(self.text) - self.at > LONGEST_LINE:
                    size = len(self.text) - self.at
                    what = f"an element of more than {size:,} characters; the longest read has {LONGEST_LINE:,}"
                    raise ValueError(what) from None
                began = self.at
                if self.ended or not self.more():
                    line = self.place() + error.doc.count("\n", began, error.pos)
                    raise ValueError(f"not JSON: {error.msg} at line {line}") from None
            except RecursionError:
                raise ValueError("nested too deeply") from None


def _elements(window: _Window) -> Iterator[tuple[int, Any, str | None, bool]]:
    """An array's elements, each at the line it begins on; at its number where that line had one before."""
    number, before = 0, 0
    try:
        window.white()
        window.at += 1
        while (sign := window.white()) not in ("]", ""):
            number += 1
            line = window.place()
            place, before = line if line > before else number, line
            begins = window.text[window.at : window.at + KEPT]
            try:
                value, text = window.value()
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                yield place, begins, f"{error}; nothing after it can be read", False
                return
            try:
                yield place, _object(_without_surrogates(value, text)), None, False
            except ValueError as error:
                yield place, text[:KEPT], str(error), False
            sign = window.white()
            if sign not in (",", "]"):
                yield (
                    place + 1,
                    window.text[window.at :][:KEPT],
                    "the array ends without its ']', perhaps cut off",
                    False,
                )
                return
            window.at += sign == ","
        window.at += 1
        if sign == "" or window.white():
            line = window.place()
            yield line if line > before else number + 1, "", "the array does not end with its ']'", False
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        yield max(number, window.place()) + 1, "", f"not UTF-8: byte 0x{byte:02x}; nothing after it can be read", False


def _blocks(rows: Iterable[tuple[int, Any, str | None, bool]]) -> Iterator[Block]:
    rows = iter(rows)
    while some := list(islice(rows, _ROWS)):
        yield Block("rows", read=some)


# --- the others


def _cut_text(stream: IO[bytes]) -> Iterator[Block]:
    return _blocks(_passages(stream))


def _passages(stream: IO[bytes]) -> Iterator[tuple[int, Any, str | None, bool]]:
    """A text in pieces that end with a paragraph, a line, or a word, in this order of preference."""
    line, held, ended = 1, b"", False
    while True:
        while len(held) <= PASSAGE and not ended:
            data = stream.read(BLOCK)
            held, ended = held + data, not data
        if not held and line > 1:
            return
        end = len(held) if ended and len(held) <= PASSAGE else _passage_end(held)
        passage, held = held[:end], held[end:]
        goes_on = bool(held) or not ended
        try:
            text = passage.decode("utf-8-sig" if line == 1 else "utf-8")
            yield line, {"text": text}, None, goes_on
        except UnicodeDecodeError as error:
            at = line + passage.count(b"\n", 0, error.start)
            yield at, _shown(passage), f"not UTF-8: byte 0x{passage[error.start]:02x}", False
        line += passage.count(b"\n")
        if not goes_on:
            return


def _passage_end(data: bytes) -> int:
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, PASSAGE // 2, PASSAGE)) >= 0:
            return at + len(mark)
    end = PASSAGE
    while end > 0 and data[end] & 0xC0 == 0x80:  # in the middle of a character
        end -= 1
    return end or PASSAGE


def _cut_csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[Block]:
    return _blocks(_records(stream, delimiter))


def _records(stream: IO[bytes], delimiter: str) -> Iterator[tuple[int, Any, str | None, bool]]:
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
            yield first, None, f"broken CSV: {error}", False
            continue
        if not cells:
            continue
        if header is None:
            header = [cell.strip() for cell in cells]
            if doubled := sorted({name for name in header if header.count(name) > 1}):
                yield first, delimiter.join(cells), f"the header names {doubled[0]!r} twice", False
                return
        elif len(cells) != len(header):
            told = f"{len(cells)} cells where the header names {len(header)}"
            yield first, delimiter.join(cells).encode("utf-8", "backslashreplace").decode()[:KEPT], told, False
        elif any(re.search("[\ud800-\udfff]", cell) for cell in cells):
            told = delimiter.join(cells).encode("utf-8", "backslashreplace").decode()[:KEPT]
            yield first, told, "not UTF-8", False
        else:
            yield first, dict(zip(header, cells, strict=True)), None, False


def _cut_tsv(stream: IO[bytes]) -> Iterator[Block]:
    return _cut_csv(stream, delimiter="\t")


def _cut_parquet(stream: IO[bytes]) -> Iterator[Block]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 1
    try:
        # A compressed stream cannot be sought in, which parquet needs.
        source = stream if isinstance(stream, io.BufferedReader) else io.BytesIO(stream.read())
        for batch in pq.ParquetFile(source).iter_batches(_ROWS):
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Block("arrow", number, sink.getvalue())
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        told = f"not a whole parquet file: {str(error).splitlines()[0]}"
        yield Block("rows", read=[(number, None, told, False)])


def _arrow_rows(data: bytes, first: int, file: str) -> Iterator[Row | BadRow]:
    import pyarrow as pa

    with pa.ipc.open_stream(data) as reader:
        table = reader.read_all()
    try:
        rows = table.to_pylist()
    except UnicodeDecodeError:
        rows = [None] * table.num_rows
    for i, value in enumerate(rows):
        if value is None:
            try:
                value = table.slice(i, 1).to_pylist()[0]
            except UnicodeDecodeError:
                yield BadRow(file, first + i, "not UTF-8")
                continue
        yield Row({k: _without_nulls(v) for k, v in value.items()}, file, first + i)


def _without_nulls(value: Any) -> Any:
    """Columns of objects have every key in every row, null where the row that was written had none."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


_FORMS: dict[str, Callable[[bytes, int, str], Iterator[Row | BadRow]]] = {"lines": _json_lines, "arrow": _arrow_rows}

READERS: dict[str, Callable[[IO[bytes]], Iterator[Block]]] = {
    ".jsonl": _cut_lines,
    ".ndjson": _cut_lines,
    ".json": _cut_json,
    ".txt": _cut_text,
    ".md": _cut_text,
    ".csv": _cut_csv,
    ".tsv": _cut_tsv,
    ".parquet": _cut_parquet,
}
