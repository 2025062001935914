"""What people are told while something is done: lines, times and sizes in words, and how far it is."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

AFTER = 1.0  # seconds before anything is shown
PLAIN_EVERY = 10.0  # seconds between lines where there is no terminal
_muted = False


def mute(muted: bool = True) -> None:
    """Say nothing from now on: of several processes one speaks."""
    global _muted
    _muted = muted


@contextlib.contextmanager
def hushed() -> Iterator[None]:
    """Nothing is said within the block."""
    before = _muted
    mute()
    try:
        yield
    finally:
        mute(before)


def say(text: str) -> None:
    """One line for a person, to standard error: standard output is for results."""
    write(text + "\n")


def write(text: str) -> None:
    """To standard error, if anybody still reads it: a closed terminal ends no run."""
    with contextlib.suppress(OSError, ValueError):
        if _muted:
            return
        sys.stderr.write(text)
        sys.stderr.flush()


def clock(seconds: float) -> str:
    """``4:05`` or ``1:02:03``."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def size(count: float) -> str:
    """Bytes for people: ``1.2 GB``."""
    for unit in ("B", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" or count >= 100 else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


def shown(path: Path) -> str:
    """A path as a person would type it here."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)


class Progress:
    """``with Progress("preparing", total) as progress: progress.to(done)``: a bar in a terminal, for what takes more
    than a second; elsewhere a line now and then."""

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
        if _muted:
            return
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
