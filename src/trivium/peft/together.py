"""Linear targets and their LoRAs in one operation, those that read the same input together.

    y_i = W_i x + b_i + s_i B_i A_i x        for q, k and v of an attention, or gate and up of an MLP

The thin products of siblings are one, A = [A_1; A_2; ...]; outputs and the gradient of x are added up inside the
products. Written out, the same is a pass over the tokens for each LoRA's output and three for each gradient. What is
kept is x and A x.

A target's class is not changed: it gets another ``forward`` for a while. The first of some siblings that is called
computes all of them, and hands the others theirs when they are called with that same input; what is not as expected
goes the way of `hub.py`, with the same numbers.

Shapes:  N tokens (all leading dimensions),  in, out: a target's,  r: a LoRA's rank,  R: the sum of the siblings'.
"""

from __future__ import annotations

from collections import defaultdict
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from trivium.model.fast import taken
from trivium.model.quantized import Quantized
from trivium.peft.hub import CHILD, Hub
from trivium.peft.lora import LoRA

# What reads the same input, by the names that models give it.
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"), ("query", "key", "value"), ("w1", "w3"))

_order = {name: (number, place) for number, names in enumerate(SIBLINGS) for place, name in enumerate(names)}


class Group:
    """Targets that may read the same input; what the first has computed for the others, until they ask."""

    def __init__(self, members: list[nn.Module]) -> None:
        self.members = members  # as soon as one of them is given another input, each computes itself
        self.input: Tensor | None = None
        self.waiting: dict[nn.Module, Tensor] = {}

    def call(self, target: nn.Module, x: Tensor) -> Tensor:
        """The output of one target, its LoRA included."""
        if self.input is x and target in self.waiting:
            out = self.waiting.pop(target)
            self.input = x if self.waiting else None
        else:
            if self.waiting:  # for nothing: these do not read the same, as in attention to another sequence
                self.members = []
            deltas = {m: _lora_of(m) for m in self.members}
            if target not in deltas or None in deltas.values():
                deltas = {target: _lora_of(target)}
            outputs = compute(x, deltas)  # type: ignore[arg-type]
            self.waiting = dict(zip(deltas, outputs, strict=True))
            out = self.waiting.pop(target)
            self.input = x if self.waiting else None
        getattr(target, CHILD).done = True
        return out

    def forget(self) -> None:
        self.input, self.waiting = None, {}


class Together:
    """The groups of one model."""

    def __init__(self) -> None:
        self.groups: list[Group] = []
        self.changed: list[nn.Module] = []

    def install(self, model: nn.Module) -> None:
        """Where they are not in it yet."""
        if self.groups:
            return
        for parent in model.modules():
            found: dict[Any, list[nn.Module]] = defaultdict(list)
            for name, child in sorted(parent.named_children(), key=lambda pair: _order.get(pair[0], (0, 0))[1]):
                if isinstance(child, nn.Linear) and hasattr(child, CHILD) and "forward" not in child.__dict__:
                    found[_order[name][0] if name in _order else name].append(child)
            self.groups += [Group(members) for members in found.values()]
        for group in self.groups:
            for member in group.members:
                member.forward = partial(_forward, member, group)
                self.changed.append(member)

    def remove(self) -> None:
        for group in self.groups:
            group.forget()
        for module in self.changed:
            del module.forward
        self.groups, self.changed = [], []


def _forward(target: nn.Module, group: Group, x: Tensor) -> Tensor:
    if _lora_of(target) is None or not taken("linear", x):
        out: Tensor = type(target).forward(target, x)
        return out
    return group.call(target, x)


def _lora_of(target: nn.Module) -> LoRA | None:
    """The one LoRA that acts on a target, where nothing else does and the target itself is not trained."""
    hub: Hub | None = getattr(target, CHILD, None)
    if hub is None or hub.use.spans or hub.use.averaged:
        return None
    acting = [hub[name] for name in hub.use.active if name in hub]
    if len(acting) != 1 or type(acting[0]) is not LoRA:
        return None
    delta = acting[0]
    plain = not any(p.requires_grad for p in (target.weight, target.bias) if p is not None)
    dense = isinstance(target, Quantized) or target.weight.dtype == torch.float32
    drops = delta.dropping and delta.dropout > 0
    return delta if plain and dense and not drops and delta.lora_A.dtype == torch.float32 else None


def compute(x: Tensor, deltas: dict[nn.Module, LoRA]) -> tuple[Tensor, ...]:
    """``x [..., in]`` -> the output ``[..., out]`` of each target under its LoRA."""
    loras = list(deltas.values())
    small = [lora.lora_A for lora in loras] + [lora.lora_B for lora in loras]
    outputs: tuple[Tensor, ...] = _Products.apply(x, list(deltas), [lora.scale for lora in loras], *small)
    return outputs


def _weight(target: nn.Module) -> Tensor:
    return target.unpacked() if isinstance(target, Quantized) else target.get_parameter("weight")


class _Products(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, targets: list[nn.Module], scales: list[float], *small: Tensor) -> Any:
        flat, n = x.reshape(-1, x.shape[-1]), len(targets)
        a, bs = _stacked(small[:n]), small[n:]
        low = flat @ a.t()
        outputs = []
        for target, scale, b, part in zip(targets, scales, bs, _split(low, bs), strict=True):
            out = F.linear(flat, _weight(target), target.bias)  # type: ignore[arg-type]
            outputs.append(out.addmm_(part, b.t(), alpha=scale).view(*x.shape[:-1], -1))
        ctx.targets, ctx.scales, ctx.shape = targets, scales, x.shape
        ctx.save_for_backward(flat, low, *small)
        ctx.set_materialize_grads(False)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        flat, low, *small = ctx.saved_tensors
        n = len(ctx.targets)
        a, bs = _stacked(small[:n]), small[n:]
        grad_low, grad_x = torch.empty_like(low), None
        grad_b: list[Tensor | None] = []
        parts = zip(ctx.targets, ctx.scales, bs, _split(low, bs), _split(grad_low, bs), grads, strict=True)
        for target, scale, b, part, grad_part, grad in parts:
            if grad is None:
                grad_part.zero_()
                grad_b.append(None)
                continue
            grad = grad.reshape(-1, grad.shape[-1])
            torch.mm(grad, b, out=grad_part)
            grad_part.mul_(scale)
            grad_b.append((grad.t() @ part).mul_(scale))
            if ctx.needs_input_grad[0]:
                weight = _weight(target)
                grad_x = grad @ weight if grad_x is None else grad_x.addmm_(grad, weight)
        grad_a = (grad_low.t() @ flat).split([b.shape[1] for b in bs])
        if grad_x is not None:
            grad_x = grad_x.addmm_(grad_low, a).view(ctx.shape)
        return grad_x, None, None, *grad_a, *grad_b


def _stacked(rows: Any) -> Tensor:
    return rows[0] if len(rows) == 1 else torch.cat(list(rows))


def _split(low: Tensor, bs: Any) -> tuple[Tensor, ...]:
    """The part ``[N, r]`` of each sibling of ``[N, R]``."""
    return low.split([b.shape[1] for b in bs], dim=1)
