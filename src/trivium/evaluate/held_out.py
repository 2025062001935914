"""A model on held-out rows: the same objective, gradient-free, averaged over its weight; and bits per byte."""

from __future__ import annotations

import math
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
    """The objective's statistics per unit of weight: ``loss`` and whatever else it reports.

    Where the examples tell how many bytes of text they train, ``bits_per_byte`` too: what an ideal compressor would
    need, the same measure whatever the tokenizer (the cost of stop tokens is in it, their bytes are not).
    """
    sums: dict[str, float] = defaultdict(float)
    weight = nats = 0.0
    text_bytes = 0
    with torch.no_grad():
        for forest in forests:
            logprobs = logprob(forest)
            result = objective.compute(logprobs, forest, reference(forest))
            weight += objective.weight(forest)
            for name, value in result.stats.items():
                sums[name] += float(value)
            nats -= float(logprobs.cpu().double().sum())  # not every device has float64
            text_bytes += sum(e.text_bytes for e in forest.examples)
    found = {name: value / weight for name, value in sums.items()} if weight else {}
    return {**found, "bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else found
