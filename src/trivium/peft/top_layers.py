"""Only the uppermost decoder layers are trained, whole: the oldest way to train less (Houlsby et al. 2019, section 3.2,
compare adapters with it).

Cost: the backward pass ends below them, so that it is also the fastest way.
"""

from __future__ import annotations

from torch import nn

from trivium.errors import RecipeError
from trivium.peft.copies import own_tensors
from trivium.peft.delta import Plan
from trivium.peft.hub import CHILD
from trivium.peft.kinds import TopLayersSettings
from trivium.peft.targets import decoder_layers


def build(model: nn.Module, settings: TopLayersSettings) -> Plan:
    """A copy of every tensor in the last ``layers`` decoder layers. Raises RecipeError where there are fewer."""
    layers = decoder_layers(model)
    if settings.layers > len(layers):
        raise RecipeError(f"layers is {settings.layers}, the model has {len(layers)}", "train with method: full")
    top = list(layers.items())[-settings.layers :]
    names = [
        f"{path}.{own}" if own else path
        for path, layer in top
        for own, _ in layer.named_modules()
        if CHILD not in own.split(".")
    ]
    return Plan(own_tensors(model, names))
