"""Bottleneck adapters: narrow two-layer networks put after chosen blocks of every layer.

    adapter(h) = h + U f(D h + b_d) + b_u         D: [r, d],  U: [d, r];  U and b_u zero at the start

on the output of a block, before the residual addition (Houlsby et al. 2019, "Parameter-Efficient Transfer Learning
for NLP", section 2.1: after attention and after the MLP; Pfeiffer et al. 2021, "AdapterFusion", section 4.1: after
the MLP only). 2dr + r + d trained weights per adapter. Houlsby also trains the layer norms: with ``layer_norms`` a
gain and a shift are put on each norm's output, which is the same family of functions and leaves the base's own
weights alone. Non-linear, so never merged: an adapter is kept, saved and served with its base.

Shapes:  N tokens (all leading dimensions),  d: width of the residual stream,  r: width of the bottleneck.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import ModelError, RecipeError
from trivium.peft import targets
from trivium.peft.base import Delta, Plan
from trivium.peft.settings import ALL_LINEAR, BottleneckSettings

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {"gelu": F.gelu, "relu": F.relu, "silu": F.silu}


class Bottleneck(Delta):
    """``h + U f(D h + b_d) + b_u`` on the output ``h`` of one block; of a tuple, on its first element."""

    def __init__(self, d: int, settings: BottleneckSettings) -> None:
        super().__init__()
        self.non_linearity, self.dropout = settings.non_linearity, settings.dropout
        self.down = nn.Parameter(torch.empty(settings.r, d, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.empty(settings.r, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(d, settings.r, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.empty(d, dtype=torch.float32))

    def reset(self, generator: torch.Generator) -> None:
        start = torch.empty(self.down.shape)
        nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
        with torch.no_grad():
            self.down.copy_(start)
            for zero in (self.down_bias, self.up, self.up_bias):
                zero.zero_()

    def forward(self, inputs: tuple[Any, ...], output: Any) -> Any:
        """``[..., d]``, or a tuple that begins with it, to the same; in the dtype of the output."""
        if isinstance(output, tuple):
            return (self.forward(inputs, output[0]), *output[1:])
        dtype = output.dtype
        narrow = FUNCTIONS[self.non_linearity](F.linear(output, self.down.to(dtype), self.down_bias.to(dtype)))
        if self.dropping and self.dropout > 0:
            narrow = F.dropout(narrow, self.dropout)
        return output + F.linear(narrow, self.up.to(dtype), self.up_bias.to(dtype)).to(dtype)

    def obstacle(self, target: nn.Module) -> ModelError | None:
        return _cannot_merge()

    def merge(self, target: nn.Module) -> None:
        raise _cannot_merge()


class NormScale(Delta):
    """``g * h + s`` on the output of a norm; ``s`` only where the norm has a bias. g = 1 and s = 0 at the start."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        self.gain = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32))
        has_bias = getattr(norm, "bias", None) is not None
        self.shift = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32)) if has_bias else None

    def reset(self, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.gain.fill_(1)
            if self.shift is not None:
                self.shift.zero_()

    def forward(self, inputs: tuple[Any, ...], output: Tensor) -> Tensor:
        scaled = output * self.gain.to(output.dtype)
        return scaled if self.shift is None else scaled + self.shift.to(output.dtype)

    def obstacle(self, target: nn.Module) -> ModelError | None:
        return _cannot_merge()

    def merge(self, target: nn.Module) -> None:
        raise _cannot_merge()


def _cannot_merge() -> ModelError:
    return ModelError(
        "bottleneck adapters are non-linear and cannot be merged into the base",
        "Keep the adapter folder beside its base, or train with method: {name: lora}, which can be merged.",
    )


def build(model: nn.Module, settings: BottleneckSettings) -> Plan:
    """An adapter on every block of the placement (or of ``target_modules``), and on the norms if wanted."""
    layers = targets.decoder_layers(model)
    made: dict[str, Delta] = {}
    for name in _places(model, layers, settings):
        module = model.get_submodule(name)
        # A block's output has the width of the residual stream; a single linear module's has its own.
        size = targets.linear_shape(module)[1] if isinstance(module, targets.LINEAR) else targets.width(model)
        made[name] = Bottleneck(size, settings)
    if settings.layer_norms:
        made.update({name: NormScale(model.get_submodule(name)) for name in _norms(layers, list(made), settings)})
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return Plan(dict(sorted(made.items(), key=lambda pair: order[pair[0]])))


def _places(model: nn.Module, layers: dict[str, nn.Module], settings: BottleneckSettings) -> list[str]:
    """The names of the modules that an adapter comes after."""
    if settings.target_modules is None:
        wanted = (targets.ATTENTION, targets.MLP) if settings.placement == "houlsby" else (targets.MLP,)
        return [targets.block(name, layer, names) for name, layer in layers.items() for names in wanted]
    if settings.target_modules == ALL_LINEAR:
        raise RecipeError(
            f"target_modules of a bottleneck is {ALL_LINEAR!r}", "Leave it out, and choose a placement instead."
        )
    inside = tuple(f"{name}." for name in layers)
    candidates = {name: module for name, module in targets.linears(model).items() if name.startswith(inside)}
    for name, layer in layers.items():
        for own, child in layer.named_children():
            if own in (*targets.ATTENTION, *targets.MLP):
                candidates[f"{name}.{own}"] = child
    return targets.select(candidates, settings.target_modules)


def _norms(layers: dict[str, nn.Module], places: list[str], settings: BottleneckSettings) -> list[str]:
    """The norms of the adapted layers: all of them, and under ``pfeiffer`` the last one, which is the MLP's."""
    found = []
    for name, layer in layers.items():
        own = [f"{name}.{child}" for child, module in layer.named_children() if "norm" in type(module).__name__.lower()]
        if any(place.startswith(f"{name}.") for place in places):
            found += own[-1:] if settings.placement == "pfeiffer" else own
    return found
