"""VeRA: vector-based random matrix adaptation (Kopiczko et al. 2024, "VeRA", equation 2).

    h = W x + b * (B (d * (A x)))         A: [r, in], B: [out, r]: random, fixed, shared;  d: [r], b: [out]: trained

r + out trained weights per module. All modules take their part of one pair of matrices as large as the largest of
them; it follows from ``projection_seed`` and is saved with the vectors, as PEFT does.

Shapes:  N tokens (all leading dimensions),  in, out: the target's,  r: rank.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.peft.checks import ALL_LINEAR
from trivium.peft.delta import Delta, Plan
from trivium.peft.kinds import VeRASettings
from trivium.peft.targets import add_to_weight, find_targets, frozen_note, linear_shape


class Projection(nn.Module):
    """The random pair that all modules share: A ``[r, largest in]``, B ``[largest out, r]``."""

    vera_A: Tensor
    vera_B: Tensor

    def __init__(self, r: int, n_in: int, n_out: int, seed: int) -> None:
        super().__init__()
        self.seed = seed
        self.register_buffer("vera_A", torch.empty(r, n_in, dtype=torch.float32))
        self.register_buffer("vera_B", torch.empty(n_out, r, dtype=torch.float32))

    def fill(self) -> None:
        generator = torch.Generator().manual_seed(self.seed)
        for matrix in (self.vera_A, self.vera_B):
            start = torch.empty(matrix.shape)
            nn.init.kaiming_uniform_(start, generator=generator)
            matrix.copy_(start)


class VeRA(Delta):
    """The two vectors of one linear module."""

    def __init__(self, target: nn.Module, projection: Projection, settings: VeRASettings) -> None:
        super().__init__()
        self.n_in, self.n_out = linear_shape(target)
        self.dropout, self.d_initial = settings.dropout, settings.d_initial
        self.vera_lambda_d = nn.Parameter(torch.empty(settings.r, dtype=torch.float32))
        self.vera_lambda_b = nn.Parameter(torch.empty(self.n_out, dtype=torch.float32))
        self.projection = projection

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.vera_lambda_d.fill_(self.d_initial)
            self.vera_lambda_b.zero_()
            self.projection.fill()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Equation 2; ``x [..., in]``, ``output [..., out]``, in the dtype of ``output``."""
        dtype = output.dtype
        x = x.to(dtype)
        if self.dropping and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        a, b = self.projection.vera_A[:, : self.n_in].to(dtype), self.projection.vera_B[: self.n_out].to(dtype)
        low = self.vera_lambda_d.to(dtype) * F.linear(x, a)
        return output + self.vera_lambda_b.to(dtype) * F.linear(low, b)

    def merge(self, target: nn.Module) -> None:
        a, b = self.projection.vera_A[:, : self.n_in], self.projection.vera_B[: self.n_out]
        add_to_weight(target, self.vera_lambda_b[:, None] * b @ (self.vera_lambda_d[:, None] * a))


def build(model: nn.Module, settings: VeRASettings) -> Plan:
    """Two vectors for every module that ``target_modules`` selects. Raises RecipeError where it matches nothing."""
    names = find_targets(model, settings.target_modules)
    shapes = [linear_shape(model.get_submodule(name)) for name in names]
    pair = Projection(settings.r, max(i for i, _ in shapes), max(o for _, o in shapes), settings.projection_seed)
    made: dict[str, Delta] = {name: VeRA(model.get_submodule(name), pair, settings) for name in names}
    return Plan(made, frozen_note(model) if settings.target_modules == ALL_LINEAR else [])
