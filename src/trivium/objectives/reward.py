"""Reward models: of two answers the better one is to be given more (Bradley and Terry 1952).

Shapes:  S sequences, each with one entry: what is read of it is its reward.  N pairs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trivium.forest import Forest
from trivium.objectives.base import Objective, Result
from trivium.objectives.pairs import Pairs, pair_weight


def bradley_terry_loss(chosen: Tensor, rejected: Tensor, margin: Tensor) -> Tensor:
    """``[N]`` from rewards ``[N]``: Ouyang et al. 2022 (InstructGPT), eq. 1; ``margin``: Llama 2, Touvron et al. 2023,
    eq. 2."""
    return -F.logsigmoid(chosen - rejected - margin)


def centring_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """``[N]``: what keeps rewards around 0, as only their differences are learnt (Eisenstein et al. 2023, eq. 2)."""
    return (chosen + rejected) ** 2


def bradley_terry(settings: Mapping[str, Any]) -> Objective:
    """The objective; one row weighs 1. ``center_rewards`` is the weight of `centring_loss`."""
    centre = settings.get("center_rewards") or 0.0

    def compute(reward: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        pairs = Pairs.of(forest)
        chosen, rejected = reward[pairs.chosen], reward[pairs.rejected]
        each = bradley_terry_loss(chosen, rejected, pairs.margin)
        if centre:
            each = each + centre * centring_loss(chosen, rejected)
        total = (pairs.weight * each).sum()
        won = (chosen - rejected).detach()
        told = {"accuracy": (won > 0).float() + 0.5 * (won == 0).float(), "margin": won,
                "reward_chosen": chosen.detach(), "reward_rejected": rejected.detach()}  # fmt: skip
        return Result(total, {"loss": total.detach(), **{k: (pairs.weight * v).sum() for k, v in told.items()}})

    title = f"bradley_terry(center_rewards={centre:g})" if centre else "bradley_terry"
    return Objective(title, compute, pair_weight, margins=True)
