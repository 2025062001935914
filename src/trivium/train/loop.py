"""The one loop. It does not know which stage it runs, nor what is trained: it is handed functions.

An optimizer step chooses its examples first; packing only arranges them into forests. Each step divides by the total
weight of the whole step, so that neither accumulation nor packing can change the update.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from trivium.errors import DataError, NonFiniteError
from trivium.forest import Forest
from trivium.objectives.base import Objective
from trivium.train.optimizer import set_rate


@dataclass(frozen=True)
class Task:
    """What the loop is handed. ``batches(n)`` gives the forests of step ``n``; ``rate(n)`` its learning-rate factor."""

    objective: Objective
    logprob: Callable[[Forest], Tensor]
    reference: Callable[[Forest], Tensor | None]
    batches: Callable[[int], Iterator[Forest]]
    steps: int
    rate: Callable[[int], float]
    optimizers: list[torch.optim.Optimizer]
    max_grad_norm: float


@dataclass(frozen=True)
class StepLog:
    """One step, as it is written to ``metrics.jsonl``."""

    step: int  # from 1
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    examples: int
    seconds: float
    stats: dict[str, float] = field(default_factory=dict)


def train(task: Task, after_step: Callable[[StepLog], None]) -> None:
    """Run all steps; ``after_step`` logs, evaluates, shows. Raises NonFiniteError before a bad update."""
    parameters = [p for o in task.optimizers for g in o.param_groups for p in g["params"]]
    for number in range(task.steps):
        started = time.perf_counter()
        forests = list(task.batches(number))
        weight = sum(task.objective.weight(f) for f in forests)
        if not weight > 0:
            raise DataError(f"step {number + 1}: nothing to learn in {_rows(forests)}", "check the data's answers")
        sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(()))
        for forest in forests:
            reference = task.reference(forest)
            result = task.objective.compute(task.logprob(forest), forest, reference)
            if len(forest.source):  # else nothing in it is trained, and there is no gradient to take
                (result.sum / weight).backward()
            for name, value in result.stats.items():
                sums[name] = sums[name] + value.cpu()
        stats = {name: float(value) / weight for name, value in sums.items()}
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm))
        _check_finite(number, stats["loss"], norm, forests)
        set_rate(task.optimizers, task.rate(number))
        for optimizer in task.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        after_step(
            StepLog(
                step=number + 1,
                loss=stats.pop("loss"),
                grad_norm=norm,
                learning_rate=task.optimizers[0].param_groups[0]["lr"],
                tokens=sum(len(f.tokens) for f in forests),
                trained_tokens=sum(len(f.source) for f in forests),
                examples=sum(len(f.examples) for f in forests),
                seconds=time.perf_counter() - started,
                stats=stats,
            )
        )


def _check_finite(number: int, loss: float, norm: float, forests: list[Forest]) -> None:
    if loss - loss == 0 and norm - norm == 0:  # neither NaN nor infinite
        return
    what = "loss" if loss - loss != 0 else "gradient"
    raise NonFiniteError(
        f"step {number + 1}: the {what} is not finite ({loss if what == 'loss' else norm}); rows: {_rows(forests)}",
        "lower the learning rate, or look at these rows; the weights before this step are untouched",
    )


def _rows(forests: list[Forest]) -> str:
    origins = [e.origin for f in forests for e in f.examples]
    return ", ".join(origins[:4]) + (f" and {len(origins) - 4} more" if len(origins) > 4 else "")
