"""LoRA on bare parameters: the expert matrices of a mixture of experts (PEFT's ``target_parameters``).

    W_e + s B_e A_e  for every expert e          A: [E r, in],  B: [out, r E]   (PEFT's layout of both)

Experts are one tensor [E, out, in] (or [E, in, out]) and no module, so there is no output to add to: the sum takes the
tensor's place while its module runs. Cost: one such tensor for each pass, as in PEFT.

Shapes:  E experts,  in, out: one expert's,  r: rank.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from trivium.peft.delta import Delta, kaiming
from trivium.peft.kinds import LoRASettings
from trivium.peft.lora import scale_of
from trivium.peft.targets import bare_parameters, select


class Factors(nn.Module):
    """A and B of one tensor."""

    def __init__(self, tensor: Tensor, transposed: bool, r: int) -> None:
        super().__init__()
        experts, rows, columns = tensor.shape if tensor.ndim == 3 else (1, *tensor.shape)
        self.n_out, self.n_in = (columns, rows) if transposed and tensor.ndim == 3 else (rows, columns)
        self.experts, self.r = experts, r
        self.lora_A = nn.Parameter(torch.empty(experts * r, self.n_in, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.empty(self.n_out, r * experts, dtype=torch.float32))


class ExpertLoRA(Delta):
    """The LoRAs of a module's own parameters, by their names."""

    token_wise = False

    def __init__(self, target: nn.Module, keys: Iterable[str], settings: LoRASettings) -> None:
        super().__init__()
        # whether the tensors are [E, in, out]; transformers' modules say so themselves
        self.transposed = bool(getattr(target, "is_transposed", False))
        self.alpha, self.r = settings.effective_alpha, settings.r
        self.scale, self.b_rate = scale_of(settings.r, self.alpha, settings), settings.loraplus_lr_ratio
        self.keys = tuple(keys)
        for key in self.keys:
            self.add_module(key, Factors(target.get_parameter(key), self.transposed, settings.r))

    @property
    def replaces(self) -> tuple[str, ...]:
        return self.keys

    def factors(self, key: str) -> Factors:
        found = self.get_submodule(key)
        assert isinstance(found, Factors)
        return found

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        for key in self.keys:
            one = self.factors(key)
            kaiming(one.lora_A, generator)
            nn.init.zeros_(one.lora_B)

    def tensors(self, target: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """``[E, out, in]``, or as the target has it."""
        one, dtype = self.factors(name), tensor.dtype
        a = one.lora_A.to(dtype).view(one.experts, one.r, one.n_in)
        b = one.lora_B.to(dtype).view(one.n_out, one.r, one.experts).permute(2, 0, 1)
        if tensor.ndim == 2:
            return torch.addmm(tensor, b[0], a[0], alpha=self.scale)
        if self.transposed:
            return torch.baddbmm(tensor, a.mT, b.mT, alpha=self.scale)
        return torch.baddbmm(tensor, b, a, alpha=self.scale)

    def rates(self) -> dict[str, float]:
        return {f"{key}.lora_B": self.b_rate for key in self.keys} if self.b_rate != 1 else {}

    def merge(self, target: nn.Module) -> None:
        for key in self.keys:
            own = target.get_parameter(key)
            own.copy_(self.tensors(target, key, own.float()))


def expert_loras(model: nn.Module, settings: LoRASettings) -> dict[str, Delta]:
    """A LoRA for every bare parameter that ``target_parameters`` selects, by the names of their modules.

    Raises RecipeError for a pattern that matches none.
    """
    assert settings.target_parameters is not None
    there = bare_parameters(model)
    chosen = select(there, settings.target_parameters, "target_parameters", "parameter outside linear modules")
    modules: dict[str, list[str]] = {}
    for full in chosen:
        owner, _, key = full.rpartition(".")
        modules.setdefault(owner, []).append(key)
    return {owner: ExpertLoRA(model.get_submodule(owner), keys, settings) for owner, keys in modules.items()}
