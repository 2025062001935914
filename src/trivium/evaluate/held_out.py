"""A model on held-out rows: the same objective, gradient-free, averaged over its weight."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from trivium.forest import Forest
from trivium.objectives.base import Objective


def evaluate(
    objective: Objective,
    logprob: Callable[[Forest], Tensor],
    reference: Callable[[Forest], Tensor | None],
    forests: Iterable[Forest],
) -> dict[str, float]:
    """The objective's statistics per unit of weight: ``loss`` and whatever else it reports."""
    sums: dict[str, float] = defaultdict(float)
    weight = 0.0
    with torch.no_grad():
        for forest in forests:
            result = objective.compute(logprob(forest), forest, reference(forest))
            weight += objective.weight(forest)
            for name, value in result.stats.items():
                sums[name] += float(value)
    return {name: value / weight for name, value in sums.items()} if weight else {}
