"""DoRA: the rows' magnitudes trained apart from their direction (Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank
Adaptation", equation 5).

    h = m * (W + s B A) x / ||W + s B A||           the norm of each row, [out];  m starts as ||W||

The norm gets no gradient (section 4.3), and is never computed from the matrix [out, in]: with a = A A^T

    ||W + s B A||^2 = ||W||^2 + 2 s (W A^T * B) 1 + s^2 (B a * B) 1

costs one product [out, in] x [in, r] for each pass, where ||W||^2 is computed once.

Shapes:  N tokens (all leading dimensions),  in, out: the target's,  r: rank.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.peft.lora import LoRA
from trivium.peft.targets import add_to_weight, weight_of


class DoRA(LoRA):
    """A LoRA whose target's rows have a trained magnitude."""

    exact = True
    row_squares: Tensor

    def __init__(self, target: nn.Module, *settings: Any) -> None:
        super().__init__(target, *settings)
        n_out = len(self.lora_B)
        self.lora_magnitude_vector = nn.Parameter(torch.empty(n_out, dtype=torch.float32))
        self.register_buffer("row_squares", torch.empty(n_out, dtype=torch.float32), persistent=False)

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        super().reset(target, generator)
        self.derive(target)
        with torch.no_grad():
            self.lora_magnitude_vector.copy_(self.row_squares.sqrt())

    def derive(self, target: nn.Module) -> None:
        with torch.no_grad():
            self.row_squares.copy_(weight_of(target).float().square().sum(1))

    @torch.no_grad()
    def norms(self, target: nn.Module) -> Tensor:
        """``||W + s B A||`` of each row, ``[out]``, float32."""
        a, b, s = self.lora_A.float(), self.lora_B.float(), self.scale
        weight = weight_of(target)
        projected = (weight @ a.to(weight.dtype).t()).float()  # [out, r]
        squares = self.row_squares + ((2 * s) * projected + (s * s) * (b @ (a @ a.t()))).mul_(b).sum(1)
        return squares.clamp_min_(0).sqrt_()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Equation 5; ``x [..., in]``, ``output [..., out]``, in the dtype of ``output``."""
        dtype = output.dtype
        ratio = (self.lora_magnitude_vector / self.norms(target)).to(dtype)
        if self.dropping and self.dropout > 0:  # only what is added sees dropped inputs, as in PEFT
            x = self.dropped(x.to(dtype))
            again = F.linear(x, weight_of(target).to(dtype))
            low = F.linear(F.linear(x, self.lora_A.to(dtype)), self.lora_B.to(dtype))
            return output + (ratio - 1) * again + ratio * (self.scale * low)
        both = super().forward(target, x, output)
        bias = getattr(target, "bias", None)
        if bias is None:
            return both * ratio
        return both + (ratio - 1) * (both - bias)  # the bias has no direction, and stays

    def merge(self, target: nn.Module) -> None:
        weight = weight_of(target).float() + self.update()
        ratio = self.lora_magnitude_vector.float() / weight.norm(dim=1)
        add_to_weight(target, weight * ratio[:, None] - weight_of(target).float())
