"""Judging answers by a program of one's own.

    def judge(talker, most):
        answers = talker.answers(conversations[:most], 100)
        return {"polite": (sum("please" in a for a in answers), len(answers))}

A judge is called at every evaluation of a stage with the number of answers that will do for a curve, and once more
with None on the finished model, where all should be looked at.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from trivium.talk import Talker

ALONG_THE_WAY = 50  # answers that will do for a point of a curve
Z95 = 1.959964  # of the normal distribution, two-sided

# (how many kept it, of how many), or any other number
Verdict = tuple[int, int] | float


class Judge(Protocol):
    """Looks at a model's answers, at most ``most`` of them (None: all).

    Its attribute ``key``, if it has one, tells what it asks: a model that was judged under this key is not asked again.
    """

    def __call__(self, talker: Talker, most: int | None) -> Mapping[str, Verdict]: ...


def shares(verdicts: Mapping[str, Verdict]) -> dict[str, float]:
    """Each verdict as one number."""
    return {k: v["share"] if "share" in v else v["value"] for k, v in judged(verdicts).items()}


def judged(verdicts: Mapping[str, Verdict]) -> dict[str, dict[str, Any]]:
    """Each verdict with what it rests on: ``{"share", "low", "high", "met", "of"}``, or ``{"value"}``.

    A share of nothing is left out.
    """
    found: dict[str, dict[str, Any]] = {}
    for name, verdict in verdicts.items():
        if isinstance(verdict, tuple):
            met, of = verdict
            if not of:
                continue
            low, high = interval(met, of)
            found[name] = {"share": met / of, "low": low, "high": high, "met": met, "of": of}
        else:
            found[name] = {"value": float(verdict)}
    return found


def interval(met: float, of: int) -> tuple[float, float]:
    """The 95% interval of a share of ``met`` in ``of`` (Wilson 1927), which stays within 0 and 1."""
    share, spread = met / of, Z95**2 / of
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread**2 / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)
