"""LoRAs that start from parts of the weight itself, instead of noise and zero.

    PiSSA    the largest singular directions: B0 A0 = U_r S_r V_r / s       (Meng et al. 2024, "PiSSA", equations 2-4)
    OLoRA    the first rows of a QR decomposition: B0 A0 = Q_r R_r          (Büyükakyüz 2024, "OLoRA", algorithm 1)

Both papers take the start out of the base, W - s B0 A0. Here the base stays untouched, and what was taken is
subtracted in the pass:

    h = W x + s (B A - B0 A0) x

which is the base, bitwise, at the start; and an ordinary LoRA of rank 2r, [B, -B0] [A; A0], as which it is saved.

Shapes:  in, out: the target's,  r: rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import RecipeError
from trivium.peft.lora import LoRA
from trivium.peft.targets import linear_shape, weight_of

EXACT = 1024  # up to this size all singular values are computed, above only the largest, by iteration
ITERATIONS = 16  # as many as PiSSA's own fast variant takes at most


class Started(LoRA):
    """A LoRA whose start is subtracted from it."""

    exact = True
    start_A: Tensor
    start_B: Tensor

    def __init__(self, target: nn.Module, *settings: Any) -> None:
        super().__init__(target, *settings)
        if self.r > min(linear_shape(target)):
            raise RecipeError(
                f"r is {self.r}, more than a weight of {linear_shape(target)} has directions",
                f"this start takes r up to {min(linear_shape(target))}; give rank_pattern for narrow modules",
            )
        self.register_buffer("start_A", torch.empty_like(self.lora_A))
        self.register_buffer("start_B", torch.empty_like(self.lora_B))

    def factors(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """``weight [out, in]`` -> (A0 ``[r, in]``, B0 ``[out, r]``)."""
        raise NotImplementedError

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            a, b = self.factors(weight_of(target).float(), generator)
            for one, other in ((self.lora_A, self.start_A), (self.lora_B, self.start_B)):
                one.copy_(a if one is self.lora_A else b)
                other.copy_(one)

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """``x [..., in]``, ``output [..., out]``; the two products are alike, so that at the start their bits are."""
        dtype = output.dtype
        x = self.dropped(x.to(dtype))
        now = F.linear(F.linear(x, self.lora_A.to(dtype)), self.lora_B.to(dtype))
        then = F.linear(F.linear(x, self.start_A.to(dtype)), self.start_B.to(dtype))
        return output + (now - then).mul_(self.scale)

    def update(self) -> Tensor:
        return self.scale * (self.lora_B.float() @ self.lora_A.float() - self.start_B.float() @ self.start_A.float())

    def as_plain(self) -> tuple[Tensor, Tensor]:
        """(A ``[2r, in]``, B ``[out, 2r]``) of the ordinary LoRA of the same scale that it is."""
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)


class PiSSA(Started):
    """The start is the weight's best approximation of rank r, shared evenly between A and B."""

    def factors(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if min(weight.shape) <= EXACT:
            u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        else:
            with torch.random.fork_rng(devices=[weight.device] if weight.is_cuda else []):
                torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))
                u, s, v = torch.svd_lowrank(weight, q=min(self.r + 8, *weight.shape), niter=ITERATIONS)
            vt = v.t()
        root = (s[: self.r] / self.scale).sqrt()
        return root[:, None] * vt[: self.r], u[:, : self.r] * root


class OLoRA(Started):
    """The start is the first r columns of Q and rows of R."""

    def factors(self, weight: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        q, r = torch.linalg.qr(weight)
        return r[: self.r], q[:, : self.r]


STARTS: dict[str, type[LoRA]] = {"pissa": PiSSA, "olora": OLoRA}


def plain_alpha(alpha: float, rslora: bool) -> float:
    """The alpha under which the plain LoRA of rank 2r has the scale of the started one of rank r."""
    return alpha * (math.sqrt(2) if rslora else 2)
