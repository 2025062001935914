"""From files to examples: every stage's data becomes token ids with a weight per token, every row accounted for.

    prepared = prepare(Path("chats.jsonl"), kind="conversation", tokenizer=tokenizer,
                       template=chat_template(tokenizer), max_length=None, context=2048)

What becomes of a row too long for ``max_length`` (or the model's ``context``): a text is split, so that every token
is still trained exactly once; a conversation or pair is set aside and counted. Nothing is ever cut silently.

Cost: one batched tokenizer call per 1,000 rows; tokens and weights are held in memory, 8 bytes a token.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice, pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from trivium.data.chat import ChatTemplate, Rendered, TrainOn, added_bos
from trivium.data.formats import Conversation, Kind, Pair, RowError, Text, parse
from trivium.data.ledger import Ledger
from trivium.data.rows import BadRow, Listed, Row, Source, read_rows
from trivium.forest import Example, TokenSequence

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

CHUNK = 1000  # rows per tokenizer call


@dataclass
class Prepared:
    """A data set ready for training."""

    examples: list[Example] = field(default_factory=list)
    held_out: list[Example] = field(default_factory=list)
    ledger: Ledger = field(default_factory=Ledger)


@dataclass(frozen=True)
class _Draft:
    """A row on its way: what is to be tokenised, one text per sequence."""

    row: Row
    held_out: bool
    texts: tuple[Rendered, ...]


def prepare(
    source: Source | str | Sequence[Source | str],
    *,
    kind: Kind,
    tokenizer: PreTrainedTokenizerFast,
    template: ChatTemplate | None = None,
    train_on: TrainOn = "assistant",
    max_length: int | None = None,
    context: int,
    holdout: float = 0.0,
    bad_rows: float = 0.01,
) -> Prepared:
    """Read, recognise, render and tokenise all rows of ``source``: paths, or rows in memory.

    ``holdout`` is the part of the rows kept out of training, decided by each row's own content: adding rows moves
    none from one side to the other, and identical rows are on the same side.
    Raises DataError where a file is missing, nothing useful is left, or more than ``bad_rows`` (a share) are unusable.
    """
    assert kind == "text" or template is not None, "conversations and pairs need a chat template"
    given = [source] if isinstance(source, (str, Path, Listed)) else source
    sources = [Path(s) if isinstance(s, str) else s for s in given]
    limit = min(max_length or context, context)
    assert limit >= 2, "a sequence needs two tokens: one to predict from and one to predict"
    done = Prepared(ledger=Ledger(source=", ".join(map(str, sources)), limit=limit))
    seen: set[bytes] = set()
    for chunk in _chunks(chain.from_iterable(read_rows(s) for s in sources), CHUNK):
        drafts = list(_drafts(chunk, kind, template, train_on, holdout, done.ledger, seen))
        if kind == "text":
            _finish_texts(drafts, tokenizer, limit, done)
        else:
            assert template is not None
            _finish_chats(drafts, template, kind, limit, done)
    done.ledger.balance()
    done.ledger.check(bad_rows)
    return done


def _chunks(rows: Iterable[Row | BadRow], size: int) -> Iterator[list[Row | BadRow]]:
    rows = iter(rows)
    while chunk := list(islice(rows, size)):
        yield chunk


def _drafts(
    rows: list[Row | BadRow],
    kind: Kind,
    template: ChatTemplate | None,
    train_on: TrainOn,
    holdout: float,
    ledger: Ledger,
    seen: set[bytes],
) -> Iterator[_Draft]:
    """Rows recognised and rendered; the others are entered in the ledger."""
    for row in rows:
        ledger.read += 1
        if isinstance(row, BadRow):
            ledger.set_aside.append((row.origin, row.reason))
            continue
        digest = content_hash(row.value)
        ledger.duplicates += digest in seen
        seen.add(digest)
        try:
            texts = _render(parse(row.value, kind), template, train_on)
        except RowError as error:
            ledger.set_aside.append((row.origin, str(error)))
            continue
        yield _Draft(row, on_the_held_out_side(digest, holdout), texts)


def content_hash(value: dict[str, Any]) -> bytes:
    """A row's identity: the same for the same fields in any order. 16 bytes."""
    canonical = json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)
    return hashlib.sha256(canonical.encode("utf-8")).digest()[:16]


def on_the_held_out_side(digest: bytes, share: float) -> bool:
    """Whether a row with this content is among the ``share`` of the rows that is never trained on."""
    return int.from_bytes(digest[:8], "big") < share * 2**64


