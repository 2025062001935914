"""A model on held-out rows: the same objective, gradient-free, averaged over its weight; and bits per byte."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from trivium.forest import Forest
from trivium.objectives.base import LogProb, Objective, Reference, Sums


def evaluate(
    objective: Objective,
    logprob: LogProb,
    reference: Reference,
    forests: Iterable[Forest],
    beside: Iterable[Forest] = (),
) -> dict[str, float]:
    """The objective's statistics per unit of weight: ``loss`` and whatever else it reports.

    ``beside`` is what its first pass is over, where it has one.

    Where the examples tell how many bytes of text they train, ``bits_per_byte`` too: what an ideal compressor would
    need, the same measure whatever the tokenizer (the cost of stop tokens is in it, their bytes are not).
    """
    sums, nats, text_bytes = Sums(), 0.0, 0
    with torch.no_grad():
        if objective.first is not None:
            objective = objective.first.known(logprob, reference, beside)
        for forest in forests:
            logprobs = logprob(forest)
            sums.add(objective.compute(logprobs, forest, reference(forest)), objective.weight(forest))
            nats -= float(logprobs.cpu().double().sum())  # not every device has float64
            text_bytes += sum(e.text_bytes for e in forest.examples)
    found = sums.means()
    return {**found, "bits_per_byte": nats / math.log(2) / text_bytes} if text_bytes else found
