"""A tokenizer's files are looked at before a library takes memory for what they claim."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from trivium.data.tokenizer import train_tokenizer
from trivium.errors import ModelError
from trivium.folder import load_tokenizer
from trivium.model.load import locate
from trivium.model.vocabulary import check_ids


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    train_tokenizer(["a cat sat on a mat"], 280).save_pretrained(tmp_path)
    return tmp_path


def change(file: Path, *place: str, **values: Any) -> None:
    whole = at = json.loads(file.read_text(encoding="utf-8"))
    for part in place:
        at = at[part]
    at.update(values)
    file.write_text(json.dumps(whole), encoding="utf-8")


def test_a_sound_tokenizer_is_read(folder):
    assert load_tokenizer(folder)("a cat")["input_ids"]


@pytest.mark.parametrize("high", [2**31, 2**40, 10**7])
def test_an_id_beyond_the_file_is_refused_at_once(folder, high):
    change(folder / "tokenizer.json", "model", "vocab", cat=high)
    started = time.process_time()
    with pytest.raises(ModelError, match=f"the id {high}, and has only .* bytes"):
        load_tokenizer(folder)
    assert time.process_time() - started < 1


def test_so_is_one_of_an_added_token_and_of_a_vocabulary_apart(folder):
    change(folder / "tokenizer.json", added_tokens=[{"id": 2**31, "content": "x", "special": True}])
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        check_ids(folder)
    (folder / "tokenizer.json").unlink()
    (folder / "vocab.json").write_text('{"a": 0, "b": 123456789}', encoding="utf-8")
    with pytest.raises(ModelError, match=r"vocab\.json"):
        check_ids(folder)


def test_a_model_folder_is_looked_at_too(folder):
    change(folder / "tokenizer.json", "model", "vocab", cat=2**31)
    (folder / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    (folder / "model.safetensors").touch()
    with pytest.raises(ModelError, match="the id 2147483648"):
        locate(str(folder))


def test_large_numbers_that_are_no_ids_are_left_alone(folder):
    change(folder / "tokenizer.json", note=10**12)
    check_ids(folder)


def test_what_shows_itself_only_in_reading_is_refused_too(folder):
    change(folder / "tokenizer_config.json", model_max_length=[1])
    with pytest.raises(ModelError, match="its tokenizer cannot be loaded"):
        load_tokenizer(folder)
    change(folder / "tokenizer_config.json", model_max_length=9)
    change(folder / "tokenizer.json", "model", unk_token="yes")
    with pytest.raises(ModelError, match="'yes', is not in its vocabulary"):
        load_tokenizer(folder)
