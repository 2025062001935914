"""KTO: learning from answers that people found good or bad, each by itself (Ethayarajh et al. 2024).

What an answer gained on the parent is compared with what any answer gains, z0, an estimate of the KL divergence: the
mean gain of answers to other prompts, over the whole step, whatever its micro-batches and its share of good answers.
Every rated answer gives one such: its prompt with an answer to the prompt before it in the step.

Shapes:  K entries,  S sequences (rated answers).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from trivium.forest import Example, Forest, TokenSequence
from trivium.objectives.base import FirstPass, Objective, Result, per_sequence


def kto_loss(
    gain: Tensor, good: Tensor, baseline: float, beta: float, desirable_weight: float, undesirable_weight: float
) -> Tensor:
    """``[S]`` losses, eq. 7 and 8: at the start half the answer's weight.

    ``gain``: log pi(y|x) - log pi_ref(y|x), summed over the answer; ``good``: whether it was rated so; ``baseline``:
    z0, at least 0.
    """
    lost = torch.where(good, torch.sigmoid(beta * (baseline - gain)), torch.sigmoid(beta * (gain - baseline)))
    return torch.where(good, desirable_weight, undesirable_weight) * lost


def kto(settings: Mapping[str, Any]) -> Objective:
    """The objective; every rated answer weighs 1, or its row's weight."""
    return _kto(settings, 0.0)


def _kto(settings: Mapping[str, Any], baseline: float) -> Objective:
    named = {k: settings[k] for k in ("beta", "desirable_weight", "undesirable_weight")}

    def compute(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        assert reference is not None, "kto compares with the parent"
        good, weight = _rated(forest)
        gain = per_sequence(forest.weight * (logprob - reference), forest)
        loss = (weight * kto_loss(gain, good, baseline, **named)).sum()
        with torch.no_grad():
            own = per_sequence(forest.weight * logprob, forest)
            stats, weights = _stats(named["beta"] * gain, own, good, weight, named["beta"] * baseline, forest)
        return Result(loss, {"loss": loss.detach(), **stats}, weights)

    def total(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Tensor:
        assert reference is not None, "kto compares with the parent"
        return (forest.weight * (logprob - reference)).sum()

    first = FirstPass(mismatched, total, lambda mean: _kto(settings, max(0.0, mean)))
    told = "".join(f", {k}={v:g}" for k, v in named.items() if k != "beta" and v != 1)
    even = named["desirable_weight"] == named["undesirable_weight"]
    return Objective(
        f"kto(beta={named['beta']:g}{told})",
        compute,
        lambda forest: float(sum(e.weight * len(e.scores) for e in forest.examples)),
        needs_reference=True,
        at_start=0.5 * named["desirable_weight"] if even else 0.0,
        at_start_of="loss" if even else "margin",  # what uneven weights begin with, the rows say
        first=first,
    )


def mismatched(examples: Sequence[Example]) -> list[Example]:
    """Each rated answer's prompt with an answer to the prompt of the example before it; none where it is alone.

    None is longer than the longest that was rated, so that it fits the model.
    """
    if len(examples) < 2:
        return []
    longest = max(len(s.tokens) for e in examples for s in e.sequences)
    found = []
    for number, example in enumerate(examples):
        other = examples[number - 1]
        pairs = [(s, other.sequences[n % len(other.sequences)]) for n, s in enumerate(example.sequences)]
        key = ("mismatched", example.identity, other.identity, longest)
        found.append(Example(tuple(_answered(s, o, longest) for s, o in pairs), example.origin, key=key))
    return found


def _answered(asked: TokenSequence, other: TokenSequence, longest: int) -> TokenSequence:
    """The prompt of one with the answer of another."""
    start, begin = (int(np.flatnonzero(s.weights)[0]) for s in (asked, other))
    tokens = np.concatenate([asked.tokens[:start], other.tokens[begin:]])[:longest]
    weights = np.concatenate([asked.weights[:start], other.weights[begin:]])[:longest]
    return TokenSequence(tokens, weights)


def _rated(forest: Forest) -> tuple[Tensor, Tensor]:
    """Of every answer whether it is good, and its weight: ``[S]`` each."""
    to = partial(torch.tensor, device=forest.tokens.device)
    scores, weights = [[x for e in forest.examples for x in of(e)] for of in (lambda e: e.scores, _weights)]
    return to(scores, dtype=torch.float32) > 0, to(weights, dtype=torch.float32)


def _weights(example: Example) -> list[float]:
    return [example.weight] * len(example.scores)


def _stats(
    reward: Tensor, own: Tensor, good: Tensor, weight: Tensor, baseline: float, forest: Forest
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """What happened to good and bad answers, each kind on its own weight. A row that has both is a pair: what is right
    there is their order; of the others, on which side of the baseline they are."""
    sides = {"chosen": weight * good, "rejected": weight * ~good}
    stats = {f"{what}_{side}": (share * value).sum() for side, share in sides.items()
             for what, value in (("reward", reward), ("logprob", own))}  # fmt: skip
    weights = {f"{what}_{side}": float(share.sum()) for side, share in sides.items() for what in ("reward", "logprob")}
    right: list[Tensor] = []
    worth: list[float] = []
    margins: list[Tensor] = []
    first = 0
    for example in forest.examples:
        mine = reward[first : first + len(example.scores)]
        wins = [mine[a] - mine[b] for a, b in example.pairs]
        if not wins:
            wins = [x - baseline if score > 0 else baseline - x for x, score in zip(mine, example.scores, strict=True)]
        right += [(w > 0).float() + 0.5 * (w == 0).float() for w in wins]
        margins += wins
        worth += [example.weight] * len(wins)
        first += len(example.scores)
    each = torch.tensor(worth, device=reward.device)
    stats |= {"accuracy": (each * torch.stack(right)).sum(), "margin": (each * torch.stack(margins)).sum(),
              "baseline": torch.tensor(baseline, device=reward.device) * each.sum()}  # fmt: skip
    return stats, weights | dict.fromkeys(("accuracy", "margin", "baseline"), float(each.sum()))
