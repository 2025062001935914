"""What an objective is: a pure function of per-token log-probabilities, and what it promises.

Shapes:  K entries,  S sequences.

An objective returns a sum and says, from the batch alone, what weight that sum has. The loop divides by the weight of
the whole optimizer step, so packing, accumulation and the number of processes cannot change the update.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.forest import Forest


@dataclass
class Result:
    """``sum`` is a scalar to be divided by the step's weight; ``stats`` are sums of the same weight, for the log."""

    sum: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Objective:
    """``compute(logprob [K], forest, reference [K] or None)``; ``weight(forest)`` is the denominator's share.

    ``at_start`` is the value per unit of weight of its statistic ``at_start_of`` before the first step, when the model
    still is its parent; None where nothing can be said.
    """

    name: str
    compute: Callable[[Tensor, Forest, Tensor | None], Result]
    weight: Callable[[Forest], float]
    needs_reference: bool = False
    at_start: float | None = None
    at_start_of: str = "loss"


def per_sequence(values: Tensor, forest: Forest) -> Tensor:
    """Sum ``values [K]`` within each sequence: ``[S]``."""
    sums = torch.zeros(forest.sequences, dtype=values.dtype, device=values.device)
    return sums.index_add(0, forest.sequence, values)
