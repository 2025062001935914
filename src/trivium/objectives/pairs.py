"""Objectives over pairs of answers: from per-token log-probabilities to what the losses are functions of, and back.

    goal = pairwise({"loss": "dpo", "beta": 0.1})
    goal.compute(logprob, forest, reference)      # a Result: its sum, and what happened to the answers

A row of two answers is one pair; of a list of k scored answers every better one is compared with every worse one, each
computed once. A row weighs 1 (or its own weight), however many pairs it has, as in InstructGPT (Ouyang et al. 2022,
eq. 1). Losses are in `preference.py` and `reference_free.py`: they ask for what they need by their parameters' names.

Shapes:  K entries,  S sequences,  N pairs.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from trivium.forest import Forest
from trivium.objectives import OBJECTIVES, shares
from trivium.objectives.base import Objective, Result, per_sequence
from trivium.objectives.divergence import DIVERGENCES


@dataclass(frozen=True, eq=False)
class Pairs:
    """Which sequences are compared, ``[N]`` each: the better, the worse, the pair's weight and margin."""

    chosen: Tensor
    rejected: Tensor
    weight: Tensor
    margin: Tensor

    @classmethod
    def of(cls, forest: Forest) -> Pairs:
        """The pairs of a batch, in order; a row's weight is shared out among its own."""
        found: list[tuple[int, int, float, float]] = []
        first = 0
        for example in forest.examples:
            pairs = example.pairs
            found += [(first + a, first + b, example.weight / len(pairs), example.margin) for a, b in pairs]
            first += len(example.sequences)
        chosen, rejected, weight, margin = zip(*found, strict=True) if found else ((), (), (), ())
        to = partial(torch.tensor, device=forest.tokens.device)
        numbers = (to(n, dtype=torch.long) for n in (chosen, rejected))
        return cls(*numbers, *(to(n, dtype=torch.float32) for n in (weight, margin)))


def pair_weight(forest: Forest) -> float:
    """What the rows of a batch weigh: 1 each, or their own weight."""
    return float(sum(e.weight for e in forest.examples if e.pairs))


def sft_loss(logprob: Tensor, weight: Tensor) -> Tensor:
    """``[N]``: minus the chosen answer's log-probability per token (Pang et al. 2024, iterative RPO, eq. 1, last term).

    ``logprob``, ``weight`` ``[N]``: summed over the chosen answer's tokens.
    """
    return -logprob / weight


def pair_sums(values: Tensor, forest: Forest, pairs: Pairs, ld_alpha: float | None) -> tuple[Tensor, Tensor]:
    """``values [K]`` summed over the chosen and over the rejected answers, ``[N]`` each.

    With ``ld_alpha`` what the longer answer has beyond the length of the shorter counts that much: LD-DPO, Liu et al.
    2024.
    """
    if ld_alpha is None:
        sums = per_sequence(values, forest)
        return sums[pairs.chosen], sums[pairs.rejected]
    count = torch.bincount(forest.sequence, minlength=forest.sequences)
    begins = count.cumsum(0) - count
    shared = torch.minimum(count[pairs.chosen], count[pairs.rejected])

    def one(sequence: Tensor) -> Tensor:
        length = count[sequence]
        owner = torch.repeat_interleave(torch.arange(len(sequence), device=length.device), length)
        place = torch.arange(len(owner), device=length.device) - (length.cumsum(0) - length)[owner]
        factor = torch.where(place < shared[owner], 1.0, float(ld_alpha))
        return torch.zeros_like(length, dtype=values.dtype).index_add(
            0, owner, factor * values[begins[sequence][owner] + place]
        )

    return one(pairs.chosen), one(pairs.rejected)


