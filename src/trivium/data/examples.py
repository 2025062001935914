"""From rows to examples: token ids with a weight per token, and an account of every row. One block at a time.

    maker = Maker(Spec("conversation", limit=2048), encoder, template)
    made = maker.make(rows_of(block, "chats.jsonl"))         # Made: examples, and what became of the others

What becomes of a row longer than ``limit`` is said by ``on_overflow``; nothing is ever cut silently. A part of the
prepared data (`store`) is what is made of one block, here or in another process (`workers`), the same in both.

Cost: one batched tokenizer call per block.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import Any, Literal

import numpy as np

from trivium.data.blocks import BadRow, Row
from trivium.data.chat import ChatTemplate, Rendered, TrainOn
from trivium.data.encoder import GUARD, Encoder
from trivium.data.formats import (
    Conversation,
    Fields,
    Kind,
    Pairs,
    Parsed,
    Prompt,
    RowError,
    Text,
    mapped,
    parse,
)  # fmt: skip
from trivium.data.memo import Tokens, Words
from trivium.forest import Example, TokenSequence

Overflow = Literal["error", "drop", "truncate_left", "truncate_right", "split"]
ANSWERS: tuple[Kind, ...] = ("pair", "rating")  # rows with several answers to one prompt, or one, that are compared


def overflow(kind: Kind, max_length: int | None, asked: Overflow | None) -> Overflow:
    """What becomes of over-long rows: what is asked; else texts are split, and other rows are an error where a
    ``max_length`` was given, or dropped, as the model cannot read them."""
    return asked or ("split" if kind == "text" else "error" if max_length else "drop")


@dataclass(frozen=True)
class Spec:
    """What is made of rows, but for the tokenizer and its template."""

    kind: Kind
    limit: int  # the most tokens a sequence may have
    train_on: TrainOn = "assistant"
    on_overflow: Overflow = "drop"
    pairs: Pairs = "best_worst"  # of a scored list of answers
    ends: bool = False  # what is read is the state after the last token, for a reward, instead of every answer's token


@dataclass
class Made:
    """What became of a block's rows: those that are in neither list at the end have examples."""

    examples: list[Example] = field(default_factory=list)
    lines: list[int] = field(default_factory=list)  # per example: where its row stands,
    digests: list[int] = field(default_factory=list)  # a hash of the row,
    firsts: list[bool] = field(default_factory=list)  # and whether it is the row's first
    read: int = 0
    set_aside: list[tuple[int, str, str]] = field(default_factory=list)  # (line, reason, the row)
    over_long: list[tuple[int, int, str]] = field(default_factory=list)  # (line, tokens, the row)
    counts: Counter[str] = field(default_factory=Counter)  # see `ledger.COUNTS`


@dataclass(frozen=True)
class _Draft:
    """A row on its way: what is to be tokenised, one text per sequence, and what is known of it besides."""

    row: Row
    digest: int
    texts: tuple[Rendered, ...]
    about: dict[str, Any]  # fields of its example


