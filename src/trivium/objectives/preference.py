"""Learning from pairs of answers: the chosen should become likelier than the rejected, measured against the parent.

Shapes:  K entries,  S = 2N sequences (chosen, rejected, chosen, ...),  N pairs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from trivium.forest import Forest
from trivium.objectives.base import Objective, Result, per_sequence


def dpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``[N]`` losses of DPO, Rafailov et al. 2023, eq. 7.

    ``chosen``, ``rejected`` ``[N]``: log pi(y|x) - log pi_ref(y|x), summed over the answer's tokens.
    """
    return -F.logsigmoid(beta * (chosen - rejected))


def dpo(settings: Mapping[str, Any]) -> Objective:
    """Direct preference optimisation. Before the first step the loss is ln 2."""
    return pairwise("dpo", dpo_loss, settings, at_start=math.log(2))


def sft_loss(logprob: Tensor, weight: Tensor) -> Tensor:
    """``[N]``: minus the chosen answer's log-probability per token (Pang et al. 2024, iterative RPO, eq. 1, last term).

    ``logprob``, ``weight`` ``[N]``: summed over the chosen answer's tokens.
    """
    return -logprob / weight


def pairwise(
    name: str,
    loss: Callable[[Tensor, Tensor, float], Tensor],
    settings: Mapping[str, Any],
    at_start: float | None,
) -> Objective:
    """An objective over pairs from ``loss(chosen [N], rejected [N], beta) -> [N]``. One pair weighs 1.

    ``chosen`` and ``rejected`` are the answers' log-probabilities less the parent's. ``settings`` hold ``beta``, and
    may hold ``sft_weight``, with which `sft_loss` is added; ``at_start`` is said of ``loss`` alone.
    """
    beta, sft_weight = settings["beta"], settings.get("sft_weight") or 0.0

    def compute(logprob: Tensor, forest: Forest, reference: Tensor | None) -> Result:
        assert reference is not None, f"{name} compares with the parent"
        chosen, rejected = per_sequence(forest.weight * (logprob - reference), forest).view(-1, 2).unbind(1)
        preference = loss(chosen, rejected, beta).sum()
        total, more = preference, {}
        if sft_weight:
            answers = per_sequence(forest.weight * logprob, forest).view(-1, 2)[:, 0]
            sft = sft_loss(answers, per_sequence(forest.weight, forest).view(-1, 2)[:, 0]).sum()
            total = preference + sft_weight * sft
            more = {"preference_loss": preference.detach(), "sft_loss": sft.detach()}
        policy = per_sequence(forest.weight * logprob.detach(), forest).view(-1, 2).sum(0)
        margin = (beta * (chosen - rejected)).detach()
        stats = {
            "loss": total.detach(),
            **more,
            # a tie is half a success: what guessing would give
            "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).sum(),
            "margin": margin.sum(),
            "logprob_chosen": policy[0],
            "logprob_rejected": policy[1],
        }
        return Result(total, stats)

    of = "preference_loss" if sft_weight else "loss"
    title = f"{name}(beta={beta:g}" + (f", sft_weight={sft_weight:g})" if sft_weight else ")")
    return Objective(title, compute, lambda forest: forest.sequences / 2, True, at_start, of)
