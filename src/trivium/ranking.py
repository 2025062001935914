"""Answers ranked by a reward model: rows with several answers to one prompt, or with answers drawn from a model, become
rows of preferences.

    ranked = list(rank(mixes, open_folder("runs/x/reward").model))          # trivium data rank ROWS --reward DIR
    ranked[0].pair()                    # {"prompt": [...], "chosen": "...", "rejected": "...", "scores": [2.1, -0.4]}

Cost: one pass over every answer, the prompts of answers to one of them computed once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from trivium.data.blocks import BadRow
from trivium.data.formats import Conversation, Message, Pair, Rating, RowError, Scored, mapped, parse
from trivium.data.misfit import ANSWERS
from trivium.data.rows import Mix, read_rows
from trivium.data.templates import chat_template
from trivium.errors import DataError
from trivium.evaluate.score import Proven, by_sequence, numbers, rewarded
from trivium.files import write_text
from trivium.forest import Example
from trivium.model.language_model import LanguageModel
from trivium.terminal import shown

TOGETHER = 64  # rows whose answers are drawn, and scored, side by side


class Sampler(Protocol):
    """Draws answers: as many as it is set to, for each prompt; or says why a prompt gets none."""

    def __call__(self, prompts: Sequence[list[Message]]) -> list[list[str] | str]: ...


@dataclass(frozen=True)
class Ranked:
    """One prompt, its answers, each a text or messages, and their rewards; the best first. ``before`` is the score that
    an answer had, where the row gave one."""

    origin: str
    prompt: list[Message]
    answers: list[Any]
    rewards: list[float]
    in_order: list[float]  # the rewards as the row has its answers
    before: list[float] | None = None
    tools: list[Any] | None = None

    def pair(self) -> dict[str, Any] | None:
        """The best answer and the worst one, as a row; None where nothing tells them apart."""
        if self.rewards[0] == self.rewards[-1] or self.answers[0] == self.answers[-1]:
            return None
        return {**self._asked(), "chosen": self.answers[0], "rejected": self.answers[-1],
                "scores": [self.rewards[0], self.rewards[-1]]}  # fmt: skip

    def every(self) -> dict[str, Any]:
        """All answers with their rewards, as a row."""
        return {**self._asked(), "answers": self.answers, "scores": self.rewards}

    def _asked(self) -> dict[str, Any]:
        return {"prompt": self.prompt, **({"tools": self.tools} if self.tools else {})}

    @property
    def agrees(self) -> bool | None:
        """Whether the best by reward is better by the row's own scores than the worst; None where these say nothing."""
        if self.before is None or len(self.before) < 2 or self.before[0] == self.before[-1]:
            return None
        return self.rewards[0] > self.rewards[-1] and self.before[0] > self.before[-1]


@dataclass(frozen=True)
class Unranked:
    """A row that cannot be ranked, and why."""

    origin: str
    reason: str


def rank(mixes: Iterable[Mix], reward: LanguageModel, sampler: Sampler | None = None) -> Iterator[Ranked | Unranked]:
    """Every row in order. With a ``sampler`` each row's prompt gets answers drawn from it instead of the row's own."""
    rows = (row for mix in mixes for row in _rows(mix, _answers_of if sampler is None else _prompt_of))
    reader = _Reader(reward)
    while some := list(islice(rows, TOGETHER)):
        good = [row for row in some if isinstance(row, _Asked)]
        if sampler and good:
            drawn = iter(sampler([row.prompt for row in good]))
            some = [_with(row, next(drawn)) if isinstance(row, _Asked) else row for row in some]
        yield from reader.ranked(some)


def write_ranked(
    mixes: Iterable[Mix], reward: LanguageModel, sampler: Sampler | None, out: Path, every: bool
) -> list[str]:
    """Write the ranked rows, whole or not at all; returns what is to be told. Raises DataError where there is none."""
    lines, told = [], Tally()
    for one in rank(mixes, reward, sampler):
        told.add(one)
        if isinstance(one, Ranked) and (row := one.every() if every else one.pair()) is not None:
            lines.append(json.dumps(row, ensure_ascii=False))
    if not lines:
        raise DataError(f"no row could be ranked: {told.line()}", "give rows with several answers, or --sample DIR")
    write_text(out, "".join(f"{line}\n" for line in lines))
    return [f"{len(lines):,} rows written to {shown(out)}", told.line()]


