"""What preference tuning did to a model: its answers against its parent's, on prompts that neither was trained on.

    found = against(lambda: Talker.open(new), lambda: Talker.open(parent), prompts, prefers=by_reward(...))
    print(found.line())         # 31% of greedy answers unchanged, 58 -> 71 tokens, KL 0.041 per token; won 61% ...

One model is in memory at a time. Cost: a greedy answer of each model to every prompt, one drawn one of the new model,
and a pass over these with either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from trivium.data.formats import Message, RowError
from trivium.errors import ModelError
from trivium.evaluate.score import per_entry
from trivium.evaluate.win_rate import Duel, Preference, WinRate, win_rate
from trivium.forest import Example, TokenSequence
from trivium.talk import Talker

ANSWER_TOKENS = 96  # of an answer, at most


@dataclass(frozen=True)
class Against:
    """``unchanged``: the share of greedy answers that are the same; ``tokens``: of the parent's answers and the new
    ones, on average; ``kl``: of the new model from its parent per token, in nats; ``duels``: every prompt with both
    answers, and ``won`` what a judge said of them, if one was asked."""

    unchanged: float
    tokens: tuple[float, float]
    kl: float
    duels: tuple[Duel, ...]
    won: WinRate | None = None

    def as_dict(self) -> dict[str, Any]:
        """All of it, as JSON can hold it."""
        return asdict(self)

    def line(self) -> str:
        """For a person."""
        before, after = self.tokens
        told = [
            f"{self.unchanged:.0%} of {len(self.duels)} greedy answers unchanged, "
            f"{before:.0f} → {after:.0f} tokens long, KL {self.kl:.3f} nats per token",
            *([self.won.line()] if self.won else []),
        ]
        return "; ".join(told)


def against(
    new: Callable[[], Talker],
    parent: Callable[[], Talker],
    prompts: Sequence[Sequence[Message]],
    prefers: Preference | None = None,
    most: int = ANSWER_TOKENS,
    seed: int = 0,
) -> Against | None:
    """Open, ask and let go of one model after the other. None where no prompt fits both of them, read alike.

    Raises ModelError, and whatever UserError ``prefers`` raises.
    """
    talker = new()
    asked = {n: ids for n, prompt in enumerate(prompts) if (ids := _fitting(talker, prompt, most)) is not None}
    drawn = talker.ids_after(list(asked.values()), most, temperature=1.0, seed=seed)
    answers = dict(zip(asked, talker.ids_after(list(asked.values()), most), strict=True))
    stop = talker.template.stop_id
    ended = [ids if len(ids) == most else [*ids, stop] for ids in drawn]  # to end there is the model's choice, too
    examples = {n: _answered(asked[n], ids) for n, ids in zip(asked, ended, strict=True)}
    ours = dict(zip(asked, per_entry(talker.model, list(examples.values())), strict=True))
    texts = dict(zip(asked, talker.texts(list(answers.values())), strict=True))
    del talker
    other = parent()
    same = [n for n in asked if _fitting(other, prompts[n], most) == asked[n]]
    same = [n for n in same if examples[n].sequences[0].tokens.max() < other.model.config.vocab_size]
    if not same:
        return None
    before = other.ids_after([asked[n] for n in same], most)
    theirs = per_entry(other.model, [examples[n] for n in same])
    duels = tuple(Duel(tuple(prompts[n]), texts[n], old) for n, old in zip(same, other.texts(before), strict=True))
    del other
    return Against(
        unchanged=sum(answers[n] == ids for n, ids in zip(same, before, strict=True)) / len(same),
        tokens=(float(np.mean([len(ids) for ids in before])), float(np.mean([len(answers[n]) for n in same]))),
        kl=kl_per_token([ours[n] for n in same], theirs),
        duels=duels,
        won=win_rate(duels, prefers) if prefers is not None else None,
    )


def kl_per_token(ours: Sequence[torch.Tensor], parents: Sequence[torch.Tensor]) -> float:
    """KL(ours || parent) from log-probabilities of tokens that were drawn from ours: (r - 1) - log r, where r is the
    parent's probability over ours; unbiased and never negative (Schulman 2020, "Approximating KL divergence").
    """
    if not ours:
        return 0.0
    log_ratio = torch.cat([p.double() - o.double() for o, p in zip(ours, parents, strict=True)])
    return float((torch.expm1(log_ratio) - log_ratio).mean())


def _fitting(talker: Talker, prompt: Sequence[Message], most: int) -> list[int] | None:
    """The prompt's tokens, where the model has room for it and an answer."""
    try:
        ids = talker.prompt([dict(m) for m in prompt])
    except (RowError, ModelError):  # a template may refuse, say, a system message
        return None
    return ids if len(ids) + most <= talker.model.context else None


def _answered(prompt: list[int], answer: list[int]) -> Example:
    tokens = np.array([*prompt, *answer])
    return Example((TokenSequence(tokens, (np.arange(len(tokens)) >= len(prompt)).astype(np.float32)),))
