"""The gated unit of today's MLPs (Shazeer 2020, "GLU Variants Improve Transformer", equation 5): act(gate) * up.

It keeps gate and up, and computes their product again in the backward pass, for the projection behind it as well: two
passes over the tokens instead of the widest tensor of a layer kept.

Shapes:  N tokens (all leading dimensions),  F the MLP's inner width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Activation:
    """A function, and its gradient: (gradient of the output, input) -> gradient of the input."""

    forward: Callable[[Tensor], Tensor]
    backward: Callable[[Tensor, Tensor], Tensor]


def _gelu(approximate: str) -> Activation:
    return Activation(
        lambda x: F.gelu(x, approximate=approximate),
        lambda grad, x: torch.ops.aten.gelu_backward(grad, x, approximate=approximate),
    )


ACTIVATIONS = (Activation(F.silu, torch.ops.aten.silu_backward), _gelu("tanh"), _gelu("none"))


class Gated(torch.autograd.Function):
    """``gate, up [..., F]`` -> ``[..., F]``."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.activation = activation
        ctx.save_for_backward(gate, up)
        return activation.forward(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        grad_up = ctx.activation.forward(gate).mul_(grad)
        return ctx.activation.backward(grad * up, gate), grad_up, None


_as_it_is: list[None] = []  # not empty: what autograd keeps is kept as it is


@contextlib.contextmanager
def kept_as_it_is() -> Iterator[None]:
    """Within the block the input of the projection behind is kept by autograd as any other tensor is."""
    _as_it_is.append(None)
    try:
        yield
    finally:
        _as_it_is.pop()


def gated_mlp(module: Any, x: Tensor, activation: Activation) -> Tensor:
    """``down(act(gate(x)) * up(x))``, whatever hangs on the three."""
    gate, up = module.gate_proj(x), module.up_proj(x)
    inner = Gated.apply(gate, up, activation)
    if _as_it_is or not torch.is_grad_enabled() or not inner.requires_grad:
        out: Tensor = module.down_proj(inner)
        return out
    at, size, kept = inner.data_ptr(), inner.numel(), (gate.detach(), up.detach())

    def pack(tensor: Tensor) -> Any:
        own = tensor.data_ptr() == at and tensor.numel() == size and tensor.is_contiguous()
        return (kept, tensor.shape) if own else tensor

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        (gate, up), shape = packed
        return activation.forward(gate).mul_(up).view(shape)

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        out = module.down_proj(inner)
    return out


def is_gated(module: nn.Module) -> bool:
    """Whether a module may be such an MLP: the three projections, the function, and no weight besides."""
    names = {name for name, _ in module.named_children()}
    return {"gate_proj", "up_proj", "down_proj"} <= names and not module._parameters and not module._buffers
