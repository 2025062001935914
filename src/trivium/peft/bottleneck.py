"""Bottleneck adapters: narrow two-layer networks put after, or beside, chosen blocks of every layer.

    sequential:  h + U f(D h + b_d) + b_u              h: the block's output
    parallel:    h + s (U f(D x + b_d) + b_u)          x: the block's input

before the residual addition; U and b_u are zero at the start. Sequential after attention and after the MLP (Houlsby
et al. 2019, "Parameter-Efficient Transfer Learning for NLP", section 2.1) or after the MLP only (Pfeiffer et al. 2021,
"AdapterFusion", section 4.1); parallel to the MLP (He et al. 2022, "Towards a Unified View of Parameter-Efficient
Transfer Learning", table 1 and section 4.6: scaled by s = 4). D: [r, d], U: [d, r]: 2dr + r + d trained weights each.
AdapterDrop (Rücklé et al. 2021) leaves out the lowest layers, below which no gradient is computed. Houlsby also trains
the layer norms: with ``layer_norms`` a gain and a shift are put on each norm's output, which is the same family of
functions and leaves the base's own weights alone. Non-linear, so never merged.

Shapes:  N tokens (all leading dimensions),  d: width of the residual stream,  r: width of the bottleneck.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from trivium.errors import ModelError, RecipeError
from trivium.peft import targets
from trivium.peft.checks import ALL_LINEAR
from trivium.peft.delta import Delta, Plan, kaiming
from trivium.peft.kinds import BottleneckSettings

FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu, "relu": F.relu, "silu": F.silu, "tanh": torch.tanh,
}  # fmt: skip


class NonLinear(Delta):
    """What cannot be merged."""

    def obstacle(self, target: nn.Module) -> ModelError | None:
        return ModelError(
            "bottleneck adapters are non-linear and cannot be merged into the base",
            "keep the adapter folder beside its base, or train with method: {name: lora}, which can be merged",
        )


class Bottleneck(NonLinear):
    """The narrow network of one block."""

    def __init__(self, n_in: int, n_out: int, r: int, settings: BottleneckSettings) -> None:
        super().__init__()
        self.non_linearity, self.dropout = settings.non_linearity, settings.dropout
        self.parallel, self.scale = settings.placement == "parallel", settings.scale
        self.down = nn.Parameter(torch.empty(r, n_in, dtype=torch.float32))
        self.down_bias = nn.Parameter(torch.empty(r, dtype=torch.float32))
        self.up = nn.Parameter(torch.empty(n_out, r, dtype=torch.float32))
        self.up_bias = nn.Parameter(torch.empty(n_out, dtype=torch.float32))

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        kaiming(self.down, generator)
        with torch.no_grad():
            for zero in (self.down_bias, self.up, self.up_bias):
                zero.zero_()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """``output [..., d]`` to the same; in its dtype."""
        dtype = output.dtype
        read = x.to(dtype) if self.parallel else output
        narrow = FUNCTIONS[self.non_linearity](F.linear(read, self.down.to(dtype), self.down_bias.to(dtype)))
        if self.dropping and self.dropout > 0:
            narrow = F.dropout(narrow, self.dropout)
        wide = F.linear(narrow, self.up.to(dtype), self.up_bias.to(dtype)).to(dtype)
        return output + (wide if self.scale == 1 else self.scale * wide)


class NormScale(NonLinear):
    """``g * h + s`` on the output of a norm; ``s`` only where the norm has a bias. g = 1 and s = 0 at the start."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        weight = norm.get_parameter("weight")
        self.gain = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32))
        has_bias = getattr(norm, "bias", None) is not None
        self.shift = nn.Parameter(torch.empty(weight.shape, dtype=torch.float32)) if has_bias else None

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        with torch.no_grad():
            self.gain.fill_(1)
            if self.shift is not None:
                self.shift.zero_()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        scaled = output * self.gain.to(output.dtype)
        return scaled if self.shift is None else scaled + self.shift.to(output.dtype)


def build(model: nn.Module, settings: BottleneckSettings) -> Plan:
    """An adapter on every block of the placement (or of ``target_modules``), and on the norms if wanted."""
    r = settings.width_in(targets.width(model))
    layers = upper_layers(model, settings.skip_layers)
    made: dict[str, Delta] = {}
    for name in _places(model, layers, settings):
        module = model.get_submodule(name)
        # A block reads and writes the residual stream; a single linear module has widths of its own.
        d = targets.width(model)
        n_in, n_out = targets.linear_shape(module) if isinstance(module, targets.LINEAR) else (d, d)
        made[name] = Bottleneck(n_in if settings.placement == "parallel" else n_out, n_out, r, settings)
    if settings.layer_norms:
        made.update({name: NormScale(model.get_submodule(name)) for name in _norms(layers, list(made), settings)})
    order = {name: index for index, (name, _) in enumerate(model.named_modules())}
    return Plan(dict(sorted(made.items(), key=lambda pair: order[pair[0]])))


def upper_layers(model: nn.Module, skip: int) -> dict[str, nn.Module]:
    """The decoder layers but for the lowest ``skip``. Raises RecipeError where none is left."""
    layers = targets.decoder_layers(model)
    if skip >= len(layers):
        raise RecipeError(
            f"skip_layers is {skip}, and the model has {len(layers)} layers", f"skip at most {len(layers) - 1}"
        )
    return dict(list(layers.items())[skip:])


def blocks(layers: dict[str, nn.Module], placement: str) -> list[str]:
    """The names of the blocks that a placement means."""
    wanted = (targets.ATTENTION, targets.MLP) if placement == "houlsby" else (targets.MLP,)
    return [targets.block(name, layer, names) for name, layer in layers.items() for names in wanted]


def _places(model: nn.Module, layers: dict[str, nn.Module], settings: BottleneckSettings) -> list[str]:
    """The names of the modules that an adapter comes after, or beside."""
    if settings.target_modules is None:
        places = blocks(layers, settings.placement)
        parts = [name for name in places if isinstance(model.get_submodule(name), targets.LINEAR)]
        if settings.placement == "parallel" and parts:
            raise ModelError(
                f"{parts[0]} is only the last part of an MLP that is no module here, so nothing can run beside it",
                "use placement: pfeiffer, or name modules in target_modules",
            )
        return places
    if settings.target_modules == ALL_LINEAR:
        raise RecipeError(
            f"target_modules of a bottleneck is {ALL_LINEAR!r}", "leave it out, and choose a placement instead"
        )
    inside = tuple(f"{name}." for name in layers)
    candidates = {name: module for name, module in targets.linears(model).items() if name.startswith(inside)}
    for name, layer in layers.items():
        for own, child in layer.named_children():
            if own in (*targets.ATTENTION, *targets.MLP):
                candidates[f"{name}.{own}"] = child
    return targets.select(candidates, settings.target_modules)


def _norms(layers: dict[str, nn.Module], places: list[str], settings: BottleneckSettings) -> list[str]:
    """The norms of the adapted layers: under ``houlsby`` all of them, else the last one, which is the MLP's."""
    found = []
    for name, layer in layers.items():
        own = [f"{name}.{child}" for child, module in layer.named_children() if "norm" in type(module).__name__.lower()]
        if any(place.startswith(f"{name}.") for place in places):
            found += own if settings.placement == "houlsby" else own[-1:]
    return found