@dataclass(frozen=True)
class Maker:
    """Makes examples of rows. ``template`` may be None for plain text alone."""

    spec: Spec
    encoder: Encoder
    template: ChatTemplate | None = None

    def make(self, rows: Iterable[Row | BadRow], fields: Fields = ()) -> Made:
        """All rows of a block; ``fields`` renames theirs to ours."""
        made = Made()
        drafts = list(self._drafts(rows, fields, made))
        finish = self._finish_texts if self.spec.kind == "text" else self._finish_chats
        if drafts:
            finish(drafts, made)
        return made

    def _drafts(self, rows: Iterable[Row | BadRow], fields: Fields, made: Made) -> Iterator[_Draft]:
        """Rows recognised and rendered; the others are entered as set aside."""
        for row in rows:
            made.read += 1
            if isinstance(row, BadRow):
                made.set_aside.append((row.line, row.reason, row.raw))
                continue
            try:
                parsed = parse(mapped(row.value, fields), self.spec.kind)
                texts, about = self._render(parsed)
            except RowError as error:
                made.set_aside.append((row.line, str(error), canonical(row.value)))
                continue
            made.counts["rewritten"] += self.spec.kind == "conversation" and len(texts) > 1
            made.counts["control_as_text"] += any(GUARD in t.text for t in texts)
            if self.spec.kind == "rating":
                for name, sign in (("good", 1), ("bad", -1)):
                    made.counts[name] += sum(score == sign for score in about["scores"])
            made.counts["weighted"] += about.get("weight", 1.0) != 1
            made.counts["with_margin"] += about.get("margin", 0.0) != 0
            yield _Draft(row, digest_of(row.value), texts, about)

    def _render(self, parsed: Parsed) -> tuple[tuple[Rendered, ...], dict[str, Any]]:
        """The texts of a row, one for each sequence of its example, and what else the example is to know."""
        if isinstance(parsed, Text):
            text = self.encoder.guarded(parsed.text) if self.encoder.names_control(parsed.text) else parsed.text
            return (Rendered(text, (), 0),), {}
        template = self.template
        assert template is not None, "conversations and pairs need a chat template"
        if isinstance(parsed, Conversation):
            return tuple(template.lay_out(parsed.messages, self.spec.train_on, parsed.tools)), {}
        if isinstance(parsed, Prompt):
            return (template.lay_out_prompt(parsed.messages, parsed.tools),), {}
        answers = parsed.answers_by_score(self.spec.pairs)
        laid = tuple(template.lay_out_answer(parsed.prompt, answer, parsed.tools) for answer, _ in answers)
        scores = tuple(score for _, score in answers)
        return laid, {"scores": scores, "weight": parsed.weight, "margin": parsed.margin}

    # --- documents

    def _finish_texts(self, drafts: list[_Draft], made: Made) -> None:
        """[BOS] text [EOS], every token trained but the first, split where longer than the limit."""
        bos, eos = self.encoder.bos_id, self.encoder.eos_id
        before = 0 if bos is None else 1
        tokenised = self.encoder.tokens([d.texts[0].text for d in drafts])
        for draft, found in zip(drafts, tokenised, strict=True):
            text = draft.texts[0].text
            end = [] if eos is None or draft.row.goes_on else [eos]
            tokens = np.concatenate([np.array([bos] * before, np.int32), found.ids, np.array(end, np.int32)])
            if len(tokens) < 2:
                reason = "no trained token: the text is a single token"
                made.set_aside.append((draft.row.line, reason, canonical(draft.row.value)))
                continue
            pieces = self._fitting_text(tokens, draft, made)
            if not pieces:
                continue
            sizes = _piece_bytes(text, found, before, len(pieces), self.spec.limit)
            sequences = [TokenSequence(piece, _all_but_first(len(piece))) for piece in pieces]
            self._place(draft, [Example((s,), "", n) for s, n in zip(sequences, sizes, strict=True)], made)

    def _fitting_text(self, tokens: np.ndarray, draft: _Draft, made: Made) -> list[np.ndarray]:
        """A text's tokens in pieces that fit; none where it is over-long."""
        limit, how = self.spec.limit, self.spec.on_overflow
        if len(tokens) <= limit:
            return [tokens]
        if how == "split":
            made.counts["split"] += 1
            return split(tokens, limit)
        if how in ("truncate_left", "truncate_right"):
            made.counts["cut"] += 1
            made.counts["cut_trained"] += len(tokens) - limit
            return [tokens[:limit] if how == "truncate_right" else tokens[-limit:]]
        made.over_long.append((draft.row.line, len(tokens), canonical(draft.row.value)))
        return []

    # --- conversations, preferences and the like

    def _finish_chats(self, drafts: list[_Draft], made: Made) -> None:
        """A row's example: the sequences of a conversation, the answers of a preference."""
        assert self.template is not None
        tokenised = iter(self.template.tokenize([r.text for d in drafts for r in d.texts]))
        for draft in drafts:
            tokens = list(islice(tokenised, len(draft.texts)))
            try:
                sequences = [self.template.weigh(r, t) for r, t in zip(draft.texts, tokens, strict=True)]
                self._must_train(sequences, draft, "")
                longest = max(len(s.tokens) for s in sequences)
                if longest > self.spec.limit:
                    if self.spec.on_overflow not in ("truncate_left", "truncate_right"):
                        made.over_long.append((draft.row.line, longest, canonical(draft.row.value)))
                        continue
                    before = sum(s.trained_tokens for s in sequences)
                    sequences = self._truncated(sequences)
                    self._must_train(sequences, draft, f" once cut to {self.spec.limit} tokens")
                    made.counts["cut"] += 1
                    made.counts["cut_trained"] += before - sum(s.trained_tokens for s in sequences)
            except RowError as error:
                made.set_aside.append((draft.row.line, str(error), canonical(draft.row.value)))
                continue
            size = 0 if self.spec.kind in ANSWERS else sum(r.answer_bytes for r in draft.texts)
            read = [at_its_end(s) for s in sequences] if self.spec.ends else sequences
            self._place(draft, [Example(tuple(read), "", size, **draft.about)], made)

    def _must_train(self, sequences: list[TokenSequence], draft: _Draft, when: str) -> None:
        """Every example trains something, and answers that are compared differ. Raises RowError."""
        if self.spec.kind == "prompt":
            return
        if not sequences or not all(s.trained_tokens for s in sequences):
            raise RowError(f"no trained token{when}")
        if len(draft.about.get("scores", ())) > 1 and not Example(tuple(sequences), **draft.about).pairs:
            raise RowError(f"chosen and rejected are the same{when or ' once tokenised'}")

    def _truncated(self, group: list[TokenSequence]) -> list[TokenSequence]:
        """Sequences cut to the limit. From the left all lose equally much, so that a pair keeps one prompt."""
        limit = self.spec.limit
        if self.spec.on_overflow == "truncate_right":
            cut = [TokenSequence(s.tokens[:limit], s.weights[:limit]) for s in group]
        else:
            lost = max(len(s.tokens) for s in group) - limit
            keep = int(self.encoder.bos_id is not None)  # the BOS stays in front
            if self.spec.kind in ANSWERS and any(s.weights[: keep + lost + 1].any() for s in group):
                raise RowError(f"its answers alone have more than {limit} tokens: cut from the left, none has a prompt")
            cut = [_without(s, keep, keep + max(lost, 0)) for s in group]
            if any(s.trained_tokens and s.weights[max(1, keep) :].all() for s in cut):
                raise RowError(f"nothing is left of its prompt once cut to {limit} tokens from the left")
        return [s for s in cut if s.trained_tokens] if self.spec.kind == "conversation" else cut

    def _place(self, draft: _Draft, examples: list[Example], made: Made) -> None:
        made.examples += examples
        made.lines += [draft.row.line] * len(examples)
        made.digests += [draft.digest] * len(examples)
        made.firsts += [True] + [False] * (len(examples) - 1)


