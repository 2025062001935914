"""The tokenizer of one's own: exact round trip, the same file every time, survives saving."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from trivium.data.templates import chat_template
from trivium.data.tokenizer import SMALLEST, SPECIAL, train_tokenizer
from trivium.errors import DataError

TEXTS = ["Once upon a time there was a turtle.", "The turtle went up a hill; once more, once more!"] * 5
TOKENIZER = train_tokenizer(TEXTS, 300)
CHAT = [
    {"role": "system", "content": ""},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "  Hello\n"},
]


@given(st.text())
@settings(deadline=None)
def test_any_text_comes_back(text: str) -> None:
    ids = TOKENIZER(text, add_special_tokens=False)["input_ids"]
    assert TOKENIZER.decode(ids) == text
    assert TOKENIZER(text)["input_ids"] == [TOKENIZER.bos_token_id, *ids]


def test_special_tokens_and_size() -> None:
    assert TOKENIZER.convert_tokens_to_ids(list(SPECIAL)) == list(range(len(SPECIAL)))
    assert (TOKENIZER.pad_token, TOKENIZER.bos_token, TOKENIZER.eos_token) == SPECIAL[:3]
    assert SMALLEST < len(TOKENIZER) <= 300
    assert len(train_tokenizer(["a"], SMALLEST)) == SMALLEST


def test_same_texts_same_file(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train_tokenizer(iter(TEXTS), 300).save_pretrained(tmp_path / name)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_survives_saving(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert loaded.model_max_length == TOKENIZER.model_max_length < 1e9
    assert loaded.apply_chat_template(CHAT)["input_ids"] == TOKENIZER.apply_chat_template(CHAT)["input_ids"]
    assert chat_template(loaded).stop_ids == {loaded.eos_token_id}


def test_template_has_generation_markers_that_agree() -> None:
    whole = TOKENIZER.apply_chat_template(CHAT, return_dict=True, return_assistant_tokens_mask=True)
    (sequence,) = chat_template(TOKENIZER).encode(CHAT, "assistant")
    assert sequence.tokens.tolist() == whole["input_ids"]
    assert sequence.weights.tolist() == whole["assistant_masks"]


def test_refusals() -> None:
    with pytest.raises(DataError, match=f"give {SMALLEST} or more"):
        train_tokenizer(TEXTS, 100)
    with pytest.raises(DataError, match="no text"):
        train_tokenizer(["", ""], 300)
