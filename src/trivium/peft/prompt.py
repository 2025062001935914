"""Prompt tuning: trained embeddings before every sequence (Lester et al. 2021, "The Power of Scale for
Parameter-Efficient Prompt Tuning", section 2).

P * D trained weights, which start as the embeddings of tokens drawn from the vocabulary (section 2.1, "sampled
vocabulary"). In a forest they are one root above all trees (`virtual.py`), computed once for all of a batch.

Shapes:  P virtual tokens,  D width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.peft.delta import Delta, Plan
from trivium.peft.kinds import PromptSettings
from trivium.peft.targets import width
from trivium.virtual import Virtual


class NoPlace(Delta):
    """What acts as virtual tokens, and on no module's output: it cannot be merged."""

    starts_as_base = False

    def obstacle(self, target: nn.Module) -> ModelError | None:
        return ModelError(
            "virtual tokens are no part of any weight and cannot be merged into the base",
            "keep the adapter folder beside its base, or train with method: {name: lora}, which can be merged",
        )


class Prompt(NoPlace):
    """The embeddings; they hang under the model's own."""

    def __init__(self, tokens: int, d: int) -> None:
        super().__init__()
        self.embeddings = nn.Parameter(torch.empty(tokens, d, dtype=torch.float32))

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        weight = target.get_parameter("weight")
        ids = torch.randint(len(weight), (len(self.embeddings),), generator=generator)
        with torch.no_grad():
            self.embeddings.copy_(target(ids.to(weight.device)))  # by a call, as some models scale what they look up

    def virtual(self) -> Virtual:
        return Virtual(len(self.embeddings), embeddings=self.embeddings)


def build(model: nn.Module, settings: PromptSettings) -> Plan:
    """The embeddings of ``num_virtual_tokens``. Raises ModelError for a model whose layers look tokens up, too."""
    refuse_lookups(model, "prompt")
    own: Tensor = model.get_input_embeddings()  # type: ignore[operator]
    name = next(name for name, module in model.named_modules() if module is own)
    return Plan({name: Prompt(settings.num_virtual_tokens, width(model))})


def refuse_lookups(model: nn.Module, method: str) -> None:
    """Models whose layers have embeddings of their own need a token at every place."""
    if getattr(model.config, "hidden_size_per_layer_input", 0):
        raise ModelError(
            f"{method}: the layers of {type(model).__name__} look every token up, and a virtual token is none",
            "choose another method",
        )
