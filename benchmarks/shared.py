"""What the benchmarks have in common: processes of their own, turns, and what tells whether tools train the same."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

WARMUP, SEED = 0.1, 0
NEVER = 10**9  # steps between checkpoints, and between evaluations beside those before and after
POLL = 0.02  # seconds between two looks at a process's memory

T = TypeVar("T")


class Failed(Exception):
    """What a process said last."""


@dataclass(frozen=True)
class Ran:
    """A process that went well: what it printed, what it cost as a whole, and when (by the clock) it was started."""

    printed: str
    seconds: float
    peak_bytes: int
    started: float


def in_turns(entrants: Sequence[T], rounds: int) -> Iterator[tuple[int, T]]:
    """(round, entrant): A B C, then C B A, and so on, so that a machine that slows down is unfair to nobody."""
    for number in range(rounds):
        yield from ((number, one) for one in (entrants if number % 2 == 0 else reversed(entrants)))


def digest(tokens: Any) -> str:
    """The same for the same token ids in the same order."""
    return hashlib.sha256(json.dumps(tokens).encode()).hexdigest()


def run_alone(
    command: Sequence[str],
    threads: int,
    cache: Path,
    more: Mapping[str, str] | None = None,
    timeout: float | None = None,
) -> Ran:
    """Runs a process whose caches are of this benchmark alone. Raises Failed.

    The peak is of the whole process, read from outside: what a tool does to its own count is not lost.
    """
    own = {name: str(cache) for name in ("TRIVIUM_CACHE", "HF_DATASETS_CACHE")}
    own |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    started, clock = time.time(), time.perf_counter()
    process = subprocess.Popen(
        command, env=os.environ | own | dict(more or {}), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    peak = [0]
    watcher = threading.Thread(target=_watch, args=(process, peak), daemon=True)
    watcher.start()
    try:
        printed, said = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise Failed(f"did not end within {timeout:,.0f} seconds") from None
    except BaseException:
        process.kill()
        raise
    seconds = time.perf_counter() - clock
    watcher.join()
    if process.returncode:
        raise Failed(last_words(said, process.returncode))
    return Ran(printed, seconds, peak[0], started)


def _watch(process: subprocess.Popen[str], peak: list[int]) -> None:
    """Keeps the highest resident peak that a process shows while it lives; a tool may reset its own in between."""
    path = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        with suppress(OSError, ValueError, IndexError):
            found = [line for line in path.read_text().splitlines() if line.startswith("VmHWM:")]
            peak[0] = max(peak[0], int(found[0].split()[1]) * 1024)
        time.sleep(POLL)


def last_words(said: str, code: int) -> str:
    """The reason in what a failed process wrote: its last line, or the line that calls itself the error."""
    lines = [line.strip() for line in said.splitlines() if line.strip()] or [f"exit code {code}"]
    errors = [" ".join(lines[n : n + 2]) for n, line in enumerate(lines) if line.startswith("error:")]
    return (errors or lines)[-1]
