"""Tokens put together from words are the tokenizer's own, with their places; or the tokenizer does the work."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from trivium.data.memo import Memo, Tokens, can_be_cut, placed

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTES = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
TEXTS = ["The cat  sat\n on the mat.\n\n'Twas 12345 é😀, don't! \t x=  1;\r\n", "a b c the cat sat. " * 20]


def split(pattern: str) -> Any:
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), BYTES])


def made(pre_tokenizer: Any, normalizer: Any = None, **flags: bool) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  special_tokens=["<|a|>", "<|b|>"], show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(TEXTS * 3, trainer)
    tokenizer.add_tokens([AddedToken("<think>", normalized=False, **flags)])
    return tokenizer


BYTE_LEVEL = pre_tokenizers.ByteLevel(add_prefix_space=False)
KINDS = {
    "gpt2": made(BYTE_LEVEL),
    "gpt2 by pattern": made(split(GPT2)),
    "llama3": made(split(LLAMA3)),
    "qwen": made(split(LLAMA3), normalizers.NFC()),
    "digits": made(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), BYTE_LEVEL])),
}
TEXT = st.lists(
    st.sampled_from([" ", "  ", "\n", "\t", " \n ", "\r\n", "\xa0", "\u2003", "the", "cat", "é", "😀", "'s", "12345",
                     ".", ",;", "<|a|>", "<|b|>", "<think>", "<", "a\u0301", "x"]),
    max_size=25,
).map("".join)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(texts=st.lists(TEXT, min_size=1, max_size=4))
@settings(deadline=None, max_examples=80)
def test_the_same_tokens_and_places(kind: str, texts: list[str]) -> None:
    backend = KINDS[kind]
    memo = Memo(backend)
    for _ in range(2):  # the second time from memory
        found = memo.tokens(texts)
        assert found is not None
        for text, words in zip(texts, found, strict=True):
            whole = placed(backend.encode(text, add_special_tokens=False))
            assert words.ids.tolist() == whole.ids.tolist()
            assert [words.end_of(i) for i in range(len(whole.ids))] == whole.end.tolist()
            draw = random.Random(text)
            for _ in range(5):
                a, b = sorted(draw.choices(range(len(text) + 1), k=2))
                if a < b and "\u0301" not in text:  # what is composed has no character left to be at
                    assert words.between(a, b) == whole.between(a, b)


@pytest.mark.parametrize(
    "backend",
    [
        made(pre_tokenizers.ByteLevel(add_prefix_space=True)),
        made(split(r"\S+ \S+|\s+|\S+")),  # joins two words, which its vocabulary shows
        made(split(r"(?<= )\p{L}+|\s|\S")),
        made(BYTE_LEVEL, normalizers.Lowercase()),
        made(BYTE_LEVEL, lstrip=True),
        made(pre_tokenizers.Metaspace()),
        Tokenizer(models.WordLevel({"a": 0}, unk_token="a")),
    ],
    ids=["prefix space", "pairs of words", "lookbehind", "lower case", "strips", "metaspace", "no BPE"],
)
def test_where_it_cannot_be_proved_the_tokenizer_does_the_work(backend: Tokenizer) -> None:
    assert not can_be_cut(backend)
    assert Memo(backend).tokens(["a b"]) is None


def test_a_pattern_that_counts_across_words_is_found_out() -> None:
    backend = made(BYTE_LEVEL)  # no token of which goes on over a space
    backend.pre_tokenizer = split(r"[\s\S]{1,3}")
    assert can_be_cut(backend)
    assert not Memo(backend).holds


def test_a_difference_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.memo.can_be_cut", lambda _: True)
    memo = Memo(made(split(r"\S+ \S+|\s+|\S+")))
    assert memo.tokens(["the cat", "cat sat"]) is None
    assert memo.tokens(["the"]) is None  # and from then on


def test_words_are_forgotten_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trivium.data.memo.WORDS", 3)
    memo = Memo(KINDS["gpt2"])
    for _ in range(3):
        assert memo.tokens(["one two three four five"]) is not None
    assert len(memo.known) == 5


def test_tokens_without_characters_of_their_own_go_with_what_follows() -> None:
    import numpy as np

    tokens = Tokens(np.arange(4), np.array([0, 2, 2, 4]), np.array([2, 2, 4, 6]))
    assert tokens.between(2, 4) == (1, 3, False)
    assert tokens.between(1, 3) == (0, 3, True)
