"""LoRA: a low-rank update of chosen weight matrices (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
Models", equation 3).

    h = W x + (alpha / r) B A x         A: [r, in], Kaiming-uniform;   B: [out, r], zero at the start

r * (in + out) trained weights per matrix. Once merged it costs nothing: W + (alpha / r) B A has W's shape.

Shapes:  N tokens (all leading dimensions),  in, out: the target's,  r: rank.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from trivium.errors import ModelError
from trivium.peft.base import Delta, Plan
from trivium.peft.settings import ALL_LINEAR, LoRASettings
from trivium.peft.targets import find_targets, frozen_note, linear_shape


class LoRA(Delta):
    """``output + scale * B A x`` for one linear target."""

    def __init__(self, target: nn.Module, r: int, alpha: float, dropout: float = 0.0, rslora: bool = False) -> None:
        super().__init__()
        n_in, n_out = linear_shape(target)
        self.r, self.alpha, self.dropout = r, alpha, dropout
        self.scale = alpha / (math.sqrt(r) if rslora else r)
        self.lora_A = nn.Parameter(torch.empty(r, n_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(n_out, r, dtype=torch.float32))

    def reset(self, generator: torch.Generator) -> None:
        start = torch.empty(self.lora_A.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.lora_A.copy_(start)
            self.lora_B.zero_()

    def forward(self, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        """Equation 3; inputs ``([..., in],)``, output ``[..., out]``, in the dtype of ``output``."""
        dtype = output.dtype
        x = inputs[0].to(dtype)
        if self.dropping and self.dropout > 0:
            x = F.dropout(x, self.dropout)
        low = F.linear(x, self.lora_A.to(dtype))  # [..., r]
        # One product that scales and adds: written out, it would be two more passes over [N, out].
        flat = torch.addmm(
            output.reshape(-1, output.shape[-1]),
            low.reshape(-1, self.r),
            self.lora_B.to(dtype).t(),
            alpha=self.scale,
        )
        return flat.view(output.shape)

    def obstacle(self, target: nn.Module) -> ModelError | None:
        n_in, n_out = linear_shape(target)
        shape = (n_in, n_out) if isinstance(target, Conv1D) else (n_out, n_in)
        weight = target.get_parameter("weight")
        if weight.is_floating_point() and weight.shape == shape:
            return None
        return ModelError(
            f"a LoRA cannot be merged into a quantised weight ({weight.dtype})",
            "Load the base unquantised and merge into that.",
        )

    def merge(self, target: nn.Module) -> None:
        weight = target.get_parameter("weight")
        update = self.scale * (self.lora_B.float() @ self.lora_A.float())  # [out, in]
        if isinstance(target, Conv1D):
            update = update.t()
        with torch.no_grad():
            weight.copy_(weight.float() + update)  # copy_ rounds to the base's dtype


def build(model: nn.Module, settings: LoRASettings) -> Plan:
    """A LoRA for every module that ``target_modules`` selects."""
    made: dict[str, Delta] = {
        name: LoRA(model.get_submodule(name), settings.r, settings.effective_alpha, settings.dropout, settings.rslora)
        for name in find_targets(model, settings.target_modules)
    }
    return Plan(made, frozen_note(model) if settings.target_modules == ALL_LINEAR else [])
