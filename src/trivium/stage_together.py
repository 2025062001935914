"""What several processes must have in common before they train a stage, and when they go on or end.

The first one proves, reads checkpoints and decides; what the others need of that reaches them here.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from trivium.data.loader import RunOrder
from trivium.data.store import Examples
from trivium.files import sha256_json
from trivium.forest import Example
from trivium.model.language_model import LanguageModel
from trivium.model.proof import Proof
from trivium.proven import proof_of, proven
from trivium.train import snapshot
from trivium.train.processes import Processes
from trivium.train.reference import NoReference


def proven_by_first(
    others: Processes, model: LanguageModel, rows: list[Example], weights: Sequence[Any] | None
) -> tuple[Proof, bool]:
    """`proven`, by the first process for all. Raises ModelError."""

    def prove() -> tuple[dict[str, Any], bool]:
        proof, before = proven(model, rows, weights)
        return asdict(proof), before

    told, before = others.led(prove)
    return proof_of(told), before


def plan_of(order: RunOrder, used: Examples) -> str:
    """A hash of which rows each step takes, and how they are packed."""
    numbers = hashlib.sha256(used.numbers.astype("<i8").tobytes() + order.sizes.astype("<i8").tobytes()).hexdigest()
    return sha256_json([used.store.key, numbers, asdict(order.batching), len(order)])


def go_on_alike(
    others: Processes, model: nn.Module, optimizers: list[torch.optim.Optimizer], reference: NoReference, done: int
) -> int:
    """The state that the first process has read from a checkpoint, in all; returns the number of steps behind it.

    Costs a copy of the trained weights and the moments on the CPU. Which rows come next needs no state, and what each
    process drops out is a function of the seed and the step.
    """
    done = others.led(lambda: done)
    if done and others.count > 1:

        def taken() -> dict[str, torch.Tensor]:
            device = str(next(model.parameters()).device)
            groups = {**snapshot.take(model, optimizers, device, copy=False), "reference": reference.tensors()}
            return {f"{group}/{n}": t for group, tensors in groups.items() for n, t in tensors.items()}

        found = others.same(taken)
        if not others.first:
            groups: snapshot.Taken = {"weights": {}, "optimizer": {}, "rng": {}, "reference": {}}
            for full, tensor in found.items():
                group, name = full.split("/", 1)
                groups[group][name] = tensor
            snapshot.put_back(groups, model, optimizers, "cpu")
            reference.put_back(groups["reference"])
    return done


def same_in_the_end(others: Processes, model: nn.Module) -> None:
    """Every process has made the same updates, to the last bit."""
    assert not others.differing(model), "the processes' weights have come apart"
