"""LoRA: a low-rank update of chosen weight matrices (Hu et al. 2021, "LoRA: Low-Rank Adaptation of Large Language
Models", equation 3).

    h = W x + (alpha / r) B A x         A: [r, in], Kaiming-uniform;   B: [out, r], zero at the start

r * (in + out) trained weights per matrix. Once merged it costs nothing: W + (alpha / r) B A has W's shape. With rsLoRA
the scale is alpha / sqrt(r) (Kalajdzievski 2023, "A Rank Stabilization Scaling Factor", equation 4); with LoRA+ B
learns faster than A (Hayou et al. 2024, "LoRA+", section 3). DoRA, other starts and experts have files of their own.

Shapes:  N tokens (all leading dimensions),  in, out: the target's,  r: rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import RecipeError
from trivium.peft.checks import ALL_LINEAR
from trivium.peft.delta import Delta, Plan, kaiming
from trivium.peft.kinds import LoRASettings
from trivium.peft.targets import add_to_weight, find_targets, frozen_note, linear_shape, value_for


class LoRA(Delta):
    """``output + scale * B A x`` for one linear target."""

    def __init__(self, target: nn.Module, r: int, alpha: float, settings: LoRASettings) -> None:
        super().__init__()
        n_in, n_out = linear_shape(target)
        self.r, self.alpha, self.dropout = r, alpha, settings.dropout
        self.scale = scale_of(r, alpha, settings)
        self.b_rate = settings.loraplus_lr_ratio
        self.lora_A = nn.Parameter(torch.empty(r, n_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(n_out, r, dtype=torch.float32))

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        kaiming(self.lora_A, generator)
        with torch.no_grad():
            self.lora_B.zero_()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """Equation 3; ``x [..., in]``, ``output [..., out]``, in the dtype of ``output``."""
        low = self.low(x, output.dtype)
        # One product that scales and adds: written out, it would be two more passes over [N, out].
        flat = torch.addmm(
            output.reshape(-1, output.shape[-1]),
            low.reshape(-1, self.r),
            self.lora_B.to(output.dtype).t(),
            alpha=self.scale,
        )
        return flat.view(output.shape)

    def low(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """``A x``, ``[..., r]``."""
        return F.linear(self.dropped(x.to(dtype)), self.lora_A.to(dtype))

    def dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout) if self.dropping and self.dropout > 0 else x

    def update(self) -> Tensor:
        """What is added to the weight, ``[out, in]`` in float32."""
        return self.scale * (self.lora_B.float() @ self.lora_A.float())

    def rates(self) -> dict[str, float]:
        return {"lora_B": self.b_rate} if self.b_rate != 1 else {}

    def merge(self, target: nn.Module) -> None:
        add_to_weight(target, self.update())


def scale_of(r: int, alpha: float, settings: LoRASettings) -> float:
    """The factor on ``B A``."""
    return alpha / (math.sqrt(r) if settings.rslora else r)


def build(model: nn.Module, settings: LoRASettings) -> Plan:
    """A LoRA for every module that ``target_modules`` selects, and what else the settings ask for.

    Raises RecipeError for a pattern that matches nothing.
    """
    from trivium.peft.copies import copies_of
    from trivium.peft.experts import expert_loras

    made = loras(model, settings, find_targets(model, settings.target_modules))
    if settings.target_parameters is not None:
        made |= expert_loras(model, settings)
    told = settings.target_modules == ALL_LINEAR and settings.target_parameters is None
    notes = frozen_note(model) if told else []
    if settings.modules_to_save is not None:
        whole, asked = copies_of(model, settings.modules_to_save, apart_from=made)
        if settings.quantize and (packed := sorted(asked & {*find_targets(model, ALL_LINEAR)})):
            raise RecipeError(
                f"modules_to_save: {packed[0]} is held in {settings.quantize}, and cannot be trained",
                "leave it out, or leave out quantize",
            )
        made |= whole
        notes += [f"{name} is tied to one of modules_to_save, and trained with it" for name in whole.keys() - asked]
    return Plan(made, notes)


def loras(model: nn.Module, settings: LoRASettings, names: list[str]) -> dict[str, Delta]:
    """The LoRA of each module, of the kind, rank and alpha that the settings give it."""
    from trivium.peft.dora import DoRA
    from trivium.peft.lora_starts import STARTS

    kind = DoRA if settings.dora else STARTS.get(settings.init_lora_weights, LoRA)
    ranks = value_for(names, settings.rank_pattern, "rank_pattern")
    alphas = value_for(names, settings.alpha_pattern, "alpha_pattern")
    return {
        name: kind(
            model.get_submodule(name),
            int(r := ranks.get(name, settings.r)),
            # left out, alpha follows the module's own rank
            alphas.get(name, 2 * r if settings.alpha is None and name in ranks else settings.effective_alpha),
            settings,
        )
        for name in names
    }
