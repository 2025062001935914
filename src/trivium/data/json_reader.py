"""JSON lines, and JSON arrays of any size: read row by row, so that a broken one is named and the others are kept."""

from __future__ import annotations

import codecs
import io
import json
import re
from collections.abc import Iterator
from typing import IO, Any

from trivium.data import blocks
from trivium.data.blocks import BadRow, Block, Read, Row, in_blocks, shown


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


def json_lines(data: bytes, first: int, file: str) -> Iterator[Row | BadRow]:
    for number, line in enumerate(io.BytesIO(data), start=first):
        if not line.strip():
            continue
        try:
            yield Row(_object(_loads(_decode(line).strip())), file, number)
        except ValueError as error:
            # Only the last line can lack its end, and what fails there was most likely cut off in writing.
            cut = "" if line.endswith(b"\n") else "; the last line, perhaps cut off"
            yield BadRow(file, number, f"{error}{cut}", shown(line))


def cut_lines(stream: Any) -> Iterator[Block]:
    line, held = 1, b""
    while True:
        data = stream.read(blocks.BLOCK)
        held += data
        end = held.rfind(b"\n") + 1
        if data and not end and len(held) > blocks.LONGEST_LINE:
            size, rest = _skip_line(stream, len(held))
            what = f"a line of {size:,} bytes; the longest that is read has {blocks.LONGEST_LINE:,}"
            yield Block("rows", read=[(line, shown(held), what, False)])
            line, held = line + 1, rest
            continue
        if not data:
            # of a compressed file that breaks off, the last line is half a line
            end = held.rfind(b"\n") + 1 if getattr(stream, "broken", None) else len(held)
        elif len(held) < blocks.BLOCK or not end:
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
    while data := stream.read(blocks.BLOCK):
        if (at := data.find(b"\n")) >= 0:
            return size + at, data[at + 1 :]
        size += len(data)
    return size, b""


def _long_lines_apart(data: bytes, line: int) -> Iterator[Block]:
    if len(data) <= blocks.LONGEST_LINE:
        yield Block("lines", line, data)
        return
    for text in io.BytesIO(data):
        if len(text) > blocks.LONGEST_LINE:
            what = f"a line of {len(text):,} bytes; the longest that is read has {blocks.LONGEST_LINE:,}"
            yield Block("rows", read=[(line, shown(text), what, False)])
        else:
            yield Block("lines", line, text)
        line += 1


def cut_json(stream: IO[bytes]) -> Iterator[Block]:
    """A JSON array, read element by element so that a broken one is named. JSON lines and a single object under this
    ending are read for what they are."""
    start = stream.read(blocks.BLOCK)
    if start.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[":
        yield from in_blocks(_elements(_Window(_Chained(start, stream))))
        return
    whole = start + stream.read(blocks.LONGEST_LINE)
    try:
        value = _object(_loads(_decode(whole)))
    except ValueError:
        yield from cut_lines(_Chained(whole, stream))
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
        data = self.stream.read(blocks.BLOCK)
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
                if len(self.text) - self.at > blocks.LONGEST_LINE:
                    size = len(self.text) - self.at
                    what = f"an element of more than {size:,} characters; the longest read has {blocks.LONGEST_LINE:,}"
                    raise ValueError(what) from None
                began = self.at
                if self.ended or not self.more():
                    line = self.place() + error.doc.count("\n", began, error.pos)
                    raise ValueError(f"not JSON: {error.msg} at line {line}") from None
            except RecursionError:
                raise ValueError("nested too deeply") from None


def _elements(window: _Window) -> Iterator[Read]:
    """An array's elements, each at the line it begins on; at its number where that line had one before."""
    number, before = 0, 0
    try:
        window.white()
        window.at += 1
        while (sign := window.white()) not in ("]", ""):
            number += 1
            line = window.place()
            place, before = line if line > before else number, line
            begins = window.text[window.at : window.at + blocks.KEPT]
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
                yield place, text[: blocks.KEPT], str(error), False
            sign = window.white()
            if sign not in (",", "]"):
                yield (
                    place + 1,
                    window.text[window.at :][: blocks.KEPT],
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
