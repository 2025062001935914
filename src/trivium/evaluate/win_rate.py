"""How often a model's answer is preferred to its parent's on the same prompts.

    duels = [Duel(prompt, new, old) for prompt, new, old in zip(prompts, answers, parents_answers)]
    win_rate(duels, by_program(check)).line()     # won 61% (52%-69%) of 120: 60 won, 26 ties, 34 lost

Who prefers is a value that is handed in: a reward model (``by_reward``), a program (``by_program``), or another model
behind an endpoint (``evaluate.endpoint.by_endpoint``). It is asked about all duels at once, so that it can work on them
side by side. A model that answers just as its parent did is not asked about: that is a tie, whatever a judge would say.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from trivium.data.messages import Message
from trivium.errors import DataError, ModelError

Verdict = float  # of one duel, one of
NEW, TIE, OLD = 1.0, 0.5, 0.0


@dataclass(frozen=True)
class Duel:
    """Two answers to one conversation: the model's (``new``) and its parent's (``old``)."""

    prompt: tuple[Message, ...]
    new: str
    old: str


Preference = Callable[[Sequence[Duel]], list[Verdict]]  # a verdict for each duel, in order
Rewards = Callable[[Sequence[tuple[Message, ...]]], list[float]]  # of whole conversations, a number for each
Check = Callable[[Sequence[Message], str], float]  # of a prompt and an answer to it


@dataclass(frozen=True)
class WinRate:
    """``share`` = (wins + ties / 2) / of, and the 95% interval that it rests on; ``verdicts`` in the duels' order.

    The interval is Wilson's for as many wins and losses. Ties vary less than those do, so with ties it is too wide
    rather than too narrow.
    """

    share: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    of: int
    verdicts: list[Verdict]

    @classmethod
    def counted(cls, verdicts: list[Verdict]) -> WinRate:
        """From the verdict of each duel, one at least."""
        from trivium.evaluate.judge import interval

        wins, ties, of = verdicts.count(NEW), verdicts.count(TIE), len(verdicts)
        low, high = interval(wins + ties / 2, of)
        return cls((wins + ties / 2) / of, low, high, wins, ties, of - wins - ties, of, verdicts)

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)

    def line(self) -> str:
        """For a person: ``won 61% (52%-69%) of 120: 60 won, 26 ties, 34 lost``."""
        ties = f"{self.ties} tie{'' if self.ties == 1 else 's'}"
        share = f"{self.share:.0%} ({self.low:.0%}-{self.high:.0%})"
        return f"won {share} of {self.of}: {self.wins} won, {ties}, {self.losses} lost"


def win_rate(duels: Sequence[Duel], prefers: Preference) -> WinRate:
    """Asks ``prefers`` once, about all duels whose answers differ; not at all if none do.

    Raises DataError where there are no duels, and whatever UserError ``prefers`` raises.
    """
    if not duels:
        raise DataError("there is nothing to compare: no prompt was answered by both", "give prompts to answer")
    differ = [duel for duel in duels if duel.new != duel.old]
    said = prefers(differ) if differ else []
    assert len(said) == len(differ), f"{len(differ)} duels got {len(said)} verdicts"
    assert all(v in (NEW, TIE, OLD) for v in said), f"a verdict is {NEW}, {TIE} or {OLD}: got {said}"
    following = iter(said)
    return WinRate.counted([TIE if duel.new == duel.old else next(following) for duel in duels])


def by_reward(rewards: Rewards) -> Preference:
    """The answer whose conversation gets the higher reward; equal ones tie. One call of ``rewards`` for all.

    The two answers to a prompt stand side by side in that call, so that what they share need be read only once.
    Raises ModelError for a reward that is not a number.
    """

    def prefers(duels: Sequence[Duel]) -> list[Verdict]:
        read = [_answered(duel.prompt, answer) for duel in duels for answer in (duel.new, duel.old)]
        found = rewards(read)
        assert len(found) == len(read), f"{len(read)} conversations got {len(found)} rewards"
        return [_higher(new, old) for new, old in zip(found[::2], found[1::2], strict=True)]

    return prefers


def by_program(check: Check) -> Preference:
    """The answer for which ``check(prompt, answer)`` gives the higher number; equal ones tie.

    Raises ModelError for one that is not a number.
    """

    def prefers(duels: Sequence[Duel]) -> list[Verdict]:
        return [_higher(check(duel.prompt, duel.new), check(duel.prompt, duel.old)) for duel in duels]

    return prefers


def _answered(prompt: tuple[Message, ...], answer: str) -> tuple[Message, ...]:
    return (*prompt, {"role": "assistant", "content": answer})


def _higher(new: float, old: float) -> Verdict:
    if math.isnan(new) or math.isnan(old):  # would pass for a tie
        raise ModelError("what judges the answers gave one that is not a number (nan)", "mend that check or model")
    return NEW if new > old else OLD if new < old else TIE
