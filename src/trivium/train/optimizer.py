"""AdamW for everything, or Muon for the hidden matrices and AdamW for the rest.

Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, "Muon is Scalable for LLM Training", eq. 4): the momentum of a
matrix is orthogonalised by a Newton-Schulz iteration and scaled by 0.2 sqrt(max(rows, columns)), which gives the
update the root mean square of AdamW's, so that one learning rate serves both.

Shapes:  R rows,  C columns of a matrix,  n matrices of one shape (they are orthogonalised together).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

BETAS = (0.9, 0.95)
MOMENTUM = 0.95
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum, orthogonalised. Takes matrices only; float32 on the CPU, bfloat16 products on CUDA."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            alike: dict[tuple[int, ...], list[Tensor]] = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    alike[tuple(p.shape)].append(p)
            for shape, params in alike.items():
                for p in params:
                    self.state[p].setdefault("momentum", torch.zeros_like(p)).lerp_(p.grad, 1 - MOMENTUM)
                grads = [p.grad for p in params if p.grad is not None]
                looked_ahead = [g.lerp(self.state[p]["momentum"], MOMENTUM) for g, p in zip(grads, params, strict=True)]
                updates = orthogonalised(torch.stack(looked_ahead)).mul_(0.2 * max(shape) ** 0.5)
                for p, update in zip(params, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).sub_(update, alpha=group["lr"])


def orthogonalised(matrices: Tensor, steps: int = 5) -> Tensor:
    """``[n, R, C]`` -> nearly orthogonal matrices of the same singular vectors, singular values near 1."""
    a, b, c = NEWTON_SCHULZ
    x = matrices.bfloat16() if matrices.is_cuda else matrices.float()
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x.mT if tall else x).to(matrices.dtype)


def build_optimizers(
    model: nn.Module,
    hidden: set[str],
    name: str,
    lr: float,
    weight_decay: float,
    rates: Mapping[str, float] | None = None,
) -> list[torch.optim.Optimizer]:
    """The optimizers of ``model``'s trained parameters; every group keeps its peak rate under ``peak_lr``.

    ``hidden`` names the parameters inside the decoder layers: Muon takes the matrices among them. Weight decay is on
    matrices; biases, norms and embeddings have none. ``rates`` are factors on the rate, of those that want another.
    """
    rates = rates or {}
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    muon = {n for n, p in trained.items() if name == "muon" and n in hidden and p.dim() == 2}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    alike: dict[tuple[bool, float, bool], list[Tensor]] = defaultdict(list)  # those of the stage's own rate first
    for n, p in trained.items():
        if n not in muon:
            factor = rates.get(n, 1.0)
            alike[factor != 1, factor, p.dim() < 2 or id(p) in embeddings].append(p)
    groups: list[dict[str, Any]] = [
        {"params": params, "weight_decay": 0.0 if plain else weight_decay, "factor": factor}
        for (_, factor, plain), params in sorted(alike.items(), key=lambda pair: pair[0])
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for g in groups for p in g["params"])
        optimizers.append(torch.optim.AdamW(groups, lr=lr, betas=BETAS, eps=1e-8, fused=fused))
    if muon:
        optimizers.append(Muon([trained[n] for n in sorted(muon)], lr, weight_decay))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = lr * group.pop("factor", 1.0)
    return optimizers


def set_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
