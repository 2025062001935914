"""How many tokens a pass may hold, and what becomes of it where memory runs out: half as many, at the same step.

    passes = Passes("chat", 1024, shortest=31)
    surviving(attempt, lambda reason: passes.no_room(step, reason))

What a step computes does not depend on how its examples are arranged (`loop`), so nothing is lost but the attempt.
What was halved stays halved for the stage: the next long rows would run out of memory as these did.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, TypeVar

from trivium.errors import OutOfMemory
from trivium.terminal import say

T = TypeVar("T")

MOST = 5  # halvings in a stage
SIGNS = ("out of memory", "can't allocate memory", "not enough memory", "CUBLAS_STATUS_ALLOC_FAILED")
REMEDY = "use recompute: layers, a smaller max_length or model, or method: qlora; `trivium plan` tells what fits"


@dataclass
class Passes:
    """A stage's passes: at most ``tokens`` each, but for a row that is longer alone; ``shortest`` is its shortest."""

    stage: str
    tokens: int
    shortest: int = 1
    halvings: list[dict[str, int]] = field(default_factory=list)

    def no_room(self, step: int, reason: str) -> None:
        """Memory ran out at a step: half the tokens. Raises OutOfMemory where that was done often, or cannot help."""
        alone = self.tokens < 2 * self.shortest
        if alone or len(self.halvings) >= MOST:
            tried = "with every row alone in its pass" if alone else f"after {MOST} halvings"
            where = f"stages.{self.stage}, step {step}" if step else f"stages.{self.stage}, before step 1"
            raise OutOfMemory(f"{where}: memory ran out {tried}, {self.tokens:,} tokens a pass ({reason})", REMEDY)
        self.tokens //= 2
        self.halvings.append({"step": step, "tokens": self.tokens})
        when = f"at step {step}" if step else "before step 1"
        say(f"  memory ran out {when} ({reason}): again with {self.tokens:,} tokens a pass")

    def put_back(self, halvings: Iterable[dict[str, int]]) -> None:
        """As it was when a checkpoint was written."""
        self.halvings = list(halvings)
        self.tokens = self.halvings[-1]["tokens"] if self.halvings else self.tokens


def surviving(attempt: Callable[[], T], no_room: Callable[[str], None]) -> T:
    """What ``attempt()`` gives; where memory runs out in it, again after each ``no_room(reason)``, which makes it need
    less, or raises OutOfMemory."""
    while True:
        try:
            return attempt()
        except Exception as error:
            if not ran_out(error):
                raise
            reason = reason_of(error)
        # only here, outside of the block, nothing holds the attempt's tensors any more
        give_up_freed()
        no_room(reason)


def ran_out(error: BaseException) -> bool:
    """Whether an error says that memory has run out: on a device, or on the CPU where the system refused some."""
    if isinstance(error, MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in SIGNS)


def reason_of(error: BaseException) -> str:
    """The part of a library's long message that a person can use."""
    text = " ".join(str(error).split())
    for sign in ("Tried to allocate ", "you tried to allocate "):
        if sign in text:
            amount = text.split(sign)[1].split(". ")[0].split(" (")[0].split(".  ")[0]
            return f"tried to allocate {amount.rstrip('.')}"
    return text[:80] or type(error).__name__


def give_up_freed() -> None:
    """What nothing holds any more goes back to the device."""
    gc.collect()
    torch: Any = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.empty_cache()
