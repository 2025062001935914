"""f-divergences instead of the reverse KL (Wang et al. 2023, "Beyond Reverse KL", table 1): f'(u) of u = pi / pi_ref.

Shapes: any. ``gain`` is log u. Each is 0 where the model is its parent.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

MOST = 80.0  # the exponential of more is no float32


def reverse_kl(gain: Tensor, alpha: float) -> Tensor:
    """f'(u) = log u + 1, the 1 cancelling in a pair."""
    return gain


def forward_kl(gain: Tensor, alpha: float) -> Tensor:
    """f'(u) = -1 / u, and 1 more."""
    return 1 - torch.exp((-gain).clamp(max=MOST))


def js(gain: Tensor, alpha: float) -> Tensor:
    """Jensen-Shannon: f'(u) = log(2u / (1 + u))."""
    return math.log(2) + F.logsigmoid(gain)


def alpha(gain: Tensor, alpha: float) -> Tensor:
    """The alpha-divergence: f'(u) = (u^(alpha - 1) - 1) / (alpha - 1); at 1 the reverse KL."""
    if abs(alpha - 1) < 1e-6:
        return gain
    return torch.expm1(((alpha - 1) * gain).clamp(max=MOST)) / (alpha - 1)


DIVERGENCES = {"reverse_kl": reverse_kl, "forward_kl": forward_kl, "js": js, "alpha": alpha}
