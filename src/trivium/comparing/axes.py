"""Where the points of a plot lie: axes that say round numbers, and how far along them a value is."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from trivium.report.chart import label as said
from trivium.report.chart import ticks


@dataclass(frozen=True)
class Point:
    """``spread``: how far ``y`` may lie off, upwards and downwards."""

    name: str
    x: float
    y: float
    spread: float = 0.0


@dataclass(frozen=True)
class Axis:
    """``unit`` "%" shows shares as percentages; a ``log`` axis has powers of ten."""

    title: str
    unit: str = ""
    log: bool = False

    def ticks(self, low: float, high: float) -> list[float]:
        """Round numbers within the range, or just beyond it."""
        if not self.log:
            return ticks(low, high, 5)
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        tens = [10.0**n for n in powers]
        found = tens if sum(low <= t <= high for t in tens) > 1 else [m * t for t in tens for m in (1, 2, 5)]
        return [t for t in found if low <= t <= high]

    def said(self, value: float) -> str:
        """A tick's number: 200, 20k, 1M."""
        if self.log and value >= 1000:
            power = min(3, int(math.log10(value) + 1e-9) // 3)
            return f"{value / 1000**power:g}{' kMG'[power]}"
        return said(value, self.unit)


class Scale:
    """An axis from the lowest to the highest value, with a little room; `share` is how far along a value lies."""

    def __init__(self, axis: Axis, low: float, high: float) -> None:
        self.axis = axis
        a, b = (math.log10(low), math.log10(high)) if axis.log else (low, high)
        room = 0.06 * (b - a) or 0.1 * abs(b) or 0.1
        self.low, self.high = a - room, b + room
        raised = [10**self.low, 10**self.high] if axis.log else [self.low, self.high]
        self.ticks = [t for t in axis.ticks(*raised) if 0 <= self.share(t) <= 1]

    def share(self, value: float) -> float:
        at = math.log10(value) if self.axis.log else value
        return (at - self.low) / (self.high - self.low)


def scales(points: Sequence[Point], x: Axis, y: Axis) -> tuple[Scale, Scale]:
    xs = [p.x for p in points]
    ys = [p.y + side * p.spread for p in points for side in (-1, 1)]
    return Scale(x, min(xs), max(xs)), Scale(y, min(ys), max(ys))


def drawable(points: Sequence[Point], x: Axis) -> list[Point]:
    """The points that have a place: finite, and above 0 where the axis has no 0."""
    return [p for p in points if math.isfinite(p.x) and math.isfinite(p.y) and (p.x > 0 or not x.log)]
