"""Rotary position embedding (Su et al. 2021, "RoFormer", equation 34), the two halves of a head turned in place.

    (a, b) -> (a cos - b sin, b cos + a sin)

Shapes:  H heads,  T tokens,  D head width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    half = x.shape[-1] // 2
    out = x * cos
    out[..., :half].addcmul_(x[..., half:], sin[..., :half] if sign > 0 else sin[..., half:], value=-sign)
    out[..., half:].addcmul_(x[..., :half], sin[..., half:] if sign > 0 else sin[..., :half], value=sign)
    return out


class Rotary(torch.autograd.Function):
    """``x [1, H, T, D]``, ``cos, sin [1, 1, T, D]`` -> ``[1, H, T, D]``; keeps nothing but the angles."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None
