"""BitFit: only the biases are trained (Ben Zaken et al. 2022, "BitFit", section 3).

Those in the decoder layers, of linear modules and of norms. Today's decoders (Llama and its kin) have none: such a
model gets a bias behind every linear module of its layers, zero at the start, which is the same family of functions
as if it had been built with biases. It cannot be merged, as the architecture has no place for it.

Shapes:  N tokens (all leading dimensions),  out: the target's.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.peft.copies import own_tensors
from trivium.peft.delta import Delta, Plan
from trivium.peft.hub import CHILD
from trivium.peft.kinds import BitFitSettings
from trivium.peft.targets import decoder_layers, find_targets, linear_shape


class AddedBias(Delta):
    """``output + bias`` behind a linear module without one."""

    def __init__(self, target: nn.Module) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.empty(linear_shape(target)[1], dtype=torch.float32))

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        return output + self.bias.to(output.dtype)

    def obstacle(self, target: nn.Module) -> ModelError | None:
        return ModelError(
            "this architecture has no biases into which those of bitfit could be merged",
            "keep the adapter folder beside its base, or train with method: {name: lora}, which can be merged",
        )


def build(model: nn.Module, settings: BitFitSettings) -> Plan:
    """Every bias in the layers; where there is none, one behind every linear module of them."""
    names = [
        f"{layer}.{own}" if own else layer
        for layer, module in decoder_layers(model).items()
        for own, _ in module.named_modules()
        if CHILD not in own.split(".")
    ]
    there = own_tensors(model, names, of=("bias",))
    if there:
        return Plan(there)
    added: dict[str, Delta] = {n: AddedBias(model.get_submodule(n)) for n in find_targets(model, "all-linear")}
    return Plan(added, ["this model has no biases: bitfit adds one behind every linear module of its layers"])
