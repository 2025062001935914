"""The course of the learning rate, as a factor of its peak: a pure function of the step's number."""

from __future__ import annotations

import math

WSD_DECAY = 0.2  # wsd: the last fifth of the steps goes down to 0
FLOOR = 0.1  # cosine ends at a tenth of the peak


def factor(step: int, steps: int, schedule: str, warmup_ratio: float) -> float:
    """The factor for step ``step`` (from 0) of ``steps``.

    Warm-up rises linearly and ends at 1; then ``cosine`` (to a tenth), ``linear`` (to 0), ``constant``, or ``wsd``
    (warm-up, stable, linear decay to 0 over the last fifth; Hu et al. 2024, MiniCPM, sec. 4).
    """
    warmup = math.ceil(warmup_ratio * steps) if warmup_ratio else 0
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    if schedule == "constant":
        return 1.0
    if schedule == "linear":
        return 1.0 - done
    if schedule == "cosine":
        return FLOOR + (1 - FLOOR) * 0.5 * (1 + math.cos(math.pi * done))
    assert schedule == "wsd", schedule
    return min(1.0, (1.0 - step / steps) / WSD_DECAY)
