"""Words met before are not tokenised again: the same tokens in less time, where the tokenizer allows it.

Most tokenizers of today cut a text before every space that follows something else, and join nothing across that cut.
For these a text is its added tokens and its words, each word's tokens are found once, and a text's tokens are put
together from them. That nothing is joined follows from the vocabulary. That a word is cut the same alone is taken from
the kinds of normalizer and pre-tokenizer, tried on a text, and checked on a few texts of every batch against what the
tokenizer itself says. Where any of it fails, the tokenizer does all the work.
"""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate, chain, pairwise, repeat
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ROW = 500  # new words that are tokenised in a row
WORDS = 500_000  # that are remembered; then all are forgotten
COMPARED = 8  # texts of a batch that are compared
# What a pattern that counts across words, say, would cut otherwise as a whole and word by word.
PROBE = "The 12345 cats' hats, don't  sit\n\n on\tthe mat: é😀 x=1; (a) b-c ... http://d.e/f?g=1 ÀÉ 日本語 ok\r\n" * 3
_CUT = re.compile(r"(?<=\S)(?= )")
_ODD = re.compile(r"\s |\0")  # a space that follows white space is no cut
_ASCII_ODD = ("\t ", "\r ", "\v ", "\f ", "\x1c ", "\x1d ", "\x1e ", "\x1f ", "\0")


@dataclass(frozen=True, slots=True)
class Tokens:
    """``n`` tokens, ``ids [n]``, and where each starts and ends in the text: ``start [n]``, ``end [n]``."""

    ids: np.ndarray
    start: np.ndarray
    end: np.ndarray

    def between(self, a: int, b: int) -> tuple[int, int, bool]:
        """The tokens ``[i, j)`` that hold a character of ``text[a:b]``, and whether the first begins before it."""
        end = np.maximum.accumulate(self.end)
        # Some tokenizers leave white space out of a token's offsets: a token takes what lies before it.
        start = np.minimum(self.start, np.concatenate([[0], end[:-1]])) if len(end) else end
        i, j = int(np.searchsorted(end, a, "right")), int(np.searchsorted(start, b, "left"))
        while i > 0 and end[i - 1] == start[i - 1] >= a:  # without characters of its own
            i -= 1
        return i, j, bool(i < j and start[i] < a)

    def end_of(self, i: int) -> int:
        """Where token ``i`` ends in the text."""
        return int(self.end[i])


