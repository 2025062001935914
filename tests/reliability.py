"""Which tests stand behind each promise, what they counted, and the table of it: ``docs/reliability.md``.

    @pytest.mark.promise(1)                      # this test is about promise 1
    def test_a_killed_run_ends_in_the_same_bits(tried): ...
        tried(kills=50)                          # so often it was tried; numbers of all tests are added up

    pytest -m "slow or not slow" --reliability FILE

The file is written at the end of a run, whatever became of it: `make test-all` puts it into ``docs/`` where all of it
was green. Both travel in the reports of the tests, so that they may run in several processes.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]

PROMISES = {
    1: "Resume is exact after `kill -9` at any moment: each kind of training killed 50 times ends in the same bits",
    2: "A save is whole or absent: the process dies, or the power is cut, at every operation on the disk",
    3: "A full disk harms nothing: no room at every operation; the message has path, needed and free",
    4: "Damage is found, the file named, and the checkpoint before it used; never from scratch unasked",
    5: "The last good checkpoint is never deleted: old ones go only when the new one was read back",
    6: "NaN or Inf never reaches weights or moments; the message names step and rows",
    7: "Bad rows are named as `file:line` and set aside; read = used + set aside + over-long, exactly",
    8: "Nothing to learn is an error before step 1, never a loss of 0.0",
    9: "Every example exactly once per epoch, in the same order, with any number of processes and kills",
    10: "Changed data is noticed on resume and refused, the file named",
    11: "SIGTERM and Ctrl-C lose nothing, at any moment, inside a save, and twice",
    12: "Out of memory is survived: the micro-batch is halved at the same step",
    13: "A dead or stuck process is noticed within 30 s, its rank named, no orphan left",
    14: "Two runs cannot share a folder; a stale lock is recognised",
    15: "Same seed, same run: twice the same bits, on the CPU",
    16: "Accumulated = at once, packed = separate, shared = unshared, recomputed = kept, in float32",
    17: "Adapters off = the base, bitwise; merged = adapter to 1e-5; saved and loaded, bitwise",
    18: "An untrusted model, adapter or template folder runs nothing",
    19: "The summary tells the truth: every skip, retry and row set aside is counted",
}

# Promises whose tests are still to come; a line goes when they do (`test_reliability.py` insists).
AWAITED = {}


@dataclass
class Behind:
    """What stands behind a promise: its tests by file, their failures, what they counted, the seconds they took."""

    tests: Counter[str] = field(default_factory=Counter)
    failed: set[str] = field(default_factory=set)
    skipped: int = 0
    tried: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class Gathered:
    """What the reports of a run tell of each promise."""

    def __init__(self) -> None:
        self.started = time.time()
        self.promises = {number: Behind() for number in PROMISES}
        self.outcomes: Counter[str] = Counter()

    def add(self, report: Any) -> None:
        """Enter a test's setup, call or teardown."""
        told = report.user_properties
        promises = [self.promises[value] for name, value in told if name == "promise"]
        if report.when == "call" or report.outcome != "passed":
            self.outcomes[report.outcome] += 1
        for behind in promises:
            behind.seconds += report.duration
            if report.when == "setup":
                behind.tests[report.nodeid.partition("::")[0]] += 1
            if report.outcome == "failed":
                behind.failed.add(report.nodeid)
            behind.skipped += report.outcome == "skipped"
            if report.when == "call":
                for name, value in told:
                    if name == "tried":
                        behind.tried.update(value)


def page(gathered: Gathered, about: dict[str, str]) -> str:
    """``docs/reliability.md``."""
    head = f"""\
# What is promised, and how often it was tried

Written by `make test-all` when all of it has passed; every number was counted by the tests named beside it, in that
one run. A row is what a user may rely on; under "tried" is how often something was done that could have broken it.

{chr(10).join(f"- {name}: {value}" for name, value in about.items())}

| # | promise | tests | tried | failed | seconds |
|---|---|---|---|---|---|
"""
    return head + "".join(_row(number, behind) for number, behind in gathered.promises.items())


def _row(number: int, behind: Behind) -> str:
    files = "<br>".join(f"`{file}` ({count})" for file, count in sorted(behind.tests.items()))
    tried = ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in behind.tried.items())
    passed = sum(behind.tests.values()) - behind.skipped
    skipped = f", {behind.skipped:,} skipped" if behind.skipped else ""
    tests = f"{passed:,} test{'s' * (passed != 1)}{skipped}"
    if not passed:
        return f"| {number} | {PROMISES[number]} | {files or '**no test**'} | {skipped[2:] or '-'} | - | - |\n"
    names = "<br>".join(f"**`{name.rpartition('/')[2]}`**" for name in sorted(behind.failed))
    failed = f"{len(behind.failed)}: {names}" if behind.failed else "0"
    cells = (files, f"{tried}; {tests}" if tried else tests, failed, f"{behind.seconds:,.0f}")
    return f"| {number} | {PROMISES[number]} | {' | '.join(cells)} |\n"


def about(gathered: Gathered) -> dict[str, str]:
    """When, of what and where a run was."""
    names = ("torch", "transformers", "tokenizers", "safetensors", "numpy")
    versions = ", ".join([f"python {platform.python_version()}", *(f"{n} {metadata.version(n)}" for n in names)])
    took = time.time() - gathered.started
    counts = ", ".join(f"{count:,} {outcome}" for outcome, count in sorted(gathered.outcomes.items()))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "date": datetime.datetime.fromtimestamp(gathered.started, datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "trivium": _commit(),
        "with": versions,
        "on": f"{cores} cores, {platform.machine()}, {platform.system()} {platform.release().split('-')[0]}, no GPU",
        "took": f"{took / 60:.0f} min: {counts} tests",
    }


def _commit() -> str:
    """The version and the commit, and whether anything was changed since."""
    import trivium

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    changed = ", with changes that are not committed" if git("status", "--porcelain", "--untracked-files=no") else ""
    return f"{trivium.__version__}, commit {git('rev-parse', '--short=12', 'HEAD') or 'unknown'}{changed}"


# --- pytest


@pytest.fixture
def tried(request: pytest.FixtureRequest) -> Callable[..., None]:
    """``tried(kills=3, operations=120)``: how often a test has tried what is promised. May be called repeatedly."""

    def count(**numbers: int) -> None:
        request.node.user_properties.append(("tried", numbers))

    return count


def promises_of(item: pytest.Item) -> list[int]:
    """The promises that a test is about."""
    return sorted({number for mark in item.iter_markers("promise") for number in mark.args})


def without_test(items: Iterable[pytest.Item]) -> set[int]:
    """The promises that none of these tests is about."""
    return PROMISES.keys() - {number for item in items for number in promises_of(item)}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--reliability", metavar="FILE", help="write what was tried of each promise into FILE")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for number in promises_of(item):
            assert number in PROMISES, f"{item.nodeid}: there is no promise {number}"
            item.user_properties.append(("promise", number))


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--reliability") and not hasattr(config, "workerinput"):  # one process writes it
        config.pluginmanager.register(_Writer(Path(config.getoption("--reliability"))))


class _Writer:
    def __init__(self, file: Path) -> None:
        self.file, self.gathered = file, Gathered()

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.gathered.add(report)

    def pytest_sessionfinish(self) -> None:
        self.file.write_text(page(self.gathered, about(self.gathered)), encoding="utf-8")
