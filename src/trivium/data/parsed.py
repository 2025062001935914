"""What rows become, whatever their format: texts, conversations, answers to one prompt that are compared or rated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from trivium.data.messages import Message, alike
from trivium.data.misfit import RowError

Pairs = Literal["best_worst", "all"]


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages ``{"role", "content", ...}`` of which at least one is the assistant's; tools as the row gave them."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """One prompt and two different answers to it, each a list of messages that begins with the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None
    weight: float = 1.0
    margin: float = 0.0

    def answers_by_score(self, how: Pairs = "best_worst") -> list[tuple[list[Message], float]]:
        """The better answer and the worse one, with scores that tell them apart."""
        return [(self.chosen, 1.0), (self.rejected, -1.0)]


@dataclass(frozen=True)
class Scored:
    """One prompt and two or more answers to it, with a finite score each; a higher score is a better answer."""

    prompt: list[Message]
    answers: list[list[Message]]
    scores: list[float]
    tools: list[Any] | None = None
    weight: float = 1.0
    margin: float = 0.0

    def answers_by_score(self, how: Pairs = "best_worst") -> list[tuple[list[Message], float]]:
        """The two answers that are furthest apart, with 1 and -1; or ``all``, the best first, with their own scores.

        Raises RowError where no two answers differ in text and score.
        """
        n = range(len(self.scores))
        found = [(i, j) for i in n for j in n if self.scores[i] > self.scores[j]]
        if not found:
            raise RowError("all answers have the same score")
        found = [(i, j) for i, j in found if not alike(self.answers[i], self.answers[j])]
        if not found:
            raise RowError("answers with different scores are the same text")
        if how == "all":
            ranked = sorted(n, key=lambda i: -self.scores[i])
            return [(self.answers[i], self.scores[i]) for i in ranked]
        best, worst = min(found, key=lambda ij: self.scores[ij[1]] - self.scores[ij[0]])
        return [(self.answers[best], 1.0), (self.answers[worst], -1.0)]


@dataclass(frozen=True)
class Rating:
    """One prompt, one answer to it, and whether a person found it good."""

    prompt: list[Message]
    answer: list[Message]
    good: bool
    tools: list[Any] | None = None
    weight: float = 1.0
    margin: float = 0.0

    def answers_by_score(self, how: Pairs = "best_worst") -> list[tuple[list[Message], float]]:
        """The answer, with 1 or -1."""
        return [(self.answer, 1.0 if self.good else -1.0)]


@dataclass(frozen=True)
class Prompt:
    """Messages that want an answer."""

    messages: list[Message]
    tools: list[Any] | None = None


Preference = Pair | Scored | Rating
Parsed = Text | Conversation | Pair | Scored | Rating | Prompt