def canonical(value: Any) -> str:
    """Plain values as one text, the same whatever the order of keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def digest_of(value: dict[str, Any]) -> int:
    """A row's identity in 64 bits: the same for the same fields in any order."""
    return int.from_bytes(hashlib.sha256(canonical(value).encode("utf-8")).digest()[:8], "big")


def held_out_below(share: float) -> int:
    """A row is among the ``share`` of the rows that is never trained on if its digest is below this."""
    return int(share * 2**64)


def split(tokens: np.ndarray, limit: int) -> list[np.ndarray]:
    """Consecutive pieces ``[<= limit]`` that overlap by one token: the last of one is what the next begins with."""
    return [tokens[at : at + limit] for at in range(0, max(len(tokens) - 1, 1), limit - 1)]


def _without(s: TokenSequence, start: int, stop: int) -> TokenSequence:
    """A sequence without its tokens ``[start, stop)``; what is first then is not trained."""
    weights = np.concatenate([s.weights[:start], s.weights[stop:]])
    weights[:1] = 0
    return TokenSequence(np.concatenate([s.tokens[:start], s.tokens[stop:]]), weights)


def at_its_end(s: TokenSequence) -> TokenSequence:
    """A sequence whose one entry is the state after its last trained token: what a reward is read from.

    The token that stands behind it says nothing and is never read: an entry is what a state predicts.
    """
    last = int(np.flatnonzero(s.weights)[-1]) + 1
    weights = np.zeros(last + 1, np.float32)
    weights[-1] = 1
    return TokenSequence(np.append(s.tokens[:last], s.tokens[:1]), weights)


def _piece_bytes(text: str, found: Tokens | Words, before: int, pieces: int, limit: int) -> list[int]:
    """UTF-8 bytes that each piece of a text trains; ``before`` tokens stand in front of the text's own, ``found``."""

    def end_of(place: int) -> int:
        """Where the token at this place of the whole ends in the text."""
        at = min(place - before, len(found.ids) - 1)
        return found.end_of(at) if at >= 0 else 0

    cuts = [end_of(n * (limit - 1)) for n in range(pieces)] if pieces > 1 or not before else [0]
    return [len(text[start:stop].replace(GUARD, "").encode("utf-8")) for start, stop in pairwise([*cuts, len(text)])]


def _all_but_first(n: int) -> np.ndarray:
    weights = np.ones(n, np.float32)
    weights[:1] = 0
    return weights