def scores(mixes: Iterable[Mix], reward: LanguageModel, tally: Tally) -> Iterator[dict[str, Any]]:
    """A line for each row, in order: its rewards in the row's own order, or why it has none."""
    rows = (row for mix in mixes for row in _rows(mix, _any_of))
    reader = _Reader(reward)
    while some := list(islice(rows, TOGETHER)):
        for one in reader.ranked(some):
            tally.add(one)
            if isinstance(one, Unranked):
                yield {"origin": one.origin, "reason": one.reason}
            else:
                given = one.in_order
                yield {"origin": one.origin, **({"reward": given[0]} if len(given) == 1 else {"rewards": given})}


def prompts_of(mixes: Iterable[Mix], most: int) -> list[list[Message]]:
    """The prompts of up to ``most`` rows of any kind, each once. Raises DataError where there is none."""
    found: dict[str, list[Message]] = {}
    reason = ""
    for row in (row for mix in mixes for row in _rows(mix, _prompt_of)):
        if isinstance(row, Unranked):
            reason = reason or f"{row.origin}: {row.reason}"
            continue
        found.setdefault(json.dumps(row.prompt, sort_keys=True, default=str), row.prompt)
        if len(found) == most:
            break
    if not found:
        what = f"no prompt to ask: {reason or 'no rows'}"
        raise DataError(what, "give rows with a prompt, messages or a conversation")
    return list(found.values())


@dataclass
class Tally:
    """What became of rows: how many have rewards, how many cannot be read, and of those that had an order already how
    many have it by reward too."""

    ranked: int = 0
    answers: int = 0
    agree: int = 0
    compared: int = 0
    alike: int = 0
    first_bad: Unranked | None = None
    bad: int = 0

    def add(self, one: Ranked | Unranked) -> None:
        if isinstance(one, Unranked):
            self.bad += 1
            self.first_bad = self.first_bad or one
            return
        self.ranked += 1
        self.answers += len(one.answers)
        self.alike += len(one.answers) > 1 and one.pair() is None
        if one.agrees is not None:
            self.compared += 1
            self.agree += one.agrees

    def line(self) -> str:
        """For a person."""
        told = [f"{self.answers:,} answers of {self.ranked:,} rows have a reward"]
        if self.compared:
            told.append(f"{self.agree / self.compared:.1%} of {self.compared:,} rows rank best and worst as they did")
        if self.alike:
            told.append(f"{self.alike:,} rows tell no answer from another")
        if self.bad and self.first_bad:
            first = f"{self.first_bad.origin}: {self.first_bad.reason}"
            told.append(f"{self.bad:,} rows not used (first {first})")
        return "; ".join(told)


@dataclass(frozen=True)
class _Asked:
    origin: str
    prompt: list[Message]
    answers: list[list[Message]]
    before: list[float] | None = None
    tools: list[Any] | None = None


def _rows(mix: Mix, read: Callable[[str, dict[str, Any]], _Asked]) -> Iterator[_Asked | Unranked]:
    for row in read_rows(mix.source):
        if isinstance(row, BadRow):
            yield Unranked(row.origin, row.reason)
            continue
        try:
            yield read(row.origin, mapped(row.value, mix.fields))
        except RowError as error:
            yield Unranked(row.origin, str(error))


def _prompt_of(origin: str, value: dict[str, Any]) -> _Asked:
    """The prompt of a row of any kind. Raises RowError."""
    for kind in ("pair", "rating", "conversation"):
        try:
            parsed = parse(value, kind)
        except RowError:
            continue
        if hasattr(parsed, "prompt"):
            return _Asked(origin, parsed.prompt, [])
        messages: list[Message] = parsed.messages  # type: ignore[union-attr]
        asking = [n for n, message in enumerate(messages, start=1) if message["role"] == "user"]
        if not asking:
            raise RowError("no user message asks for an answer")
        return _Asked(origin, messages[: asking[-1]], [])
    asked = parse(value, "prompt")
    return _Asked(origin, asked.messages, [])  # type: ignore[union-attr]