def pairwise(settings: Mapping[str, Any]) -> Objective:
    """The objective of one loss of pairs, or of several by weight: ``settings`` as in a recipe's stage.

    Before the first step a loss against the parent has the value it has for gains of 0.
    """
    mixed = shares(settings["loss"])
    losses = {name: _function(name) for name in mixed}
    relative = any(OBJECTIVES[name].relative for name in mixed)
    sft_weight = settings.get("sft_weight") or 0.0

    def compute(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        assert reference is not None or not relative, f"{', '.join(mixed)} compares with the parent"
        pairs = Pairs.of(forest)
        known = _known(logprob, forest, reference if relative else None, pairs, settings)
        each = sum((share * _called(losses[name], known, settings) for name, share in mixed.items()), torch.zeros(()))
        preference = (pairs.weight * each).sum()
        total, more = preference, {}
        own = pair_sums(forest.weight * logprob, forest, pairs, None)
        if sft_weight:
            sft = (pairs.weight * sft_loss(own[0], known["chosen_tokens"])).sum()
            total = preference + sft_weight * sft
            more = {"preference_loss": preference.detach(), "sft_loss": sft.detach()}
        with torch.no_grad():
            stats = _stats({**known, "own": own}, pairs, settings, next(iter(losses.values())))
            stats = {"loss": total.detach(), **more, **stats}
        return Result(total, stats)

    of, start = "preference_loss" if sft_weight else "loss", None
    if all(OBJECTIVES[name].relative for name in mixed):
        start = _at_start(losses, mixed, settings)
    elif relative:  # what a loss beside it begins with, the model says
        of, start = "margin", 0.0
    margins = any("margin" in inspect.signature(loss).parameters for loss in losses.values())
    return Objective(_title(settings, mixed), compute, pair_weight, relative, start, of, margins=margins)


def _function(name: str) -> Callable[..., Tensor]:
    module, function = OBJECTIVES[name].function.split(":")
    found: Callable[..., Tensor] = getattr(importlib.import_module(module), function)
    return found


def _known(
    logprob: Tensor, forest: Forest, reference: Tensor | None, pairs: Pairs, settings: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Everything that a loss may ask for by name, ``[N]`` each; gains only where there is a ``reference``."""
    sums = partial(pair_sums, forest=forest, pairs=pairs, ld_alpha=settings.get("ld_alpha"))
    names = ("chosen", "rejected")
    tokens = per_sequence(forest.weight, forest)
    known = {"margin": pairs.margin, "chosen_tokens": tokens[pairs.chosen], "rejected_tokens": tokens[pairs.rejected]}
    known |= dict(zip([f"{n}_logprob" for n in names], sums(forest.weight * logprob), strict=True))
    if reference is not None:
        diverge = DIVERGENCES[settings.get("divergence") or "reverse_kl"]
        gains = sums(forest.weight * (logprob - reference))
        alpha = settings.get("divergence_alpha") or 0.0
        known |= {n: diverge(gain, alpha) for n, gain in zip(names, gains, strict=True)}
        known |= {f"{n}_gain": gain for n, gain in zip(names, gains, strict=True)}
    return known


def _called(loss: Callable[..., Tensor], known: Mapping[str, Tensor], settings: Mapping[str, Any]) -> Tensor:
    """A loss given what its parameters name."""
    named = inspect.signature(loss).parameters
    return loss(**{n: known[n] if n in known else settings[n] for n in named})


def _stats(
    known: Mapping[str, Any], pairs: Pairs, settings: Mapping[str, Any], loss: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """What happened to the answers. Rewards are the loss's own: ``beta`` times the gain on the parent, or the
    log-probability where it needs no parent; per token where it compares these."""
    kind = "gain" if "chosen_gain" in known else "logprob"
    rewards = [known[f"{n}_{kind}"] for n in ("chosen", "rejected")]
    if "chosen_tokens" in inspect.signature(loss).parameters:
        rewards = [r / known[f"{n}_tokens"] for n, r in zip(("chosen", "rejected"), rewards, strict=True)]
    chosen, rejected = (settings["beta"] * r for r in rewards)
    won = chosen - rejected
    found = {
        # a tie is half a success: what guessing would give
        "accuracy": (won > 0).float() + 0.5 * (won == 0).float(),
        "margin": won,
        "reward_chosen": chosen,
        "reward_rejected": rejected,
        "logprob_chosen": known["own"][0],
        "logprob_rejected": known["own"][1],
    }
    return {name: (pairs.weight * value.detach()).sum() for name, value in found.items()}


def _at_start(
    losses: Mapping[str, Callable[..., Tensor]], mixed: Mapping[str, float], settings: Mapping[str, Any]
) -> float:
    """The loss where nothing has been gained yet."""
    nothing, one = torch.zeros(1, dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    known = dict.fromkeys(("chosen", "rejected", "margin"), nothing)
    known |= dict.fromkeys(("chosen_tokens", "rejected_tokens"), one)
    return float(sum(share * _called(losses[name], known, settings) for name, share in mixed.items()))


def _title(settings: Mapping[str, Any], mixed: Mapping[str, float]) -> str:
    """How messages call it: the losses, and the settings that say how."""
    asked = dict.fromkeys(key for name in mixed for key in OBJECTIVES[name].settings)
    usual = {"label_smoothing": 0.0, "divergence": "reverse_kl"}
    told = {key: settings.get(key) for key in asked if settings.get(key) not in (None, usual.get(key))}
    how = ", ".join(f"{k}={v:g}" if isinstance(v, (int, float)) else f"{k}={v}" for k, v in told.items())
    names = " + ".join(name if share == 1 else f"{share:g} {name}" for name, share in mixed.items())
    return f"{names}({how})"
