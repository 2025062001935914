"""A reader per kind of file. It cuts a stream of bytes into blocks; a block becomes rows, here or in another process.

    for block in READERS[".jsonl"](stream):
        for row in rows_of(block, "chats.jsonl"):      # Row | BadRow

To cut is cheap and in order; to make rows of a block is the work, and needs nothing but the block. Whatever is wrong
inside a file is a ``BadRow`` at its line. To add one: write ``def _x(stream) -> Iterator[Block]`` and name its ending
in ``READERS``.

Cost: one pass; a block, or one row, is what is held in memory.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Callable, Iterator
from typing import IO, Any

from trivium.data import blocks
from trivium.data.blocks import BadRow, Block, Read, Row, in_blocks, shown
from trivium.data.json_reader import cut_json, cut_lines, json_lines
from trivium.errors import said


def _cut_text(stream: IO[bytes]) -> Iterator[Block]:
    return in_blocks(_passages(stream))


def _passages(stream: IO[bytes]) -> Iterator[Read]:
    """A text in pieces that end with a paragraph, a line, or a word, in this order of preference."""
    line, held, ended = 1, b"", False
    while True:
        while len(held) <= blocks.PASSAGE and not ended:
            data = stream.read(blocks.BLOCK)
            held, ended = held + data, not data
        if not held and line > 1:
            return
        end = len(held) if ended and len(held) <= blocks.PASSAGE else _passage_end(held)
        passage, held = held[:end], held[end:]
        goes_on = bool(held) or not ended
        try:
            text = passage.decode("utf-8-sig" if line == 1 else "utf-8")
            yield line, {"text": text}, None, goes_on
        except UnicodeDecodeError as error:
            at = line + passage.count(b"\n", 0, error.start)
            yield at, shown(passage), f"not UTF-8: byte 0x{passage[error.start]:02x}", False
        line += passage.count(b"\n")
        if not goes_on:
            return


def _passage_end(data: bytes) -> int:
    for mark in (b"\n\n", b"\n", b" "):
        if (at := data.rfind(mark, blocks.PASSAGE // 2, blocks.PASSAGE)) >= 0:
            return at + len(mark)
    end = blocks.PASSAGE
    while end > 0 and data[end] & 0xC0 == 0x80:  # in the middle of a character
        end -= 1
    return end or blocks.PASSAGE


def _cut_csv(stream: IO[bytes], delimiter: str = ",") -> Iterator[Block]:
    return in_blocks(_records(stream, delimiter))


def _records(stream: IO[bytes], delimiter: str) -> Iterator[Read]:
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
            if any(re.search("[\ud800-\udfff]", name) for name in header):
                yield (
                    first,
                    delimiter.join(cells).encode("utf-8", "backslashreplace").decode()[: blocks.KEPT],
                    "not UTF-8",
                    False,
                )
                return
        elif len(cells) != len(header):
            told = f"{len(cells)} cells where the header names {len(header)}"
            yield first, delimiter.join(cells).encode("utf-8", "backslashreplace").decode()[: blocks.KEPT], told, False
        elif any(re.search("[\ud800-\udfff]", cell) for cell in cells):
            told = delimiter.join(cells).encode("utf-8", "backslashreplace").decode()[: blocks.KEPT]
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
        for batch in pq.ParquetFile(source).iter_batches(blocks.ROWS):
            sink = io.BytesIO()
            with pa.ipc.new_stream(sink, batch.schema) as writer:
                writer.write_batch(batch)
            yield Block("arrow", number, sink.getvalue())
            number += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        told = f"not a whole parquet file: {said(error)}"
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


_FORMS: dict[str, Callable[[bytes, int, str], Iterator[Row | BadRow]]] = {"lines": json_lines, "arrow": _arrow_rows}


def rows_of(block: Block, file: str) -> Iterator[Row | BadRow]:
    """The rows of a block of the file that is called so."""
    if block.form != "rows":
        yield from _FORMS[block.form](block.data, block.line, file)
        return
    for line, value, reason, goes_on in block.read:
        yield Row(value, file, line, goes_on) if reason is None else BadRow(file, line, reason, str(value or ""))


READERS: dict[str, Callable[[IO[bytes]], Iterator[Block]]] = {
    ".jsonl": cut_lines,
    ".ndjson": cut_lines,
    ".json": cut_json,
    ".txt": _cut_text,
    ".md": _cut_text,
    ".csv": _cut_csv,
    ".tsv": _cut_tsv,
    ".parquet": _cut_parquet,
}