def _answers_of(origin: str, value: dict[str, Any]) -> _Asked:
    """A pair's answers, or a list's, with scores or without. Raises RowError."""
    listed = next((f for f in ANSWERS if isinstance(value.get(f), list)), None)
    try:
        parsed = parse(value, "pair")
    except RowError:
        if listed is None:
            raise
        unscored = {**value, "scores": list(range(len(value[listed])))}
        parsed = parse(unscored, "pair")
        assert isinstance(parsed, Scored)
        return _Asked(origin, parsed.prompt, parsed.answers, None, parsed.tools)
    if isinstance(parsed, Pair):
        return _Asked(origin, parsed.prompt, [parsed.chosen, parsed.rejected], [1.0, 0.0], parsed.tools)
    assert isinstance(parsed, Scored)
    return _Asked(origin, parsed.prompt, parsed.answers, parsed.scores, parsed.tools)


def _any_of(origin: str, value: dict[str, Any]) -> _Asked:
    """What can be scored of a row: a rating's answer, a conversation's last one, or the answers of a list. Raises
    RowError."""
    for kind in ("rating", "conversation"):
        try:
            parsed = parse(value, kind)
        except RowError:
            continue
        if isinstance(parsed, Rating):
            return _Asked(origin, parsed.prompt, [parsed.answer], None, parsed.tools)
        if isinstance(parsed, Conversation):
            last = max(n for n, message in enumerate(parsed.messages) if message["role"] == "assistant")
            return _Asked(origin, parsed.messages[:last], [parsed.messages[last : last + 1]], None, parsed.tools)
    return _answers_of(origin, value)


class _Reader:
    """A reward model that reads block after block of rows."""

    def __init__(self, reward: LanguageModel) -> None:
        self.reward, self.template, self.proven = reward, chat_template(reward.tokenizer), Proven()

    def ranked(self, rows: Sequence[_Asked | Unranked]) -> list[Ranked | Unranked]:
        """Answers in order of their rewards; rows that the reward model cannot read are said to be so."""
        read = [self._read(row) for row in rows]
        examples = [one[1] for one in read if not isinstance(one, Unranked)]
        found = iter(numbers(by_sequence(self.reward, examples, self.proven)))
        return [one if isinstance(one, Unranked) else _sorted(one[0], next(found)) for one in read]

    def _read(self, row: _Asked | Unranked) -> tuple[_Asked, Example] | Unranked:
        """A row with all its answers behind their prompt."""
        if isinstance(row, Unranked):
            return row
        try:
            told = ([*row.prompt, *one] for one in row.answers)
            return row, Example(tuple(rewarded(self.reward, one, row.tools, self.template) for one in told))
        except DataError as error:
            return Unranked(row.origin, error.what)


def _sorted(row: _Asked, rewards: list[float]) -> Ranked:
    order = sorted(range(len(rewards)), key=lambda n: -rewards[n])
    before = None if row.before is None else [row.before[n] for n in order]
    answers = [_plain(row.answers[n]) for n in order]
    return Ranked(row.origin, row.prompt, answers, [rewards[n] for n in order], rewards, before, row.tools)


def _with(row: _Asked, texts: list[str] | str) -> _Asked | Unranked:
    """A row with the answers that were drawn for it; empty ones are none."""
    if isinstance(texts, str):
        return Unranked(row.origin, texts)
    answers: list[list[Message]] = [[{"role": "assistant", "content": text}] for text in texts if text.strip()]
    return _Asked(row.origin, row.prompt, answers) if answers else Unranked(row.origin, "every answer drawn is empty")


def _plain(answer: list[Message]) -> Any:
    """An answer of one plain message as its text."""
    return answer[0]["content"] if len(answer) == 1 and len(answer[0]) == 2 else answer
