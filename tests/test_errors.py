"""What a user is told: one line each, that any terminal can show, in words."""

from __future__ import annotations

import pytest

from trivium.errors import MOST, DataError, ModelError, beside, printable, said
from trivium.model.load import locate


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("plain, é, 日本語 😀", "plain, é, 日本語 😀"),
        ("\x1b[31mred\x07", "\\x1b[31mred\\x07"),
        ("two\n  lines\r\nthree", "two lines three"),
        ("a\ttab", "a\\ttab"),
        ("\u202eturned round\u2066", "\\u202eturned round\\u2066"),
        ("half \ud83d of one", "half \\ud83d of one"),
        ("\x00\x7f\x9b", "\\x00\\x7f\\x9b"),
    ],
)
def test_what_a_file_says_steers_no_terminal(given, told):
    assert printable(given) == told
    error = DataError(given, given)
    assert (error.what, error.remedy) == (told, told)
    assert str(error) == f"{told}\n  {told}"


def test_a_long_text_loses_its_middle():
    told = printable("begin" + "x" * 100_000 + "end")
    assert len(told) == MOST
    assert told.startswith("begin")
    assert told.endswith("end")


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ValueError("it is too large"), "it is too large"),
        (KeyError("vocab"), "no 'vocab'"),
        (RuntimeError("TypeError: got <class 'list'>\nand <class 'a.b.Token'>"), "got list and Token"),
        (UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid start byte"),
         "'utf-8' codec can't decode byte 0xff in position 0: invalid start byte"),
        (NotImplementedError(), "not implemented error"),
        (OSError("\x1b[31m" + "a" * 500), "\\x1b[31m" + "a" * 155),
    ],
)  # fmt: skip
def test_what_a_library_raised_in_words(error, told):
    assert said(error) == told


def test_what_there_is_instead_of_a_missing_folder(tmp_path):
    for name in ("base", "chat.training"):
        (tmp_path / name).mkdir()
    assert beside(tmp_path / "chat") == f"; in {tmp_path} there is: base, chat.training"
    assert beside(tmp_path / "base") == "", "it is there"
    assert beside(tmp_path / "base" / "x") == "", "nothing is"
    assert beside(tmp_path / "nowhere" / "x") == ""
    with pytest.raises(ModelError, match=r"chat: no such model folder\n") as found:
        locate(str(tmp_path / "chat"))
    assert found.value.remedy.endswith("there is: base, chat.training")
