"""What must not pass in silence: steps that are not finite, and losses that jump."""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable
from typing import Any

from trivium.terminal import say
from trivium.train.loop import StepLog, some, stop

SEEN = 50  # steps that a loss is compared with
ENOUGH = 20  # of them, before anything is said
FAR = 8.0  # robust standard deviations above their median
SHARE = 0.25  # of the median that a spike is above it, at least: a flat curve has deviations near 0


class Guard:
    """``allowed`` steps may be left out in a stage because they are not finite; one more ends it.

    ``rows`` are those of the log so far, of a training that goes on.
    """

    def __init__(self, allowed: int, rows: Iterable[dict[str, Any]] = ()) -> None:
        self.allowed = allowed
        self.skipped: list[dict[str, Any]] = []
        self.spikes: list[dict[str, Any]] = []
        self._seen: deque[float] = deque(maxlen=SEEN)
        for row in rows:
            if "skipped" in row:
                self.skipped.append(row)
            if "loss" in row:
                self._seen.append(row["loss"])
            if "spike" in row:
                self.spikes.append({"step": row["step"], "loss": row["loss"], "rows": row["spike"]})

    def not_finite(self, step: int, what: str, rows: list[str]) -> None:
        """Leave the step out, or raise NonFiniteError."""
        if len(self.skipped) >= self.allowed:
            stop(step, what, rows)
        self.skipped.append({"step": step, "skipped": what, "rows": rows})
        say(f"  step {step} left out ({len(self.skipped)} of {self.allowed}): the {what}; rows: {some(rows)}")

    def spiked(self, log: StepLog) -> bool:
        """Whether the loss of a step is far above those before it; if so its rows are told."""
        seen, loss = sorted(self._seen), log.loss
        self._seen.append(loss)
        if len(seen) < ENOUGH:
            return False
        middle = statistics.median(seen)
        spread = 1.4826 * statistics.median(abs(one - middle) for one in seen)  # of a normal distribution: its sigma
        if loss <= middle + max(FAR * spread, SHARE * abs(middle)):
            return False
        self.spikes.append({"step": log.step, "loss": loss, "rows": log.rows})
        say(f"  step {log.step}: the loss jumped to {loss:.4f} from about {middle:.4f}; rows: {some(log.rows)}")
        return True
