"""Losses of pairs that are measured against the parent: each a pure function, ``[N]`` in and ``[N]`` out.

Shapes:  N pairs.

``chosen``, ``rejected``         what each answer gained on the parent: log pi(y|x) - log pi_ref(y|x), summed over its
                                 tokens, or what a divergence makes of it (`divergence.py`)
``chosen_tokens``, ``rejected_tokens``   how many tokens that sum is over
``margin``                       by how much the chosen answer is to be better, in rewards; 0 where rows say none
``beta``                         how strongly the model holds on to its parent

Where the model is its parent all gains are 0, so that every loss has a known value at the start.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dpo_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Direct preference optimisation, Rafailov et al. 2023, eq. 7: at the start ln 2.

    ``label_smoothing`` e: a share e of the labels is taken to be wrong (cDPO, Mitchell 2023). ``margin``: the
    offset of ODPO, Amini et al. 2024.
    """
    won = beta * (chosen - rejected) - margin
    return -(1 - label_smoothing) * F.logsigmoid(won) - label_smoothing * F.logsigmoid(-won)


def robust_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """Robust DPO, Chowdhury et al. 2024: unbiased where a share ``label_smoothing`` of labels is flipped."""
    won = beta * (chosen - rejected) - margin
    clean = (1 - label_smoothing) * F.logsigmoid(won) - label_smoothing * F.logsigmoid(-won)
    return -clean / (1 - 2 * label_smoothing)


def ipo_loss(chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float) -> Tensor:
    """Identity preference optimisation, Azar et al. 2023, eq. 17, ``beta`` being its tau: at the start (1 / 2 tau)^2.

    Gains are per token, as its authors meant it (and TRL does it): else its aim, 1 / (2 tau), would be that of a sum.
    """
    gap = chosen / chosen_tokens - rejected / rejected_tokens
    return (gap - 1 / (2 * beta)) ** 2


def hinge_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, beta: float) -> Tensor:
    """The hinge of SLiC (Zhao et al. 2023) on DPO's rewards (Liu et al. 2024, RSO): at the start 1."""
    return F.relu(1 + margin - beta * (chosen - rejected))


def dpo_norm_loss(
    chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, margin: Tensor, beta: float
) -> Tensor:
    """DPO with gains per token, so that length wins nothing (Tülu 3, Lambert et al. 2024): at the start ln 2."""
    return -F.logsigmoid(beta * (chosen / chosen_tokens - rejected / rejected_tokens) - margin)


def exo_loss(chosen: Tensor, rejected: Tensor, margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """EXO on pairs, Ji et al. 2024, eq. 16: KL of the model's preference to the labels', which are 1 - e and e.

    ``label_smoothing`` is e, above 0.
    """
    won = beta * (chosen - rejected) - margin
    log_won, log_lost = F.logsigmoid(won), F.logsigmoid(-won)
    sure, unsure = math.log1p(-label_smoothing), math.log(label_smoothing)
    return torch.sigmoid(won) * (log_won - sure) + torch.sigmoid(-won) * (log_lost - unsure)


def apo_zero_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-zero, D'Oosterlinck et al. 2024, eq. 7: chosen answers better than the model's own rise, rejected ones fall.

    At the start 1.
    """
    return 1 - torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """APO-down, D'Oosterlinck et al. 2024, eq. 8: chosen answers worse than the model's own fall, rejected ones more.

    At the start 1.
    """
    return torch.sigmoid(beta * chosen) + 1 - torch.sigmoid(beta * (chosen - rejected))


def nca_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Noise contrastive alignment of two answers, the better labelled 1, Chen et al. 2024: at the start 2 ln 2."""
    good, bad = beta * chosen, beta * rejected
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


def bco_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """Binary classifier optimisation, Jung et al. 2024, without its reward shift (as TRL has it on pairs).

    Chosen answers are classified as good and rejected ones as bad, each by itself: at the start 2 ln 2.
    """
    return -F.logsigmoid(beta * chosen) - F.logsigmoid(-beta * rejected)
