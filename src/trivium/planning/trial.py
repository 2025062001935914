"""A few steps of a stage, tried out and thrown away: what a step takes by its tokens, and the memory it needs.

    tried = try_out(run, work, peak)
    seconds = tried.training(work.order.step_tokens())

Tried are a step of middling size, first, so that what is slow only once is not counted; then the largest one and some
others. How long a step takes is a line in its tokens; the whole is the sum over all steps, whose sizes are known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from trivium.data.loader import RunOrder
from trivium.stage_reference import reference_of
from trivium.stage_runner import arranged_as
from trivium.stage_training import Training
from trivium.stage_work import Costs, StageRun, Work
from trivium.terminal import hushed
from trivium.train import snapshot
from trivium.train.machine import PeakMemory
from trivium.train.reference import Remembered

MOST_SECONDS = 45.0  # of the steps that are measured
LEAST, MOST = 2, 6  # of them
HELD_OUT = 8  # rows that are evaluated on


class Few(RunOrder):
    """Some steps of an order, as an order."""

    def __init__(self, order: RunOrder, steps: Sequence[int]) -> None:
        self.order, self.steps = order, steps

    def __len__(self) -> int:
        return len(self.steps)

    def chosen(self, step: int) -> list[int]:
        return self.order.chosen(self.steps[step])

    @property
    def epochs(self) -> float:
        return self.order.epochs


@dataclass(frozen=True)
class Tried:
    """What was measured; tokens are those of the rows, shared beginnings counted for every row."""

    tokens: list[int]  # of each step
    seconds: list[float]  # of each step
    held_out: float  # seconds a token, of an evaluation
    reference: float  # seconds a token, of a reference that is computed once; 0 where there is none
    peak: int  # bytes
    state: int  # bytes of what a checkpoint holds

    def training(self, step_tokens: np.ndarray) -> float:
        """Seconds of all steps, by a line through those that were tried."""
        tokens, seconds = np.array(self.tokens, float), np.array(self.seconds)
        whole = seconds.sum() / tokens.sum() * step_tokens.sum()
        spread = tokens.max() / tokens.min()
        if len(tokens) < 3 or spread < 1.5:  # a line through what lies together says nothing
            return float(whole)
        slope, start = np.polyfit(tokens, seconds, 1)
        return float(start * len(step_tokens) + slope * step_tokens.sum()) if start >= 0 < slope else float(whole)


def try_out(run: StageRun, work: Work, peak: PeakMemory) -> Tried:
    """Train some steps of a stage that is prepared; the model is changed by them, and nothing is written."""
    sizes = work.order.step_tokens()
    middle = int(np.argsort(sizes, kind="stable")[len(sizes) // 2])
    with hushed():
        seconds = _tried(run, work, peak, [middle])[0].run.costs.seconds  # nothing of it is held any more
        others = _others(sizes, middle, min(MOST, max(LEAST, int(MOST_SECONDS / max(seconds, 1e-3)))))
        training, reference = _tried(run, work, peak, others)
    costs = training.run.costs
    held = int(work.held_out[:HELD_OUT].sizes.sum()) if len(work.held_out) else 0
    rows = [row for row in training.log.rows if "loss" in row]
    return Tried(
        tokens=[int(sizes[step]) for step in others],
        seconds=[row["seconds"] for row in rows],
        held_out=costs.eval_seconds / evaluations(len(others), run.stage.eval_every) / held if held else 0.0,
        reference=reference,
        peak=training.peak_bytes(),
        state=snapshot.size_of(training.optimizers),
    )


def evaluations(steps: int, every: int | None) -> int:
    """How often a stage is evaluated: before, on the way, and what was saved."""
    return 2 + (steps - 1) // (every or max(1, -(-steps // 3)))


def _others(sizes: np.ndarray, middle: int, count: int) -> list[int]:
    """Steps to measure: the largest, the smallest that is not the odd one at the end, and some between."""
    ranked = [int(n) for n in np.argsort(sizes, kind="stable")]
    places = np.linspace(0, len(ranked) - 1, count + 1)[1:] if len(ranked) > count else np.arange(len(ranked))
    found = [ranked[round(place)] for place in places]
    return found if found else [middle]


def _tried(run: StageRun, work: Work, peak: PeakMemory, steps: list[int]) -> tuple[Training, float]:
    """These steps trained; and seconds a token of a reference that was computed once for them."""
    few = Few(work.order, steps)
    seen = sorted({i for n in range(len(steps)) for i in few.chosen(n)})
    used = work.data.examples.at(np.array(seen))
    some = replace(work, order=few, used=used, held_out=work.held_out[:HELD_OUT])
    trial = replace(run, costs=Costs(), judge=None, profile=None, tracker=lambda: None)
    with arranged_as(trial, some):
        with trial.costs.clock("reference_seconds"):
            reference = reference_of(trial, some)
        once = trial.costs.reference_seconds if isinstance(reference, Remembered) else 0.0
        training = Training(trial, some, reference, peak)
        try:
            training.carry_out()
            training.measure(len(steps))
        finally:
            training.close()
    return training, once / int(used.sizes.sum() + some.held_out.sizes.sum())
