"""The one loop. It does not know which stage it runs, nor what is trained: it is handed functions.

An optimizer step chooses its examples first; packing only arranges them into forests. Each step divides by the total
weight of the whole step, so that neither accumulation nor packing can change the update.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch

from trivium.errors import DataError, NonFiniteError, OutOfMemory
from trivium.forest import Forest
from trivium.objectives.base import LogProb, Objective, Reference, Sums
from trivium.train.optimizer import set_rate
from trivium.train.passes import REMEDY, surviving
from trivium.train.processes import ALONE, Processes


def stop(step: int, what: str, rows: list[str]) -> None:
    """What becomes of a loss or gradient that is not finite: no update, and an end."""
    raise NonFiniteError(
        f"step {step}: the {what}; rows: {some(rows)}",
        "lower the learning rate, or look at these rows; the weights before this step are untouched",
    )


def no_room(step: int, reason: str) -> None:
    """What becomes of a step for which there is no memory, where nothing can be arranged to need less: an end."""
    raise OutOfMemory(f"step {step}: memory ran out ({reason})", REMEDY)


def nothing_beside(step: int) -> Iterator[Forest]:
    return iter(())


def as_they_are(forests: Sequence[Forest]) -> Sequence[Forest]:
    return forests


@dataclass(frozen=True)
class Task:
    """What the loop is handed. ``batches(n)`` gives the forests of step ``n``; ``rate(n)`` its learning-rate factor."""

    objective: Objective
    logprob: LogProb
    reference: Reference
    batches: Callable[[int], Iterator[Forest]]
    steps: int
    rate: Callable[[int], float]
    optimizers: list[torch.optim.Optimizer]
    max_grad_norm: float
    not_finite: Callable[[int, str, list[str]], None] = stop  # (step, what, rows): raises, or the step is left out
    fitted: Callable[[Sequence[Forest]], Iterable[Forest]] = as_they_are  # forests that memory is enough for
    no_room: Callable[[int, str], None] = no_room  # (step, reason): makes ``fitted`` give smaller ones, or raises
    beside: Callable[[int], Iterator[Forest]] = nothing_beside  # what the objective's first pass over step ``n`` reads
    others: Processes = ALONE  # who take their shares of each step


@dataclass(frozen=True)
class StepLog:
    """One step. ``rows`` are the places of its examples; ``skipped`` says why nothing was updated, "" where it was."""

    step: int  # from 1
    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int
    trained_tokens: int
    examples: int
    seconds: float
    stats: dict[str, float] = field(default_factory=dict)
    rows: list[str] = field(default_factory=list, repr=False)
    skipped: str = ""


def train(task: Task, after_step: Callable[[StepLog], None], done: int = 0) -> None:
    """Run the steps after the first ``done``; ``after_step`` logs, evaluates, saves, shows.

    Before an update that is not finite ``task.not_finite`` is asked, which raises NonFiniteError if it may not be
    left out.
    """
    parameters = [p for o in task.optimizers for g in o.param_groups for p in g["params"]]
    for number in range(done, task.steps):
        started = time.perf_counter()
        forests, sums = _gradients(task, number)
        stats = task.others.sums(sums).means()
        task.others.gradients(parameters)
        norm = float(torch.nn.utils.clip_grad_norm_(parameters, task.max_grad_norm))
        fault, rows = _fault(stats["loss"], norm), _rows(forests)
        set_rate(task.optimizers, task.rate(number))
        for optimizer in task.optimizers:
            if not fault:
                optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if fault:
            task.not_finite(number + 1, fault, rows)
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
                rows=rows,
                skipped=fault,
            )
        )


def _gradients(task: Task, number: int) -> tuple[list[Forest], Sums]:
    """Take the gradients of a step, whose forests and statistics are returned, or this process's share of them; where
    memory runs out, once more in smaller forests of the same examples."""
    forests, goal, others = list(task.batches(number)), task.objective, task.others
    weight = sum(goal.weight(f) for f in forests)
    if not weight > 0:
        raise DataError(f"step {number + 1}: nothing to learn in {some(_rows(forests))}", "check the data's answers")

    def smaller(reason: str) -> None:
        for optimizer in task.optimizers:
            optimizer.zero_grad(set_to_none=True)  # some passes of the attempt have left theirs
        task.no_room(number + 1, reason)

    if (first := goal.first) is not None:
        beside = others.share(list(task.beside(number)))
        goal = surviving(lambda: first.known(task.logprob, task.reference, task.fitted(beside), others.added), smaller)
    mine = others.share(forests)
    return forests, surviving(lambda: _passes(task, goal, task.fitted(mine), weight), smaller)


def _passes(task: Task, goal: Objective, forests: Iterable[Forest], weight: float) -> Sums:
    """A pass over each forest, forward and back; ``weight`` is that of the whole step."""
    sums = Sums()
    for forest in forests:
        reference = task.reference(forest)
        result = goal.compute(task.logprob(forest), forest, reference)
        if len(forest.source):  # else nothing in it is trained, and there is no gradient to take
            (result.sum / weight).backward()
        sums.add(result, goal.weight(forest))
    return sums


def _fault(loss: float, norm: float) -> str:
    """What is not finite, or ""."""
    for what, value in (("loss", loss), ("gradient", norm)):
        if not math.isfinite(value):
            return f"{what} is not finite ({value})"
    return ""


def _rows(forests: list[Forest]) -> list[str]:
    """In the order of their files, however they are packed and dealt out."""

    def place(origin: str) -> tuple[str, int]:
        file, _, line = origin.rpartition(":")
        return file, int(line) if line.isdecimal() else 0

    return sorted((e.origin for f in forests for e in f.examples), key=place)


def some(rows: list[str], most: int = 4) -> str:
    """The first few of some rows, and how many there are besides."""
    return ", ".join(rows[:most]) + (f" and {len(rows) - most} more" if len(rows) > most else "")
