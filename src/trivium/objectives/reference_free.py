"""Losses of pairs that need no reference: each a pure function, ``[N]`` in and ``[N]`` out.

Shapes:  N pairs.

``chosen_logprob``, ``rejected_logprob``   log pi(y|x), summed over the answer's ``..._tokens``
``margin``                                 by how much the chosen answer is to be better; 0 where rows say none

What holds the model to its parent here is next-token prediction on the chosen answer beside it (``sft_weight``).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def orpo_loss(
    chosen_logprob: Tensor, rejected_logprob: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, beta: float
) -> Tensor:
    """The odds-ratio term of ORPO, Hong et al. 2024, eq. 7, times ``beta`` (its lambda); eq. 6 adds ``sft_weight`` 1.

    Odds are of the mean log-probability per token (eq. 4): log p - log(1 - p).
    """
    chosen, rejected = chosen_logprob / chosen_tokens, rejected_logprob / rejected_tokens
    return -beta * F.logsigmoid(chosen - rejected - (_log1mexp(chosen) - _log1mexp(rejected)))


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)) for x < 0, exact at both ends (Mächler 2012, eq. 7)."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)  # an answer of probability 1 has infinite odds
    small = x > -0.6931472
    near = torch.log(-torch.expm1(torch.where(small, x, -torch.ones_like(x))))
    far = torch.log1p(-torch.exp(torch.where(small, -torch.ones_like(x), x)))
    return torch.where(small, near, far)


def simpo_loss(
    chosen_logprob: Tensor, rejected_logprob: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, margin: Tensor,
    beta: float, gamma: float,
) -> Tensor:  # fmt: skip
    """SimPO, Meng et al. 2024, eq. 6: mean log-probabilities per token, that are to differ by ``gamma`` / ``beta``."""
    gap = chosen_logprob / chosen_tokens - rejected_logprob / rejected_tokens
    return -F.logsigmoid(beta * gap - gamma - margin)


def cpo_loss(
    chosen_logprob: Tensor, rejected_logprob: Tensor, margin: Tensor, beta: float, label_smoothing: float
) -> Tensor:
    """Contrastive preference optimisation, Xu et al. 2024, the first term of its loss: DPO with a uniform reference.

    Its second term is ``sft_weight`` 1.
    """
    won = beta * (chosen_logprob - rejected_logprob) - margin
    return -(1 - label_smoothing) * F.logsigmoid(won) - label_smoothing * F.logsigmoid(-won)
