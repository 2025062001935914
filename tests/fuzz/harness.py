"""Runs cases in forked children and says which of them went wrong: no crash, no hang, no message that is none.

    for fault in fuzz(KINDS["recipe"], world, seed=0, cases=range(500), scratch=folder):
        print(fault)

A case is ``kind``, ``seed`` and ``number``: its files are made from these alone. ``python -m tests.fuzz recipe 0 123``
carries out one case in this process and shows what becomes of it.

A child takes ``BATCH`` cases and tells its parent as it begins and ends each. It is killed where a case takes longer
than ``DEADLINE``; where it dies, by a signal say, the case that it was at is the one to blame, and a new child goes on.
"""

from __future__ import annotations

import json
import os
import re
import resource
import select
import shutil
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from trivium.errors import UserError

BATCH = 100
SLOW = 2.0  # seconds of the child's own time; on the clock a busy machine would decide
DEADLINE = 20.0  # seconds on the clock
MEMORY = 4 * 2**30  # bytes that a child may take beside what its parent has
PYTHON = re.compile(r"Traceback|<class '|<[\w.]+ object at 0x|\b[A-Z]\w*(?:Error|Exception)\b")

Call = Callable[[Any, Path, Random], object]


@dataclass(frozen=True)
class Kind:
    """``make`` writes a case's files into an empty folder, ``call`` uses them as the program would; both get the world
    of sound files and the case's random numbers."""

    name: str
    make: Call
    call: Call


@dataclass(frozen=True)
class Fault:
    """What went wrong with a case, and where its files lie."""

    kind: str
    seed: int
    number: int
    what: str
    folder: Path

    def __str__(self) -> str:
        return (
            f"{self.kind}, seed {self.seed}, case {self.number}: {self.what}\n"
            f"  its files: {self.folder}; again: python -m tests.fuzz {self.kind} {self.seed} {self.number}"
        )


@dataclass
class Tally:
    """What became of the cases."""

    fine: int = 0
    refused: int = 0
    slowest: float = 0.0
    seconds: float = 0.0
    said: Counter[str] = field(default_factory=Counter)  # how often each message, places and values left out


def random_of(kind: str, seed: int, number: int) -> Random:
    return Random(f"{kind} {seed} {number}")


def fuzz(kind: Kind, world: Any, seed: int, cases: range, scratch: Path, tally: Tally | None = None) -> Iterator[Fault]:
    """Carry out the cases; yields what went wrong. The files of such a case stay in ``scratch``."""
    tally, todo = tally or Tally(), list(cases)
    while todo:
        done, fault = _batch(kind, world, seed, todo[:BATCH], scratch)
        for number, told in done:
            tally.slowest = max(tally.slowest, told["seconds"])
            tally.seconds += told["seconds"]
            tally.said[re.sub(r"'[^']*'|/[\w/.-]+|\d+", "_", told["what"].split("\n")[0])[:110]] += 1
            tally.fine += told["outcome"] == "fine"
            tally.refused += told["outcome"] == "refused"
            if told["outcome"] == "bad":
                yield Fault(kind.name, seed, number, told["what"], folder_of(scratch, kind.name, number))
        if fault is not None:
            number, what = fault
            yield Fault(kind.name, seed, number, what, folder_of(scratch, kind.name, number))
        todo = todo[len(done) + (fault is not None) :]


def folder_of(scratch: Path, kind: str, number: int) -> Path:
    return scratch / f"{kind}-{number}"


