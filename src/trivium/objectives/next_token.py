"""Next-token prediction, the objective of pretraining and of supervised fine-tuning.

Bengio et al. 2003, "A Neural Probabilistic Language Model", eq. 4 (without the penalty): the negative
log-likelihood of the trained tokens, per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from trivium.forest import Forest
from trivium.objectives.base import Objective, Result


def next_token_loss(logprob: Tensor, weight: Tensor) -> Tensor:
    """``-(weight * logprob).sum()``; both ``[K]``."""
    return -(weight * logprob).sum()


def next_token(settings: Mapping[str, Any]) -> Objective:
    """The objective; its weight is the sum of the token weights."""

    def compute(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        loss = next_token_loss(logprob, forest.weight)
        return Result(loss, {"loss": loss.detach()})

    return Objective("next_token", compute, lambda forest: float(forest.weight.sum()))
