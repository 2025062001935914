"""Readers: every row knows its file and line; whatever is broken is named at its line and never raises."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from trivium.data.rows import BadRow, Listed, Row, files_of, read_rows, sha256_of, texts_of
from trivium.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
real_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")


def outcome(path: Path) -> dict[int, str]:
    """Line -> "ok" or the reason."""
    return {r.line: r.reason if isinstance(r, BadRow) else "ok" for r in read_rows(path)}


def test_hostile_json_lines_are_each_named_at_their_line(tmp_path: Path) -> None:
    lines = [
        b'\xef\xbb\xbf{"text": "after a byte order mark"}',
        b'{"text": "no end',
        b'["a", "list"]',
        b"",
        b'{"text": "\xff"}',
        b'{"text": "\\ud83d"}',
        b'{"text": "\\ud83d\\ude00"}',
        b"null",
        b"[" * 100_000,
        b'{"n": ' + b"9" * 5000 + b"}",
        b'{"text": "fine"}\r',
        b"\x00",
        b'{"text": "cut o',
    ]
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\n".join(lines))
    found = outcome(file)
    assert [n for n, r in found.items() if r == "ok"] == [1, 7, 11]
    assert set(found) == set(range(1, 14)) - {4}
    assert "column" in found[2]
    assert "an array, not an object" in found[3]
    assert "not UTF-8: byte 0xff at column 11" in found[5]
    assert "lone surrogate \\ud83d" in found[6]
    assert "null, not an object" in found[8]
    assert "cut off" in found[13]
    assert "cut off" not in found[2]
    assert next(iter(read_rows(file))).origin == f"{file}:1"


def test_json_array_numbers_its_elements(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[\n{"text": "one"},\n 2,\n{"text": "\\udc00"},\n{"text": "four"}\n]\n')
    found = outcome(file)
    assert (found[2], found[5]) == ("ok", "ok")
    assert "a number" in found[3]
    assert "surrogate" in found[4]


def test_json_array_on_one_line_numbers_its_elements(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('[{"text": "one"}, 2, {"text": "three"}]')
    assert outcome(file) == {1: "ok", 2: "a number, not an object with fields", 3: "ok"}


def test_an_array_larger_than_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.blocks.BLOCK", 7)  # every value, word and character is cut somewhere
    values = [{"text": "ö" * n, "n": [True, None, 12345]} for n in range(30)]
    file = tmp_path / "a.json"
    file.write_text(json.dumps(values, ensure_ascii=False, indent=1), encoding="utf-8")
    rows = list(read_rows(file))
    assert [r.value for r in rows if isinstance(r, Row)] == values
    lines = file.read_text(encoding="utf-8").splitlines()
    assert all(lines[r.line - 1].strip() == "{" for r in rows)


@pytest.mark.parametrize("size", [1, 3, 10, 1000])
def test_blocks_of_any_size_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"".join(b'{"n": %d}\n' % n for n in range(50)) + b'\n{"cut')
    whole = list(read_rows(file))
    monkeypatch.setattr("trivium.data.blocks.BLOCK", size)
    assert list(read_rows(file)) == whole
    assert whole[-1].line == 52


def test_a_line_too_long_to_be_a_row_is_named_and_the_rest_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trivium.data.blocks.LONGEST_LINE", 5000)
    monkeypatch.setattr("trivium.data.blocks.BLOCK", 1000)
    lines = [b'{"n": 1}', b'{"text": "' + b"x" * 20_000 + b'"}', b'{"n": 3}', b'{"n": "' + b"y" * 4900 + b'"}', b"{}"]
    for name, packed in (("a.jsonl", False), ("a.jsonl.gz", True)):
        data = b"\n".join(lines)
        (tmp_path / name).write_bytes(gzip.compress(data) if packed else data)
        found = outcome(tmp_path / name)
        assert found == {1: "ok", 2: found[2], 3: "ok", 4: "ok", 5: "ok"}
        assert "a line of 20,012 bytes; the longest that is read has 5,000" in found[2]


def test_long_texts_come_in_passages_that_join_to_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    text = "".join(f"Paragraph {n}: wörds and wörds.\n" + "\n" * (n % 3 == 0) for n in range(5000)) + "é" * 70_000
    file.write_text(text, encoding="utf-8")
    rows = [r for r in read_rows(file) if isinstance(r, Row)]
    assert "".join(r.value["text"] for r in rows) == text
    assert [r.goes_on for r in rows] == [True] * (len(rows) - 1) + [False]
    assert all(len(r.value["text"].encode()) <= 2**15 for r in rows)
    assert [text.splitlines()[r.line - 1][:9] for r in rows[:5]] == [r.value["text"][:9] for r in rows[:5]]


def test_rows_in_memory_are_what_a_file_would_hold() -> None:
    import datetime

    rows = list(read_rows(Listed([{"d": datetime.date(2026, 1, 2)}, {"t": "\ud800"}, {1: "a"}])))
    assert isinstance(rows[0], Row)
    assert rows[0].value == {"d": "2026-01-02"}
    assert [isinstance(r, BadRow) for r in rows] == [False, True, True]


@pytest.mark.parametrize(
    ("text", "lines", "word"),
    [
        ('[{"a": 1}, {"a": 2', {1, 2}, "not JSON"),
        ('[{"a": 1}', {1, 2}, "cut off"),
        ('[{"a": 1},', {1, 2}, "']'"),
        ('[{"a": 1}] and more', {1, 2}, "']'"),
        ("[", {1}, "']'"),
        ("", set(), ""),
        ("[]", set(), ""),
        ("nonsense", {1}, "not JSON"),
    ],
)
def test_broken_json_arrays(tmp_path: Path, text: str, lines: set[int], word: str) -> None:
    file = tmp_path / "a.json"
    file.write_text(text)
    found = outcome(file)
    assert set(found) == lines
    assert not lines or word in found[max(lines)]


def test_json_ending_on_lines_or_one_object(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"a": 1}\n{"a": 2}\n')
    assert [r.value["a"] for r in read_rows(file) if isinstance(r, Row)] == [1, 2]
    file.write_text('{\n"a": 1\n}')
    assert [r.value for r in read_rows(file) if isinstance(r, Row)] == [{"a": 1}]


def test_csv_counts_lines_not_records(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    long = "x" * 200_000
    head = f'text,n\n"two\nlines",1\n\nplain,2\nonly one\n{long},3\n'.encode()
    file.write_bytes(head + b'b\xffd,4\nfine,5\n"never closed,6\n')
    found = outcome(file)
    assert [n for n, r in found.items() if r == "ok"] == [2, 5, 7, 9]
    assert "1 cells where the header names 2" in found[6]
    assert "not UTF-8" in found[8]
    assert "broken CSV" in found[10]
    assert next(iter(read_rows(file))).value == {"text": "two\nlines", "n": "1"}


def test_text_files_are_one_row(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("one\r\ntwö\n".encode())
    (tmp_path / "b.md").write_bytes(b"one\ntwo\n\xe4\n")
    rows = list(read_rows(tmp_path))
    assert rows[0] == Row({"text": "one\r\ntwö\n"}, str(tmp_path / "a.txt"), 1)
    assert rows[1] == BadRow(str(tmp_path / "b.md"), 3, "not UTF-8: byte 0xe4", "one\ntwo\n\\xe4\n")


def test_parquet(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = [{"messages": [{"role": "user", "content": str(i)}]} for i in range(3)]
    pq.write_table(pa.Table.from_pylist(values), tmp_path / "a.parquet")
    rows = list(read_rows(tmp_path / "a.parquet"))
    assert [r.value for r in rows if isinstance(r, Row)] == values
    assert [r.line for r in rows] == [1, 2, 3]
    packed = tmp_path / "b.parquet.gz"
    packed.write_bytes(gzip.compress((tmp_path / "a.parquet").read_bytes()))
    assert [r.line for r in read_rows(packed)] == [1, 2, 3]
    (tmp_path / "c.parquet").write_bytes((tmp_path / "a.parquet").read_bytes()[:50])
    assert "parquet" in outcome(tmp_path / "c.parquet")[1]


def test_gzip_cut_off_or_no_gzip(tmp_path: Path) -> None:
    import random

    draw = random.Random(0)
    lines = [json.dumps({"text": str(draw.random())}) + "\n" for _ in range(3000)]
    file = tmp_path / "a.jsonl.gz"
    file.write_bytes(gzip.compress("".join(lines).encode())[:-2000])
    *good, last = read_rows(file)
    assert all(isinstance(r, Row) for r in good)
    assert isinstance(last, BadRow)
    assert last.line == len(good) + 1
    assert "cut off" in last.reason
    file.write_text("no gzip at all")
    assert "broken" in outcome(file)[1]


def test_zst(tmp_path: Path) -> None:
    from trivium.data.rows import _zstd

    if (zstd := _zstd()) is None:
        pytest.skip("neither compression.zstd nor backports.zstd is installed")
    file = tmp_path / "a.jsonl.zst"
    file.write_bytes(zstd.compress(b'{"a": 1}\n') + zstd.compress(b'{"a": 2}\n'))
    assert outcome(file) == {1: "ok", 2: "ok"}
    file.write_bytes(file.read_bytes()[:-3])
    assert "cut off" in list(outcome(file).values())[-1]
    file.write_bytes(b"not zstandard")
    assert "broken" in outcome(file)[1]


def test_zst_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.rows._zstd", lambda: None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"x")
    with pytest.raises(DataError, match=r"pip install backports\.zstd"):
        list(read_rows(tmp_path / "a.jsonl.zst"))


def test_files_of_folder_glob_and_what_lies_beside(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.json.gz", "README.md", "LICENSE.txt", ".hidden.txt", "x.bin", "sub/c.CSV"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    assert [p.name for p in files_of(tmp_path)] == ["a.json.gz", "b.jsonl", "c.CSV"]
    assert [p.name for p in files_of(tmp_path / "*.js*")] == ["a.json.gz", "b.jsonl"]
    assert [p.name for p in files_of(tmp_path / "README.md")] == ["README.md"]


def test_paths_that_lead_nowhere(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"trian\.jsonl; did you mean 'train\.jsonl'\?"):
        files_of(tmp_path / "trian.jsonl")
    with pytest.raises(DataError, match=r"no such file or folder: .*nowhere\n"):
        files_of(tmp_path / "nowhere" / "deep" / "a.jsonl")
    with pytest.raises(DataError, match="no data files"):
        files_of(tmp_path / "empty")
    with pytest.raises(DataError, match="no data files"):
        files_of(tmp_path / "*.parquet")
    (tmp_path / "x.docx").write_text("")
    with pytest.raises(DataError, match=r"\.jsonl, \.ndjson"):
        files_of(tmp_path / "x.docx")


def test_hash_is_of_contents_in_order(tmp_path: Path) -> None:
    a, b, c = (tmp_path / n for n in ("a.txt", "b.txt", "c.txt"))
    a.write_text("1"), b.write_text("2"), c.write_text("1")
    assert sha256_of([a, b]) == sha256_of([c, b]) != sha256_of([b, a])
    assert sha256_of([a]) != sha256_of([b])


@real_data
@pytest.mark.parametrize("folder", ["tinystories", "pretrain", "sft", "pref", "eval"])
def test_real_data_has_no_bad_row(folder: str) -> None:
    count = 0
    for row in read_rows(DATA / folder):
        assert isinstance(row, Row), f"{row.origin}: {row.reason}"
        count += 1
    assert count > 10


def test_texts_of_good_rows(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{broken\n{"text": 3}\n{"no": "text"}\n', encoding="utf-8")
    sources = [tmp_path / "a.jsonl", Listed([{"text": "two"}, "junk", {"text": "three", "bad": True}])]
    assert list(texts_of(sources)) == ["one", "two", "three"]
    assert list(texts_of(sources, lambda row: "bad" not in row)) == ["one", "two"]


def test_a_csv_header_that_is_not_utf_8(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b"prompt,te\xffxt\na,b\n")
    (row,) = read_rows(file)
    assert isinstance(row, BadRow)
    assert (row.line, row.reason) == (1, "not UTF-8")
    row.raw.encode("utf-8")


def test_a_broken_parquet_file_is_told_in_words(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["a", "b"] * 9}), file)
    whole = file.read_bytes()
    for at in range(len(whole) - 300, len(whole) - 8, 7):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 0x1F]) + whole[at + 1 :])
        for row in read_rows(file):
            assert isinstance(row, Row) or ("Exception" not in row.reason and row.reason.isprintable())
