"""The one seam through which anything durable is written: whole or absent, and one line where the disk refuses."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest

from trivium import files
from trivium.errors import DiskError, ModelError
from trivium.files import (
    MANIFEST,
    clear_errors,
    folder_bytes,
    make_folder,
    read_json,
    sha256_json,
    whole_folder,
    write_json,
)


def test_json_comes_back(tmp_path):
    value = {"ü": [1, 2.5, None], "path": Path("x")}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == {"ü": [1, 2.5, None], "path": "x"}
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.promise(2)
@pytest.mark.parametrize("at", ["os.fsync", "pathlib.Path.replace"])
def test_a_file_is_old_or_new_and_never_half(at, tmp_path, monkeypatch):
    path = tmp_path / "a.json"
    write_json(path, {"old": 1})

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as broken:
        broken.setattr(at, fail)
        with pytest.raises(DiskError, match="the disk is full"):
            write_json(path, {"new": 2})
    assert read_json(path) == {"old": 1}
    write_json(path, {"new": 2})
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


@pytest.mark.promise(2)
def test_a_folder_appears_whole(tmp_path):
    final = tmp_path / "stage"
    with whole_folder(final) as partial:
        (partial / "sub").mkdir()
        (partial / "sub" / "a").write_text("1", encoding="utf-8")
        assert not final.exists(), "before the end it is not there"
    assert (final / "sub" / "a").read_text(encoding="utf-8") == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


@pytest.mark.promise(2)
@pytest.mark.parametrize("failure", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_block_that_fails_leaves_what_was_there(failure, tmp_path):
    final = tmp_path / "stage"
    with whole_folder(final) as partial:
        (partial / "a").write_text("old", encoding="utf-8")

    def fails() -> None:
        with whole_folder(final) as partial:
            (partial / "a").write_text("new", encoding="utf-8")
            raise failure

    with pytest.raises(failure):
        fails()
    assert (final / "a").read_text(encoding="utf-8") == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


def test_a_new_folder_replaces_all_of_the_old_one(tmp_path):
    final = tmp_path / "stage"
    for name in ("a", "b"):
        with whole_folder(final) as partial:
            (partial / name).touch()
    assert sorted(p.name for p in final.iterdir()) == ["b", MANIFEST]
    assert [p.name for p in tmp_path.iterdir()] == ["stage"]


@pytest.mark.promise(2)
def test_what_a_killed_process_left_is_swept(tmp_path):
    for left in ("stage.partial", "stage.old"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "junk").touch()
    (tmp_path / "stage").mkdir()
    with whole_folder(tmp_path / "stage") as partial:
        (partial / "a").touch()
    assert sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*")) == [
        "stage",
        "stage/a",
        "stage/manifest.json",
    ]


def test_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "stage") as partial:
            (partial / "a").touch(mode=0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "stage" / "a").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("error", "says"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (OSError(errno.EDQUOT, "Disk quota exceeded"), "the disk is full"),
        (RuntimeError("I/O error: No space left on device (os error 28)"), "the disk is full"),
        (PermissionError(errno.EACCES, "Permission denied"), "cannot be written (Permission denied)"),
        (OSError(errno.EIO, "Input/output error"), "the disk failed (Input/output error)"),
        (OSError(errno.EROFS, "Read-only file system"), "cannot be written (Read-only file system)"),
    ],
)
def test_the_disks_errors_are_one_line(error, says, tmp_path):
    with pytest.raises(DiskError) as caught, clear_errors(tmp_path / "not" / "yet"):
        raise error
    assert says in caught.value.what
    assert str(tmp_path / "not" / "yet") in caught.value.what
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("error", [KeyError("ours"), OSError(errno.ENXIO, "No such device or address")])
def test_other_errors_stay_what_they_are(error, tmp_path):
    with pytest.raises(type(error)) as caught, clear_errors(tmp_path):
        raise error
    assert caught.value is error


def test_a_folder_where_a_file_is(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(DiskError, match="cannot be written"):
        make_folder(tmp_path / "file")
    with pytest.raises(DiskError, match="cannot be written"):
        make_folder(tmp_path / "file" / "below")


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (b"{", r"a.json:1: not JSON"),
        (b"{}\n\n!", r"a.json:3: not JSON"),
        (b"\xff", "not UTF-8"),
        (b"[" * 99999, "a.json: not"),
    ],
)
def test_json_that_is_none_is_named(data, says, tmp_path):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(ModelError, match=says):
        read_json(tmp_path / "a.json")
    with pytest.raises(ModelError, match="no such file"):
        read_json(tmp_path / "b.json")


def test_hashes(tmp_path):
    assert sha256_json({"a": 1, "b": [2]}) == sha256_json(json.loads('{"b": [2], "a": 1}'))
    assert sha256_json({"a": 1}) != sha256_json({"a": 2})
    (tmp_path / "x").write_bytes(b"abc")
    # the example of FIPS 180-2, appendix B.1
    assert files.sha256_file(tmp_path / "x") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "y.bin").write_bytes(b"12345")
    assert (folder_bytes(tmp_path), folder_bytes(tmp_path, ".bin")) == (8, 5)


@pytest.mark.parametrize(
    "body",
    [
        {"about": [1], "files": {}}, {"about": {}, "files": []}, {"about": {}, "files": {"a": 1}}, {"about": 3,
        "files": "x"},
        {"about": {}, "files": {"a": ["x", "y"]}}, {"about": {}, "files": {"a": [1, 2, 3]}},
        {"about": {}, "files": {"a": [None, ""]}},
    ],
)  # fmt: skip
def test_a_manifest_of_other_types_is_damage_however_it_is_sealed(body, tmp_path):
    (tmp_path / "a").write_text("x", encoding="utf-8")
    (tmp_path / MANIFEST).write_text(files._sealed(body), encoding="utf-8")
    assert files.damage(tmp_path, {"step": 1}) == f"{tmp_path / MANIFEST} is damaged"


def test_only_the_files_that_matter_are_looked_at(tmp_path):
    with whole_folder(tmp_path / "out") as partial:
        for name in ("a", "b"):
            (partial / name).write_text("x", encoding="utf-8")
    (tmp_path / "out" / "a").write_text("y", encoding="utf-8")
    assert files.damage(tmp_path / "out", only=("b",)) is None
    assert "SHA-256" in str(files.damage(tmp_path / "out", only=("a", "b")))
