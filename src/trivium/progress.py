"""How far something is that takes more than a second: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING

from trivium.train.log import clock, say

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

AFTER = 1.0  # seconds before anything is shown
PLAIN_EVERY = 15.0  # seconds between lines where there is no terminal


class Progress:
    """``with Progress("preparing", total) as progress: progress.to(done)``."""

    def __init__(self, what: str, total: int) -> None:
        self.what, self.total = what, max(1, total)
        self.started = self.told = time.perf_counter()
        self.bar: Bar | None = None

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def to(self, done: int) -> None:
        """``done`` of the total, in whatever it is counted."""
        now = time.perf_counter()
        if self.bar is not None:
            self.bar.update(self.bar.task_ids[0], completed=done)
        elif not sys.stderr.isatty():
            if now - self.told > PLAIN_EVERY:
                self.told = now
                say(f"  {self.what}: {done / self.total:.0%} in {clock(now - self.started)}")
        elif now - self.started > AFTER:
            from rich.console import Console
            from rich.progress import Progress as Bar

            self.bar = Bar(console=Console(stderr=True), transient=True)
            self.bar.add_task(f"  {self.what}", total=self.total, completed=done)
            self.bar.start()
