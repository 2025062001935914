"""What people see while it trains: a live line in a terminal, plain lines elsewhere, and ``metrics.jsonl`` always."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trivium.files import clear_errors
from trivium.terminal import PLAIN_EVERY, clock, say, size

if TYPE_CHECKING:
    from trivium.train.loop import StepLog
    from trivium.train.track import Tracker

UNSHOWN = ("margin", "logprob_chosen", "logprob_rejected", "bits_per_byte")  # held-out metrics of the file alone


class TrainingLog:
    """Keeps every step in ``rows`` and in ``file`` (``metrics.jsonl``), and shows where the stage is."""

    def __init__(self, file: Path | None, name: str, steps: int, peak: Any, tracker: Tracker | None = None) -> None:
        self.name, self.steps, self.peak, self.tracker = name, steps, peak, tracker
        self.rows: list[dict[str, Any]] = []
        self.started = self.shown = time.perf_counter()
        self.paused_for = self.tokens = 0.0
        self.live = sys.stderr.isatty()
        self.file: TextIO | None = None
        if file is not None:
            with clear_errors(file):
                self.file = file.open("w", encoding="utf-8")

    def step(self, log: StepLog) -> None:
        self.tokens += log.tokens
        row = {k: v for k, v in vars(log).items() if k != "stats"}
        self.write({**row, **log.stats, "elapsed": round(time.perf_counter() - self.started - self.paused_for, 4)})
        now = time.perf_counter()
        last = log.step == self.steps
        if now - self.shown < (0.1 if self.live else PLAIN_EVERY) and not last and log.step != 1:
            return
        self.shown = now
        line = self.line(log, now)
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            sys.stderr.write("\r\x1b[2K" + line + ("\n" if last else ""))
            sys.stderr.flush()
        else:
            say(line)

    def line(self, log: StepLog, now: float) -> str:
        elapsed = max(1e-9, now - self.started - self.paused_for)
        left = elapsed / log.step * (self.steps - log.step)
        extra = "".join(f"  {k} {log.stats[k]:.3f}" for k in ("accuracy", "margin") if k in log.stats)
        return (
            f"  {self.name}  step {log.step}/{self.steps}  loss {log.loss:.4f}{extra}  "
            f"{self.tokens / elapsed:,.0f} tokens/s  {size(self.peak.read())}  {clock(left)} left"
        )

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time spent inside is not the training's."""
        started = time.perf_counter()
        yield
        self.paused_for += time.perf_counter() - started

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics."""
        self.write({"step": step, **{f"eval_{k}": v for k, v in metrics.items()}})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k not in UNSHOWN)
        if self.live:
            sys.stderr.write("\r\x1b[2K")
        say(f"  {self.name}  step {step}/{self.steps}  held-out {shown}")

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.file is not None:
            with clear_errors(Path(self.file.name)):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
        if self.tracker is not None:
            self.tracker.row(row)

    def close(self) -> None:
        if self.file is not None:
            self.file.close()
        if self.tracker is not None:
            self.tracker.close()
