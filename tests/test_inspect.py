"""A safetensors header is believed only as far as the file's own length bears it out."""

from __future__ import annotations

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

from trivium.errors import ModelError
from trivium.inspect import header

GOOD = {"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}


def written(path, head: object, data: bytes = bytes(24), length: int | None = None):
    text = head if isinstance(head, bytes) else json.dumps(head).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + data)
    return path


def test_what_safetensors_wrote(tmp_path):
    tensors = {"a": torch.zeros(2, 3), "b": torch.zeros(5, dtype=torch.bfloat16), "c": torch.zeros(0)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = header(tmp_path / "x.safetensors")
    assert {n: (t["dtype"], t["shape"]) for n, t in found.items()} == {
        "a": ("F32", [2, 3]), "b": ("BF16", [5]), "c": ("F32", [0]),
    }  # fmt: skip
    assert header(written(tmp_path / "y.safetensors", GOOD)) == GOOD


@pytest.mark.parametrize("length", [2**64 - 1, 2**63, 2**40, 10**9, 5000])
def test_a_length_that_the_file_does_not_have_takes_no_memory(length, tmp_path):
    path = written(tmp_path / "x.safetensors", GOOD, length=length)
    with pytest.raises(ModelError, match=r"x\.safetensors: not a safetensors file"):
        header(path)


@pytest.mark.parametrize(
    ("head", "data"),
    [
        (GOOD, bytes(23)),
        (GOOD, bytes(25)),
        (GOOD, b""),
        (b"{", b""),
        (b"[]", b""),
        (b"\xff\xff", b""),
        (b"[" * 50_000, b""),
        ({"a": 3}, b""),
        ({"a": {"dtype": "F32", "shape": [2, 3]}}, bytes(24)),
        ({"a": {"dtype": "F32", "shape": "big", "data_offsets": [0, 24]}}, bytes(24)),
        ({"a": {"dtype": "F32", "shape": [-2, -3], "data_offsets": [0, 24]}}, bytes(24)),
        ({"a": {"dtype": 7, "shape": [2, 3], "data_offsets": [0, 24]}}, bytes(24)),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": []}}, bytes(24)),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, "24"]}}, bytes(24)),
        ({"a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 2**70]}}, bytes(24)),
    ],
)
def test_a_header_that_lies(head, data, tmp_path):
    with pytest.raises(ModelError, match=r"x\.safetensors: not a safetensors file") as caught:
        header(written(tmp_path / "x.safetensors", head, data))
    assert "\n" not in caught.value.what


@pytest.mark.parametrize("data", [b"", b"1234567"])
def test_a_file_shorter_than_a_length(data, tmp_path):
    (tmp_path / "x.safetensors").write_bytes(data)
    with pytest.raises(ModelError, match="not a safetensors file"):
        header(tmp_path / "x.safetensors")


def test_no_file(tmp_path):
    with pytest.raises(ModelError, match="not a safetensors file"):
        header(tmp_path / "x.safetensors")
