"""What people see while it trains: a live line in a terminal, plain lines elsewhere, and ``metrics.jsonl`` always."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from trivium.files import BLOCK, clear_errors, read_lines
from trivium.terminal import PLAIN_EVERY, clock, say, size, write

if TYPE_CHECKING:
    from trivium.train.loop import StepLog
    from trivium.train.track import Tracker

LOG = "metrics.jsonl"
UNSHOWN = ("margin", "logprob_chosen", "logprob_rejected", "bits_per_byte")  # held-out metrics of the file alone


class TrainingLog:
    """Keeps every step in ``rows`` and in ``file`` (``metrics.jsonl``), and shows where the stage is.

    ``rows`` and ``elapsed`` (seconds) are those of a training that goes on.
    """

    def __init__(
        self, file: Path | None, name: str, steps: int, peak: Any, tracker: Tracker | None = None,
        rows: Sequence[dict[str, Any]] = (), elapsed: float = 0.0,
    ) -> None:  # fmt: skip
        self.name, self.steps, self.peak, self.tracker = name, steps, peak, tracker
        self.rows: list[dict[str, Any]] = list(rows)
        self.shown = time.perf_counter()
        self.started = self.shown - elapsed
        self.paused_for = 0.0
        self.tokens = float(sum(row.get("tokens", 0) for row in rows))
        self.first = max((row["step"] for row in rows), default=0) + 1
        self.live = sys.stderr.isatty()
        self.file: TextIO | None = None
        if tracker is not None:
            for row in rows:
                tracker.row(row)
        if file is not None:
            with clear_errors(file, BLOCK):
                file.write_text(self.text(), encoding="utf-8")
                self.file = file.open("a", encoding="utf-8")

    def text(self) -> str:
        """What ``metrics.jsonl`` holds."""
        return "".join(json.dumps(row) + "\n" for row in self.rows)

    @property
    def elapsed(self) -> float:
        """Seconds of training, pauses left out."""
        return time.perf_counter() - self.started - self.paused_for

    def step(self, log: StepLog, spike: bool = False) -> None:
        self.tokens += log.tokens
        row = {k: v for k, v in vars(log).items() if k not in ("stats", "rows", "skipped")}
        row |= {**log.stats, "elapsed": round(self.elapsed, 4)}
        if log.skipped:  # its loss is no number
            row = {"step": log.step, "skipped": log.skipped, "rows": log.rows, "tokens": log.tokens}
        self.write(row | ({"spike": log.rows} if spike else {}))
        now = time.perf_counter()
        last = log.step == self.steps
        if now - self.shown < (0.1 if self.live else PLAIN_EVERY) and not last and log.step != self.first:
            return
        self.shown = now
        line = self.line(log)
        if self.live:
            line = line[: shutil.get_terminal_size().columns - 1]  # a wrapped line could not be written over
            write("\r\x1b[2K" + line + ("\n" if last else ""))
        else:
            say(line)

    def line(self, log: StepLog) -> str:
        elapsed = max(1e-9, self.elapsed)
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
        try:
            yield
        finally:
            self.paused_for += time.perf_counter() - started

    def evaluation(self, step: int) -> dict[str, float] | None:
        """The held-out metrics of a step, where they were taken."""
        for row in self.rows:
            if row["step"] == step and any(k.startswith("eval_") for k in row):
                return {k.removeprefix("eval_"): v for k, v in row.items() if k != "step"}
        return None

    def evaluated(self, step: int, metrics: dict[str, float]) -> None:
        """Held-out metrics."""
        self.write({"step": step, **{f"eval_{k}": v for k, v in metrics.items()}})
        shown = "  ".join(f"{k} {v:.4f}" for k, v in metrics.items() if k not in UNSHOWN)
        if self.live:
            write("\r\x1b[2K")
        say(f"  {self.name}  step {step}/{self.steps}  held-out {shown}")

    def write(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        if self.file is not None:
            with clear_errors(Path(self.file.name), BLOCK):
                self.file.write(json.dumps(row) + "\n")
                self.file.flush()
        if self.tracker is not None:
            self.tracker.row(row)

    def close(self) -> None:
        if self.file is not None:
            with contextlib.suppress(OSError):  # what could not be written was said when it was to be
                self.file.close()
        if self.tracker is not None:
            self.tracker.close()


def read_log(path: Path) -> list[dict[str, Any]]:
    """The rows of a ``metrics.jsonl``; a line that cannot be read is left out, as it is only shown."""
    return [row for row in read_lines(path) if isinstance(row.get("step"), int)]