def _batch(
    kind: Kind, world: Any, seed: int, numbers: list[int], scratch: Path
) -> tuple[list[tuple[int, dict[str, Any]]], tuple[int, str] | None]:
    """(what became of the cases that ended, the one that did not and how)."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        _child(kind, world, seed, numbers, scratch, writing)
    os.close(writing)
    done: list[tuple[int, dict[str, Any]]] = []
    held, how = b"", "the process died"
    while len(done) < len(numbers):
        if not select.select([reading], [], [], DEADLINE)[0]:
            how = f"not done after {DEADLINE:.0f} s"
            os.kill(child, signal.SIGKILL)
            break
        if not (data := os.read(reading, 1 << 16)):
            break
        *lines, held = (held + data).split(b"\n")
        done += [(numbers[len(done) + n], json.loads(line)) for n, line in enumerate(lines)]
    os.close(reading)
    _, status = os.waitpid(child, 0)
    if len(done) == len(numbers):
        return done, None
    ended = f" of {signal.Signals(os.WTERMSIG(status)).name}" if os.WIFSIGNALED(status) and "died" in how else ""
    return done, (numbers[len(done)], how + ended)


def _child(kind: Kind, world: Any, seed: int, numbers: list[int], scratch: Path, writing: int) -> None:
    """Carries out a batch, and never comes back."""
    try:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) if Path("/proc/self/statm").exists() else 0
        if pages:
            limit = pages * resource.getpagesize() + MEMORY
            resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        for number in numbers:
            told = carried_out(kind, world, seed, number, scratch)
            os.write(writing, json.dumps(told).encode() + b"\n")
    finally:
        os._exit(0)


def carried_out(kind: Kind, world: Any, seed: int, number: int, scratch: Path, show: bool = False) -> dict[str, Any]:
    """What becomes of one case: ``outcome`` is fine, refused or bad, ``what`` says how."""
    rng, folder = random_of(kind.name, seed, number), folder_of(scratch, kind.name, number)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    os.environ["TRIVIUM_CACHE"] = str(folder / "cache")
    before, started, error = _files(folder), time.process_time(), None
    try:
        kind.make(world, folder, rng)
        before, started = _files(folder), time.process_time()
        kind.call(world, folder, rng)
    except BaseException as raised:  # a panic of a library in Rust is no Exception
        error = raised
        if show:
            traceback.print_exc()
    seconds = time.process_time() - started
    faults = [*judged(error), *_left(before, _files(folder))]
    if seconds > SLOW:
        faults.insert(0, f"took {seconds:.1f} s")
    outcome = "bad" if faults else "fine" if error is None else "refused"
    if not faults:
        shutil.rmtree(folder)
    return {"outcome": outcome, "what": "; ".join(faults) or str(error), "seconds": seconds}


def judged(error: BaseException | None) -> list[str]:
    """What is wrong with how a call ended; nothing where it ended well, or with a message as it should be."""
    if error is None:
        return []
    if not isinstance(error, UserError):
        frame = traceback.extract_tb(error.__traceback__)[-1:]
        ours = [f for f in traceback.extract_tb(error.__traceback__) if "trivium" in f.filename]
        at = ", ".join(f"{Path(f.filename).name}:{f.lineno}" for f in [*ours[-3:], *frame])
        return [f"{type(error).__name__}: {str(error)[:200]!r} at {at}"]
    text = str(error)
    faults = [f"no {part}" for part in ("what", "remedy") if not str(getattr(error, part)).strip()]
    faults += ["more than three lines"] if len(text.splitlines()) > 3 else []
    faults += ["more than 1,500 characters"] if len(text) > 1500 else []
    told = re.sub(r'"[^"]*"', "", text)  # but for what is quoted from a file
    faults += [f"speaks Python: {found[0]!r}"] if (found := PYTHON.search(told)) else []
    faults += ["control characters"] if re.search(r"[\x00-\x08\x0b-\x1f\x7f]", text) else []
    try:
        text.encode()
    except UnicodeEncodeError:
        faults.append("half a character")
    return [f"{fault} in: {text[:300]!r}" for fault in faults]


def _files(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and time of every file, by its place."""
    found = ((p, p.lstat()) for p in folder.rglob("*") if not p.is_dir())
    return {str(p.relative_to(folder)): (stat.st_size, stat.st_mtime_ns) for p, stat in found}


def _left(before: dict[str, tuple[int, int]], after: dict[str, tuple[int, int]]) -> list[str]:
    """What is there now and was not before; what is in the cache is whole."""
    new = [n for n in after if after[n] != before.get(n) and (not n.startswith("cache/") or n.endswith(".partial"))]
    gone = [n for n in before if n not in after]
    return [f"left behind: {', '.join(new[:3])}"] * bool(new) + [f"gone: {', '.join(gone[:3])}"] * bool(gone)