@dataclass(frozen=True, eq=False)
class Words:
    """The same, put together from words: only the word in which a place lies is looked into."""

    ids: np.ndarray
    memo: Memo
    words: list[str]  # the text, cut
    pieces: list[bytes]  # the tokens of each word

    @cached_property
    def _ends(self) -> tuple[list[int], list[int]]:
        """Where each word ends: in characters, in bytes of tokens."""
        return list(accumulate(map(len, self.words))), list(accumulate(map(len, self.pieces)))

    def between(self, a: int, b: int) -> tuple[int, int, bool]:
        i, before = self._token_at(a)
        j, cut = self._token_at(b)
        return i, j + cut, before

    def _token_at(self, place: int) -> tuple[int, bool]:
        """The token that holds the character at a place, and whether it begins before it."""
        chars, tokens = self._ends
        n = bisect_right(chars, place)
        if n == len(chars):
            return len(self.ids), False
        start, first = (chars[n - 1], tokens[n - 1] // 4) if n else (0, 0)
        if place == start:
            return first, False
        i, before = self.memo.token_at(self.words[n], place - start)
        return first + i, before

    def end_of(self, i: int) -> int:
        chars, tokens = self._ends
        n = bisect_right(tokens, 4 * i)
        start, first = (chars[n - 1], tokens[n - 1] // 4) if n else (0, 0)
        return start + self.memo.inside(self.words[n]).end_of(i - first)


class Memo:
    """The words that one tokenizer has met, and their tokens."""

    def __init__(self, backend: Tokenizer) -> None:
        self.backend = backend
        self.known: dict[str, bytes] = {}  # a word's tokens, four bytes each
        self._inside: dict[str, Tokens] = {}
        self._places: dict[tuple[str, int], tuple[int, bool]] = {}
        added = backend.get_added_tokens_decoder().values()
        texts = sorted((t.content for t in added), key=len, reverse=True)
        self.added = re.compile("(" + "|".join(map(re.escape, texts)) + ")") if texts else None
        self.holds = can_be_cut(backend)
        self.tokens([PROBE])  # which takes it back where the two differ

    def tokens(self, texts: Sequence[str]) -> list[Words] | None:
        """The tokens of texts; None where they cannot be put together from words."""
        if not self.holds:
            return None
        if len(self.known) > WORDS:
            self.known, self._inside, self._places = {}, {}, {}
        cut = [self._words(text) for text in texts]
        if new := set(chain.from_iterable(cut)).difference(self.known):
            self._learn(new)
        pieces = [list(map(self.known.__getitem__, words)) for words in cut]
        found = [np.frombuffer(b"".join(some), np.int32) for some in pieces]
        step = max(1, len(texts) // COMPARED)
        said = self.backend.encode_batch(list(texts[::step]), add_special_tokens=False)
        self.holds = all(e.ids == ids.tolist() for e, ids in zip(said, found[::step], strict=True))
        return [Words(*one) for one in zip(found, repeat(self), cut, pieces, strict=False)] if self.holds else None

    def _learn(self, new: set[str]) -> None:
        """Have new words tokenised: those that begin with a space many in a row, as the cut before each holds."""
        spaced: list[str] = []
        bare: list[str] = []
        for word in sorted(new):
            (spaced if word[0] == " " and not word[-1].isspace() else bare).append(word)
        rows = [spaced[at : at + ROW] for at in range(0, len(spaced), ROW)]
        rows += [[word] for word in bare]
        encodings = self.backend.encode_batch(["".join(row) for row in rows], add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            ids = np.array(encoding.ids, np.int32)
            ends = np.array([end for _, end in encoding.offsets])
            cuts = [0, *np.searchsorted(ends, list(accumulate(map(len, row))), "right").tolist()]
            for word, (start, end) in zip(row, pairwise(cuts), strict=True):
                self.known[word] = ids[start:end].tobytes()

    def _words(self, text: str) -> list[str]:
        pieces = self.added.split(text) if self.added is not None else [text]
        if len(pieces) == 1:
            return _cut(text) if text else []
        words: list[str] = []
        for n, piece in enumerate(pieces):
            if n % 2:
                words.append(piece)
            elif piece:
                words += _cut(piece)
        return words

    def token_at(self, word: str, place: int) -> tuple[int, bool]:
        """The token of a word that holds the character at a place, and whether it begins before it."""
        found = self._places.get((word, place))
        if found is None:
            i, _, before = self.inside(word).between(place, place + 1)
            found = self._places[word, place] = (i, before)
        return found

    def inside(self, word: str) -> Tokens:
        """A word's tokens with their places."""
        found = self._inside.get(word)
        if found is None:
            found = self._inside[word] = placed(self.backend.encode(word, add_special_tokens=False))
        return found


def placed(encoding: Encoding) -> Tokens:
    """A tokenizer's tokens with their places."""
    at = np.array(encoding.offsets, np.int64).reshape(-1, 2)
    return Tokens(np.array(encoding.ids, np.int32), at[:, 0], at[:, 1])


def _cut(text: str) -> list[str]:
    """A text's words, each with the white space before it."""
    if text.isascii():
        odd = "  " in text or "\n " in text or any(pair in text for pair in _ASCII_ODD)
    else:
        odd = _ODD.search(text) is not None
    if odd or text[0] == " ":
        return _CUT.split(text)
    return text.replace(" ", "\0 ").split("\0")


def can_be_cut(backend: Tokenizer) -> bool:
    """Whether a text's tokens are those of its words, cut before each space that follows something else."""
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model.get("type") != "BPE" or model.get("dropout") or model.get("continuing_subword_prefix"):
        return False
    if any(t["lstrip"] or t["rstrip"] or t["single_word"] for t in spec["added_tokens"]):
        return False
    if spec["normalizer"] is not None and not all(
        n["type"] == "NFC" for n in _parts(spec["normalizer"], "normalizers")
    ):
        return False
    if not all(_cuts_by_itself(p) for p in _parts(spec["pre_tokenizer"], "pretokenizers")):
        return False
    if not any(p["type"] == "ByteLevel" for p in _parts(spec["pre_tokenizer"], "pretokenizers")):
        return False
    # A byte-level vocabulary writes white space as these six. No token has a space after anything else: so nothing is
    # joined across a cut, as what is joined is a token.
    return not any(re.search("[^ĠĊčĉċČ]Ġ", token) for token in model["vocab"])


def _parts(spec: dict[str, Any] | None, name: str) -> list[dict[str, Any]]:
    if spec is None:
        return []
    return [p for part in spec[name] for p in _parts(part, name)] if spec["type"] == "Sequence" else [spec]


def _cuts_by_itself(pre_tokenizer: dict[str, Any]) -> bool:
    """Whether where it cuts inside a word depends on that word alone."""
    kind = pre_tokenizer["type"]
    if kind == "ByteLevel":
        return not pre_tokenizer["add_prefix_space"]
    if kind == "Digits":
        return True
    if kind == "Split" and "Regex" in pre_tokenizer["pattern"]:
        pattern = pre_tokenizer["pattern"]["Regex"].replace(r"(?!\S)", "")
        return pre_tokenizer["behavior"] == "Isolated" and not re.search(
            r"\(\?<|\(\?=|\(\?!|\\[bBAzZG]|[$^](?![^\[]*\])", pattern
        )
    return False
