"""What an objective is: a pure function of per-token log-probabilities, and what it promises.

Shapes:  K entries,  S sequences.

An objective returns a sum and says, from the batch alone, what weight that sum has. The loop divides by the weight of
the whole optimizer step, so packing, accumulation and the number of processes cannot change the update.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.forest import Example, Forest

LogProb = Callable[[Forest], Tensor]
Reference = Callable[[Forest], Tensor | None]


@dataclass
class Result:
    """``sum`` is a scalar to be divided by the step's weight; ``stats`` are sums for the log, of the same weight where
    ``weights`` does not give one of their own."""

    sum: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class FirstPass:
    """What an objective has to know of a whole step before the first of its gradients: one mean.

    ``examples(examples of the step)`` are what it is taken over, in a gradient-free pass of their own, ``total`` the
    sum over a batch of them ``(logprob [K], forest, reference)``, and ``then(mean)`` the objective that knows it. No
    example, no pass: the mean is 0.
    """

    examples: Callable[[Sequence[Example]], list[Example]]
    total: Callable[[Tensor, Forest, Tensor | None], Tensor]
    then: Callable[[float], Objective]

    def known(
        self, logprob: LogProb, reference: Reference, forests: Iterable[Forest],
        added: Callable[[list[float]], list[float]] = list,
    ) -> Objective:  # fmt: skip
        """The objective, once the pass over its ``forests`` is made; ``added`` adds up what several processes have."""
        total, count = 0.0, 0.0
        with torch.no_grad():
            for forest in forests:
                total += float(self.total(logprob(forest), forest, reference(forest)))
                count += forest.sequences
        total, count = added([total, float(count)])
        return self.then(total / count if count else 0.0)


@dataclass(frozen=True)
class Objective:
    """``compute(logprob [K], forest, reference [K] or None)``; ``weight(forest)`` is the denominator's share.

    ``at_start`` is the value per unit of weight of its statistic ``at_start_of`` before the first step, when the model
    still is its parent, on rows without weights and margins; None where nothing can be said, for want of a reference.
    """

    name: str
    compute: Callable[[Tensor, Forest, Tensor | None], Result]
    weight: Callable[[Forest], float]
    needs_reference: bool = False
    at_start: float | None = None
    at_start_of: str = "loss"
    first: FirstPass | None = None
    margins: bool = False  # whether it knows what to do with a row's margin


class Sums:
    """Statistics of several batches, each with its weight: what a log says is their quotient."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.weights: dict[str, float] = {}

    def add(self, result: Result, weight: float) -> None:
        for name, value in result.stats.items():
            self.sums[name] = self.sums.get(name, torch.zeros(())) + value.cpu()
            self.weights[name] = self.weights.get(name, 0.0) + result.weights.get(name, weight)

    def means(self) -> dict[str, float]:
        """Those of which there was anything."""
        return {n: float(value) / self.weights[n] for n, value in self.sums.items() if self.weights[n]}


def per_sequence(values: Tensor, forest: Forest) -> Tensor:
    """Sum ``values [K]`` within each sequence: ``[S]``."""
    sums = torch.zeros(forest.sequences, dtype=values.dtype, device=values.device)
    return sums.index_add(0, forest.sequence, values)
