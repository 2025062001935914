"""What every model of a run is asked, so that they can be laid side by side: prompts to answer, a text to be read.

    exam = Exam(prompts, texts)
    exam.take(Talker.open(folder))      # {"answers": [...], "bits_per_byte": ...}

Rows that are asked are rows that nothing trains on, where the data has such. Cost: `ANSWER_TOKENS` per prompt, the
prompts side by side, and one pass over `TEXT_BYTES` of text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from trivium.data.examples import digest_of, held_out_below
from trivium.data.formats import Conversation, Kind, Message, Pair, Prompt, Rating, RowError, Scored, parse
from trivium.data.prepare import prepare
from trivium.data.rows import Listed, Mix, Source, good_rows, texts_of
from trivium.errors import DataError, ModelError
from trivium.evaluate.held_out import evaluate
from trivium.forest import lay_out
from trivium.objectives import objective
from trivium.talk import Talker

ANSWER_TOKENS = 160
TEXT_BYTES = 50_000  # of text to be measured on, at most
PROMPTS = 3  # taken from the data where a recipe names none,
LOOKED_AT = 50  # out of so many rows
READABLE = 700  # characters: a longer prompt is passed over, if there are shorter ones
BEGINNING = 60  # characters of a text that a model is asked to continue


@dataclass(frozen=True)
class Exam:
    """``prompts``: conversations that want an answer, or beginnings of texts to be continued; ``texts`` to be read."""

    prompts: tuple[tuple[Message, ...] | str, ...] = ()
    texts: tuple[str, ...] = ()

    def take(self, talker: Talker) -> dict[str, Any]:
        """The answers (None where a prompt does not fit the model), and bits per byte of the texts (None: no text)."""
        found: list[str | None] = [None] * len(self.prompts)
        ids = {n: _tokens(talker, prompt) for n, prompt in enumerate(self.prompts)}
        fitting = {n: i for n, i in ids.items() if i and len(i) < talker.model.context}
        for n, answer in zip(fitting, talker.answers_to(list(fitting.values()), ANSWER_TOKENS), strict=True):
            found[n] = answer
        return {"answers": found, "bits_per_byte": self._bits_per_byte(talker) if self.texts else None}

    def _bits_per_byte(self, talker: Talker) -> float | None:
        model = talker.model
        try:
            read = prepare(
                Listed([{"text": t} for t in self.texts]), kind="text", tokenizer=model.tokenizer, context=model.context
            )
        except DataError:  # no text with a token to predict
            return None
        forests = (lay_out([e]).to(model.device) for e in read.examples)
        with model.laid_out("single"):  # no packing, so nothing to prove
            found = evaluate(objective({"loss": "next_token"}), model.logprob, lambda _: None, forests)
        return found.get("bits_per_byte")

    def shown(self) -> list[str]:
        """The prompts for a person."""
        return [p if isinstance(p, str) else "\n".join(_said(m, len(p) > 1) for m in p) for p in self.prompts]


def _said(message: Message, several: bool) -> str:
    text = str(message.get("content") or "")
    return f"{message['role']}: {text}" if several else text


def _tokens(talker: Talker, prompt: tuple[Message, ...] | str) -> list[int] | None:
    if isinstance(prompt, str):
        return talker.raw_prompt(prompt)
    try:
        return talker.prompt(list(prompt))
    except (RowError, ModelError):  # a template may refuse, say, a system message
        return None


def prompts_from(sources: Sequence[Mix], kind: Kind, held_out: float | None, most: int = PROMPTS) -> tuple[Any, ...]:
    """Up to ``most`` prompts out of the data: those of held-out rows (share ``held_out``; None: any row)."""
    found: list[Any] = []
    for value in islice(good_rows(sources, _asked(held_out)), max(LOOKED_AT, 2 * most)):
        try:
            row = parse(value, kind)
        except RowError:
            continue
        if isinstance(row, (Pair, Scored, Rating)):
            found.append(tuple(row.prompt))
        elif isinstance(row, Conversation):
            turns = [m["role"] for m in row.messages]
            if "assistant" in turns:
                found.append(tuple(row.messages[: turns.index("assistant")]))
        elif isinstance(row, Prompt):
            found.append(tuple(row.messages))
        else:
            start = row.text[:BEGINNING].rsplit(" ", 1)[0] if len(row.text) > BEGINNING else row.text
            found.append(start)
    found = [p for p in found if p]
    readable = [p for p in found if len(str(p if isinstance(p, str) else p[-1].get("content"))) <= READABLE]
    different = {repr(p): p for p in readable or found}
    return tuple(different.values())[:most]


def texts_from(sources: Sequence[Source | Mix], held_out: float | None) -> tuple[str, ...]:
    """Texts of the data's rows up to ``TEXT_BYTES``: held-out rows (share ``held_out``; None: any row)."""
    found: list[str] = []
    room = TEXT_BYTES
    for text in texts_of(sources, _asked(held_out)):
        if text.strip():
            found.append(text[:room])
            room -= len(text.encode("utf-8"))
        if room <= 0:
            break
    return tuple(found)


def _asked(held_out: float | None) -> Callable[[dict[str, Any]], bool]:
    """Whether a row may be asked: any, or only those that are held out."""
    return lambda value: held_out is None or digest_of(value) < held_out_below(held_out)
