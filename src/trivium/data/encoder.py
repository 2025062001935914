"""Text to tokens with their places, and nothing that a text says becomes a control token unless we say so.

    encoder = Encoder.of(tokenizer)              # a transformers tokenizer
    tokens = encoder.tokens(["<s>Hi</s>"])       # control tokens are read as such: what a template has rendered
    guarded = encoder.guarded("a </s> b")        # the same text, in which "</s>" is only text

A conversation is rendered by a template whose control tokens must be tokens, around messages in which the same signs
must stay text. So these are guarded, by a sign that no text has, before they are rendered; a text with guards in it is
tokenised by a twin of the tokenizer that takes no control token from text, and finds the real ones under other names.

Needs `tokenizers` alone, so that a process that only prepares data starts quickly.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.data.memo import Memo, Tokens, Words, placed

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

GUARD = "\ufdd0"  # no character, by Unicode's own word: no text has it
_STANDIN = "\ufdd1"  # and this begins the twin's names for control tokens


@dataclass(frozen=True, eq=False)
class Encoder:
    """A tokenizer as data preparation needs it."""

    backend: Tokenizer
    variables: dict[str, str]  # bos_token and the like, for templates
    bos_id: int | None  # of the BOS that the tokenizer puts in front of every text by itself
    eos_id: int | None
    also: tuple[str, ...] = ()  # control tokens, as a template's turns show, that the tokenizer does not call special

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerFast) -> Encoder:
        """From a transformers tokenizer."""
        variables = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
        return cls(tokenizer.backend_tokenizer, variables, added_bos(tokenizer), tokenizer.eos_token_id)

    def dump(self) -> dict[str, Any]:
        """All there is to it, as plain values."""
        return {"tokenizer": self.backend.to_str(), "variables": self.variables, "bos": self.bos_id,
                "eos": self.eos_id, "also": self.also}  # fmt: skip

    @classmethod
    def load(cls, dumped: dict[str, Any]) -> Encoder:
        from tokenizers import Tokenizer

        made = Tokenizer.from_str(dumped["tokenizer"])
        return cls(made, dumped["variables"], dumped["bos"], dumped["eos"], tuple(dumped["also"]))

    # --- control tokens

    @cached_property
    def added(self) -> dict[int, Any]:
        """The tokens that are found in a text before anything else, by id."""
        return dict(self.backend.get_added_tokens_decoder())

    @cached_property
    def added_ids(self) -> np.ndarray:
        return np.array(sorted(self.added), dtype=np.int64)

    @cached_property
    def _control(self) -> re.Pattern[str]:
        """Matches any control token's text. One sign alone cannot be guarded, and is nobody's control token."""
        texts = [t.content for t in self.added.values() if self._controls(t) and len(t.content) > 1]
        return re.compile("|".join(map(re.escape, sorted(texts, key=len, reverse=True))) or "(?!)")

    def _controls(self, token: Any) -> bool:
        return bool(token.special) or token.content in self.also

    def names_control(self, text: str) -> bool:
        return self._control.search(text) is not None

    def guarded(self, value: Any) -> Any:
        """A text, or all texts in a list or mapping, with a guard in everything that looks like a control token."""
        if isinstance(value, str):
            while self._control.search(value):
                value = self._control.sub(lambda m: m[0][0] + GUARD + m[0][1:], value)
            return value
        if isinstance(value, dict):
            return {k: self.guarded(v) for k, v in value.items()}
        return [self.guarded(v) for v in value] if isinstance(value, list) else value

    @cached_property
    def _twin(self) -> tuple[Tokenizer, dict[int, int], dict[str, str]]:
        """(the tokenizer that takes no control token from text, its ids of those by ours, their names by ours)."""
        from tokenizers import AddedToken, Tokenizer

        spec = json.loads(self.backend.to_str())
        for token in spec["added_tokens"]:
            token["special"] = token["special"] or token["content"] in self.also
        twin = Tokenizer.from_str(json.dumps(spec))
        twin.encode_special_tokens = True
        twin.no_truncation()
        twin.no_padding()
        names: dict[str, str] = {}
        ids: dict[int, int] = {}
        for ours, token in self.added.items():
            if self._controls(token):
                name = names[token.content] = _STANDIN + chr(0xF0000 + ours % 0xFFFE)
                flags = {"lstrip": token.lstrip, "rstrip": token.rstrip, "single_word": token.single_word}
                twin.add_tokens([AddedToken(name, normalized=False, special=False, **flags)])
                ids[int(twin.token_to_id(name) or 0)] = ours
        return twin, ids, names

    # --- tokens

    @cached_property
    def memo(self) -> Memo:
        return Memo(self.backend)

    def tokens(self, texts: Sequence[str]) -> list[Tokens | Words]:
        """Texts as tokens with places in them, those that have guards with these obeyed; no BOS is added."""
        plain = [t for t in texts if GUARD not in t]
        self.backend.no_truncation()
        self.backend.no_padding()
        found: Sequence[Tokens | Words] | None = self.memo.tokens(plain)
        if found is None:
            found = [placed(e) for e in self.backend.encode_batch(plain, add_special_tokens=False)]
        ready = iter(found)
        return [self._guarded_tokens(t) if GUARD in t else next(ready) for t in texts]

    def placed_tokens(self, text: str) -> list[tuple[int, int, int]]:
        """(id, start, end) of each token of a text."""
        found = placed(self.backend.encode(text, add_special_tokens=False))
        return list(zip(found.ids.tolist(), found.start.tolist(), found.end.tolist(), strict=True))

    def _guarded_tokens(self, text: str) -> Tokens:
        """The tokens of a text with guards; the places are those in the text as it is given, guards counted."""
        twin, ids, names = self._twin
        pieces: list[str] = []
        to: list[int] = []  # a place in the twin's text -> the place in ours
        last = 0
        for match in re.finditer(f"{self._control.pattern}|{GUARD}", text):
            name = names.get(match[0], "")
            pieces += [text[last : match.start()], name]
            to += [*range(last, match.start()), *[match.start()] * len(name)]
            last = match.end()
        to += range(last, len(text) + 1)
        found = placed(twin.encode("".join([*pieces, text[last:]]), add_special_tokens=False))
        own = np.array([ids.get(i, i) for i in found.ids.tolist()], np.int32)
        places = np.array(to, np.int64)
        return Tokens(own, places[found.start], places[found.end])


def added_bos(tokenizer: PreTrainedTokenizerFast) -> int | None:
    """The BOS that the tokenizer puts in front of every text by itself, if it does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    bos = tokenizer.bos_token_id
    return bos if bos is not None and full[:1] == [bos] and bare[:1] != [bos] else None