def _render(
    parsed: Text | Conversation | Pair, template: ChatTemplate | None, train_on: TrainOn
) -> tuple[Rendered, ...]:
    if isinstance(parsed, Text):
        return (Rendered(parsed.text, ((0, len(parsed.text)),), len(parsed.text.encode("utf-8"))),)
    assert template is not None
    if isinstance(parsed, Conversation):
        return tuple(template.lay_out(parsed.messages, train_on, parsed.tools))
    chosen, rejected = (
        template.lay_out_answer(parsed.prompt, a, parsed.tools) for a in (parsed.chosen, parsed.rejected)
    )
    return chosen, rejected


def _finish_texts(drafts: list[_Draft], tokenizer: PreTrainedTokenizerFast, limit: int, done: Prepared) -> None:
    """Documents: [BOS] text [EOS], every token trained but the first, split where longer than ``limit``."""
    if not drafts:
        return
    bos, eos = added_bos(tokenizer), tokenizer.eos_token_id
    encoded = tokenizer(
        [d.texts[0].text for d in drafts],
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    for draft, encoding in zip(drafts, encoded.encodings, strict=True):
        text, before = draft.texts[0].text, 0 if bos is None else 1
        tokens = np.array([*[bos] * before, *encoding.ids, *([] if eos is None else [eos])], np.int32)
        if len(tokens) < 2:
            done.ledger.set_aside.append((draft.row.origin, "no trained token: the text is a single token"))
            continue
        pieces = [TokenSequence(piece, _all_but_first(len(piece))) for piece in split(tokens, limit)]
        done.ledger.split += len(pieces) > 1 and not draft.held_out
        sizes = _piece_bytes(text, encoding, before, len(pieces), limit)
        examples = [Example((p,), draft.row.origin, n) for p, n in zip(pieces, sizes, strict=True)]
        _place(draft, examples, len(tokens), done)


def _piece_bytes(text: str, encoding: Any, before: int, pieces: int, limit: int) -> list[int]:
    """UTF-8 bytes that each piece of a text trains; ``before`` tokens stand in front of the text's own."""

    def end_of(place: int) -> int:
        return encoding.offsets[place - before][1] if place >= before and encoding.ids else 0

    if pieces == 1 and before:
        return [len(text.encode("utf-8"))]
    cuts = [*(end_of(n * (limit - 1)) for n in range(pieces)), len(text)]
    return [len(text[start:stop].encode("utf-8")) for start, stop in pairwise(cuts)]


def split(tokens: np.ndarray, limit: int) -> list[np.ndarray]:
    """Consecutive pieces ``[<= limit]`` that overlap by one token: the last of one is what the next begins with."""
    return [tokens[at : at + limit] for at in range(0, max(len(tokens) - 1, 1), limit - 1)]


def _all_but_first(n: int) -> np.ndarray:
    weights = np.ones(n, np.float32)
    weights[:1] = 0
    return weights


def _finish_chats(drafts: list[_Draft], template: ChatTemplate, kind: Kind, limit: int, done: Prepared) -> None:
    """Conversations (one example of one or more sequences) and pairs (one example: chosen, rejected)."""
    if not drafts:
        return
    tokenised = iter(template.tokenize([r.text for d in drafts for r in d.texts]))
    for draft in drafts:
        tokens = list(islice(tokenised, len(draft.texts)))
        try:
            sequences = [template.weigh(r, t) for r, t in zip(draft.texts, tokens, strict=True)]
            if not all(s.trained_tokens for s in sequences):
                raise RowError("no trained token")
            if kind == "pair" and np.array_equal(sequences[0].tokens, sequences[1].tokens):
                raise RowError("chosen and rejected are the same once tokenised")
        except RowError as error:
            done.ledger.set_aside.append((draft.row.origin, str(error)))
            continue
        longest = max(len(s.tokens) for s in sequences)
        if longest > limit:
            done.ledger.over_long += 1
            done.ledger.over_long_at.append((draft.row.origin, longest))
            done.ledger.longest = max(done.ledger.longest, longest)
            continue
        size = 0 if kind == "pair" else sum(r.answer_bytes for r in draft.texts)
        _place(draft, [Example(tuple(sequences), draft.row.origin, size)], longest, done)


def _place(draft: _Draft, examples: list[Example], longest: int, done: Prepared) -> None:
    """Enter a finished row on its side."""
    ledger = done.ledger
    ledger.longest = max(ledger.longest, longest)
    if draft.held_out:
        ledger.held_out += 1
        done.held_out += examples
        return
    ledger.used += 1
    ledger.tokens += sum(len(s.tokens) for e in examples for s in e.sequences)
    ledger.trained_tokens += sum(e.trained_tokens for e in examples)
    done.examples += examples
