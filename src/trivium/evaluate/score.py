"""The log-probability of answers, each under an adapter of its own if it names one: one pass serves many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from trivium.forest import Example, lay_out
from trivium.model.language_model import LanguageModel
from trivium.model.proof import prove

PASS_TOKENS = 2048  # in one pass


def scored(model: LanguageModel, examples: Sequence[Example], adapters: Sequence[str | None] = ()) -> list[float]:
    """The sum over each example's trained tokens, in nats; ``adapters`` name one for each (None: the base).

    Raises ModelError for a model whose layouts disagree.
    """
    if not examples:
        return []
    ranked = sorted(range(len(examples)), key=lambda n: examples[n].tokens)
    layout = prove(model, [examples[n] for n in {ranked[0], ranked[-1]}]).layout
    named = [replace(e, adapter=a) for e, a in zip(examples, adapters, strict=True)] if adapters else list(examples)
    found = [0.0] * len(named)
    group: list[int] = []
    with torch.no_grad(), model.laid_out(layout):
        for place, number in enumerate(ranked):
            group.append(number)
            following = named[ranked[place + 1]].tokens if place + 1 < len(ranked) else PASS_TOKENS
            if sum(named[n].tokens for n in group) + following > PASS_TOKENS:
                forest = lay_out(named[n] for n in group).to(model.device)
                parts = model.logprob(forest).split([named[n].trained_tokens for n in group])
                for n, part in zip(group, parts, strict=True):
                    found[n] = float(part.sum())
                group = []
    return found
