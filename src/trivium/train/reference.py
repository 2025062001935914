"""The reference of preference tuning: the parent's log-probabilities, never a silent second copy of the model.

With an adapter the parent is the same base under the parent's small weights: a gradient-free pass over the same
forest. With full training the parent's numbers are computed once, before the first step, and kept.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterable

import torch
from torch import Tensor

from trivium.forest import Forest

LogProb = Callable[[Forest], Tensor]


def no_reference(forest: Forest) -> None:
    """For objectives that compare with nothing."""
    return None


class UnderParent:
    """A pass over the same forest with the model put back to its parent inside ``parent()``."""

    def __init__(self, logprob: LogProb, parent: Callable[[], contextlib.AbstractContextManager[None]]) -> None:
        self.logprob, self.parent = logprob, parent

    def __call__(self, forest: Forest) -> Tensor:
        with torch.no_grad(), self.parent():
            return self.logprob(forest)


class Remembered:
    """The parent's numbers of each example, computed once while the model still is its parent.

    Costs one gradient-free pass over the examples and four bytes per trained token.
    """

    def __init__(self, logprob: LogProb, forests: Iterable[Forest]) -> None:
        self.kept: dict[Hashable, Tensor] = {}
        with torch.no_grad():
            for forest in forests:
                if all(e.identity in self.kept for e in forest.examples):
                    continue
                counts = [e.trained_tokens for e in forest.examples]
                pieces = logprob(forest).cpu().split(counts)
                self.kept.update(zip((e.identity for e in forest.examples), pieces, strict=True))

    def __call__(self, forest: Forest) -> Tensor:
        return torch.cat([self.kept[e.identity] for e in forest.examples]).to(forest.tokens.device)
