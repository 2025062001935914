"""What a method is made of: deltas, small trained modules hung under the base's own; and the plan that names them.

See `base.py` for what can be done with them, and `hub.py` for how they act.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from trivium.errors import ModelError
from trivium.virtual import Virtual


class Delta(nn.Module):
    """One trained module under one target. A method overrides what it changes: input, tensors, or output.

    The constructor makes float32 weights of the right shapes (it runs on ``meta``), ``reset`` fills all of them. What
    is fixed but belongs to the adapter is a buffer. ``dropping`` says whether dropout acts: the base stays in
    evaluation mode while its deltas train, so ``training`` cannot say it.
    """

    token_wise = True  # whether it treats every token by itself, so that it may act on some of a line only
    changes_input = False  # whether ``inputs`` does anything
    exact = False  # whether rounding its weights would show, as they are as large as the base's: saved in float32
    starts_as_base = True  # whether ``reset`` makes it change nothing

    def __init__(self) -> None:
        super().__init__()
        self.dropping = False
        self.dropout = 0.0

    def reset(self, target: nn.Module, generator: torch.Generator) -> None:
        """Fill every weight in place, drawing on the CPU's ``generator``."""
        raise NotImplementedError

    def derive(self, target: nn.Module) -> None:
        """Compute what follows from the frozen ``target`` alone, once it is hung; most have nothing to."""

    def inputs(self, x: Tensor) -> Tensor:
        """The target's input, changed."""
        return x

    def tensors(self, target: nn.Module, name: str, tensor: Tensor) -> Tensor:
        """One of the target's own tensors, changed; for those that ``replaces`` names."""
        return tensor

    @property
    def replaces(self) -> tuple[str, ...]:
        """The target's own tensors that others take the place of, while it is called."""
        return ()

    def forward(self, target: nn.Module, x: Tensor, output: Tensor) -> Tensor:
        """The target's output, changed; ``x`` is its input."""
        return output

    def rates(self) -> dict[str, float]:
        """Factors on the learning rate, by weight; those not named have 1."""
        return {}

    def virtual(self) -> Virtual | None:
        """Its part of the adapter's virtual tokens."""
        return None

    def obstacle(self, target: nn.Module) -> ModelError | None:
        """Why this method cannot be merged into ``target``, or None."""
        return None

    def merge(self, target: nn.Module) -> None:
        """Fold into ``target``'s own tensors, computed in float32, where there is no obstacle."""
        raise NotImplementedError

    @property
    def changes(self) -> tuple[str, ...]:
        """The target's tensors that merging changes."""
        return self.replaces or ("weight",)


def kaiming(parameter: Tensor, generator: torch.Generator) -> None:
    """Fill in place as `nn.Linear` does, drawing on the CPU: the start of what is multiplied with inputs."""
    start = torch.empty(parameter.shape)
    nn.init.kaiming_uniform_(start, a=math.sqrt(5), generator=generator)
    with torch.no_grad():
        parameter.copy_(start)


@dataclass(frozen=True)
class Plan:
    """What a method's ``build`` returns: a delta for each target's name, and what the user should know.

    ``fill`` is the start of a method that must look at the whole model for it, instead of every delta's ``reset``.
    """

    deltas: dict[str, Delta]
    notes: list[str] = field(default_factory=list)
    fill: Callable[[nn.Module, dict[str, Delta], torch.Generator], None] | None = None
