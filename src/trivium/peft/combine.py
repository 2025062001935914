"""Several LoRAs of one base into one.

    cat        the weighted sum of the updates, exact; the ranks add up
    linear     factors added under the roots of their weights (PEFT's "linear"): the products of one's B with another's
               A come in as well; for LoRAs that share a start
    svd        the best approximation of the weighted sum of a given rank (Eckart and Young 1936)
    ties       trim, elect a sign, average those that agree (Yadav et al. 2023, "TIES-Merging", section 4)
    dare       drop at random and rescale, then add (Yu et al. 2024, "Language Models are Super Mario")
    dare_ties  drop at random and rescale, then elect and average

The papers of the last three trim and drop entries of *updates*, so they are done on B A and not on B and A, and the
best approximation of the result is taken: PEFT's "ties_svd", "dare_linear_svd", "dare_ties_svd".

Shapes:  in, out: a module's,  r: rank,  n: LoRAs.   Cost of the last three: a full decomposition for each module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trivium.errors import RecipeError, listed, nearest

HOW = ("cat", "linear", "svd", "ties", "dare", "dare_ties")
SPARSE = ("ties", "dare", "dare_ties")


@dataclass(frozen=True, eq=False)
class Factors:
    """One module's update, ``scale * B @ A``: A ``[r, in]``, B ``[out, r]``."""

    A: Tensor
    B: Tensor
    scale: float = 1.0

    def update(self) -> Tensor:
        """``[out, in]``, float32."""
        return self.scale * (self.B.float() @ self.A.float())


def combine(
    loras: Sequence[Mapping[str, Factors]],
    weights: Sequence[float],
    how: str = "cat",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
) -> dict[str, Factors]:
    """One LoRA, of scale 1, by module; a module that only some adapt gets nothing from the others.

    ``rank`` of the result, left out the largest there is, is for ``svd``, ``ties`` and ``dare``; ``density``, the share
    of entries that are kept, for ``ties`` and ``dare``; ``seed`` for what ``dare`` drops. Raises RecipeError.
    """
    _check(loras, weights, how, rank, density)
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Factors] = {}
    for target in dict.fromkeys(name for lora in loras for name in lora):
        pairs = [(lora[target], w) for lora, w in zip(loras, weights, strict=True) if target in lora]
        parts, own = [part for part, _ in pairs], [w for _, w in pairs]
        _check_shapes(target, parts)
        r = rank or max(len(part.A) for lora in loras for part in lora.values())
        if how == "cat":
            made[target] = _cat(parts, own)
        elif how == "linear":
            made[target] = _linear(parts, own, target)
        elif how == "svd":
            made[target] = _best_of(_cat(parts, own), r)
        else:
            made[target] = _best(_sparse(how, parts, own, float(density or 1), generator), r)
    return made


def _check(
    loras: Sequence[Mapping[str, Factors]], weights: Sequence[float], how: str, rank: int | None, density: float | None
) -> None:
    if not any(loras):
        raise RecipeError("there is no LoRA to combine", "give at least one")
    if how not in HOW:
        raise RecipeError(f"how: there is no {how!r}{nearest(how, HOW)}", f"it is one of {listed(HOW)}")
    if len(weights) != len(loras) or not all(math.isfinite(w) for w in weights):
        raise RecipeError(f"weights {list(weights)} for {len(loras)} LoRAs", "give a finite number for each")
    if (density is None) == (how in SPARSE) or (density is not None and not 0 < density <= 1):
        remedy = "density is the share of entries that ties and dare keep, above 0 and up to 1; no other way has one"
        raise RecipeError(f"{how} with density {density}", remedy)
    if rank is not None and (how in ("cat", "linear") or rank < 1):
        raise RecipeError(f"{how} with rank {rank}", "rank is 1 or more, for svd, ties and dare; else leave it out")


def _check_shapes(target: str, parts: list[Factors]) -> None:
    for part in parts:
        a, b = tuple(part.A.shape), tuple(part.B.shape)
        if len(a) != 2 or len(b) != 2 or a[0] != b[1]:
            raise RecipeError(f"{target}: A {a} and B {b} are no factors", "A is (r, in) and B is (out, r)")
    shapes = {(len(part.B), part.A.shape[1]) for part in parts}
    if len(shapes) > 1:
        raise RecipeError(f"{target} is {' and '.join(map(str, sorted(shapes)))}", "combine adapters of one base")


def _cat(parts: list[Factors], weights: list[float]) -> Factors:
    """The sum of ``w * scale * B @ A`` itself, as one product of factors side by side."""
    a = torch.cat([part.A.float() for part in parts])
    return Factors(a, torch.cat([w * part.scale * part.B.float() for part, w in zip(parts, weights, strict=True)], 1))


def _linear(parts: list[Factors], weights: list[float], target: str) -> Factors:
    """``sum(root * B) @ sum(root * A)``, the roots those of ``w * scale``; PEFT's "linear"."""
    if len({len(part.A) for part in parts}) > 1:
        ranks = ", ".join(str(len(part.A)) for part in parts)
        raise RecipeError(f"linear: the ranks of {target} differ ({ranks})", "use svd or cat, which take any ranks")
    factors = [w * part.scale for part, w in zip(parts, weights, strict=True)]
    roots = [math.copysign(abs(factor) ** 0.5, factor) for factor in factors]
    # a minus stands on one side only, or it would cancel; on A as in PEFT: it decides the signs of the cross terms
    a = torch.stack([root * part.A.float() for part, root in zip(parts, roots, strict=True)]).sum(0)
    return Factors(a, torch.stack([abs(root) * part.B.float() for part, root in zip(parts, roots, strict=True)]).sum(0))


def _best_of(whole: Factors, r: int) -> Factors:
    """The best approximation of rank ``r`` of a product of thin factors, which is never written out."""
    qb, rb = torch.linalg.qr(whole.B)
    qa, ra = torch.linalg.qr(whole.A.t())
    core = _best(rb @ ra.t(), r)
    return Factors(core.A @ qa.t(), qb @ core.B)


def _best(update: Tensor, r: int) -> Factors:
    """The best approximation of rank ``r`` of an update ``[out, in]``."""
    u, s, vt = torch.linalg.svd(update, full_matrices=False)
    return Factors(vt[:r].contiguous(), u[:, :r] * s[:r])


def _sparse(how: str, parts: list[Factors], weights: list[float], density: float, generator: torch.Generator) -> Tensor:
    """What becomes of the updates ``n x [out, in]``: one."""
    updates = torch.stack([part.update() for part in parts])
    kept = _trimmed(updates, density) if how == "ties" else _dropped(updates, density, generator)
    weighted = torch.tensor(weights, device=kept.device).view(-1, 1, 1) * kept
    if how == "dare":
        return weighted.sum(0)
    elected = torch.where(kept.sum(0) >= 0, 1.0, -1.0)  # the sign with the greater total
    agree = kept.sign() == elected
    return (weighted * agree).sum(0) / agree.sum(0).clamp_min(1)


def _trimmed(updates: Tensor, density: float) -> Tensor:
    """Each update's largest entries, a share ``density`` of them."""
    if density == 1:
        return updates
    flat = updates.flatten(1)
    top = flat.abs().topk(int(density * flat.shape[1]), dim=1).indices
    return torch.zeros_like(flat).scatter(1, top, flat.gather(1, top)).view_as(updates)


def _dropped(updates: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """A share ``density`` of the entries at random, scaled so that the mean stays."""
    drawn = torch.rand(updates.shape, generator=generator).to(updates.device)
    return updates * (drawn < density) / density
