"""RMSNorm (Zhang & Sennrich 2019, "Root Mean Square Layer Normalization", equation 4), with a backward pass of its own.

    y = x / sqrt(mean(x^2) + eps) * (w + offset)         offset: 0, or 1 in the Gemma family

Written out in tensor operations it is six passes over the tokens forward and a dozen backward, and keeps three
tensors of their size; here it is three and five, and it keeps its input.

Shapes:  N tokens (all leading dimensions),  D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class RMSNorm(torch.autograd.Function):
    """``x [..., D]``, ``weight [D]`` -> ``[..., D]``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, offset: float) -> Tensor:
        width = x.shape[-1]
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        rstd = size.square_().div_(width).add_(eps).rsqrt_()
        ctx.offset = offset
        ctx.save_for_backward(x, weight, rstd)
        return (x * rstd).mul_(weight + offset if offset else weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, rstd = ctx.saved_tensors
        need_x, need_weight = ctx.needs_input_grad[:2]
        grad_x = grad_weight = None
        if need_weight:
            grad_weight = (grad * x).mul_(rstd).flatten(0, -2).sum(0)
        if need_x:
            grad_x = grad * (weight + ctx.offset if ctx.offset else weight)
            along = torch.linalg.vecdot(grad_x, x).unsqueeze(-1).mul_(rstd.pow(3)).div_(x.shape[-1])
            grad_x.mul_(rstd).addcmul_(x, along, value=-1)
        return grad_x, grad_weight, None, None


def eps_of(module: nn.Module) -> float | None:
    """The eps of what may be an RMSNorm: one weight of one dimension, no buffer, no child, and a name for it."""
    if [name for name, _ in module.named_parameters()] != ["weight"] or list(module.buffers()) or module._modules:
        return None
    found = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    return found if isinstance(found, float) and module.get_parameter("weight").ndim == 1 else None
