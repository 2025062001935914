"""Files that are no longer sound: each is used all the same, or refused with a message; nothing crashes or hangs.

A sample of the cases in every run of the tests, all 20,000 of them in the slow ones. A failing case is told by kind,
seed and number, with a folder that holds its files and a line that carries it out again.
"""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.fuzz import harness
from tests.fuzz.harness import Kind, Tally, fuzz
from tests.fuzz.kinds import KINDS
from tests.fuzz.world import World, make

from trivium.errors import DataError

SEED = 0
CASES = {"recipe": 6000, "rows": 6000, "template": 2000, "tokenizer": 1500, "weights": 1000, "config": 1000,
    "adapter": 1000,
         "checkpoint": 900, "run": 600}  # fmt: skip
SAMPLE = 0.03  # of them, in every run of the tests


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    cache = os.environ["TRIVIUM_CACHE"]
    with contextlib.redirect_stderr(io.StringIO()):
        found = make(tmp_path_factory.mktemp("sound"))
    os.environ["TRIVIUM_CACHE"] = cache
    return found


@pytest.fixture
def cases(world: World, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, range], None]:
    """Carries out cases of a kind, and fails with all that went wrong."""

    def carry_out(kind: str, numbers: range) -> None:
        tally = Tally()
        faults = list(fuzz(KINDS[kind], world, SEED, numbers, tmp_path_factory.mktemp("cases"), tally))
        assert not faults, f"{len(faults)} faults\n" + "\n".join(map(str, faults[:20]))
        assert tally.fine + tally.refused == len(numbers)
        assert min(tally.fine, tally.refused) >= len(numbers) // 50, f"mutations that are all {tally} try nothing out"

    return carry_out


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample(kind, cases):
    cases(kind, range(int(CASES[kind] * SAMPLE)))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_all_of_them(kind, cases):
    cases(kind, range(CASES[kind]))


def test_there_are_twenty_thousand():
    assert sum(CASES.values()) == 20_000
    assert CASES.keys() == KINDS.keys()


# --- the harness itself: whatever goes wrong is seen, and the right case is blamed


def _raise(error: BaseException) -> None:
    raise error


def _told(what: str, remedy: str = "d") -> DataError:
    """An error with these very texts, as if nothing had made them fit to be shown."""
    error = DataError("", "")
    error.what, error.remedy = what, remedy
    return error


def _left_over(folder: Path) -> None:
    (folder / "half").write_text("x", encoding="utf-8")


WRONG: dict[str, tuple[Callable[[Path], Any], str]] = {
    "an error that is none of ours": (lambda _: [][1], "IndexError: 'list index out of range'"),
    "a panic": (lambda _: _raise(BaseException("panicked")), "BaseException: 'panicked'"),
    "an abort": (lambda _: os.abort(), "the process died of SIGABRT"),
    "an exit": (lambda _: os._exit(3), "the process died"),
    "much computing": (lambda _: _spin(0.15), "took 0."),
    "a long sleep": (lambda _: time.sleep(60), "not done after 3 s"),
    "a message without a remedy": (lambda _: _raise(_told("what", " ")), "no remedy"),
    "four lines": (lambda _: _raise(_told("a\nb\nc")), "more than three lines"),
    "a traceback": (lambda _: _raise(_told("Traceback (most recent call last)")), "speaks Python"),
    "an exception's repr": (lambda _: _raise(_told(f"{KeyError('x')!r}")), "speaks Python: 'KeyError'"),
    "a terminal's control codes": (lambda _: _raise(_told("\x1b[31mred")), "control characters"),
    "half a character": (lambda _: _raise(_told("\ud800")), "half a character"),
    "a file left behind": (_left_over, "left behind: half"),
}


def _spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


@pytest.mark.parametrize("name", WRONG)
def test_what_goes_wrong_is_seen(name, tmp_path, monkeypatch):
    monkeypatch.setattr(harness, "DEADLINE", 3.0)
    monkeypatch.setattr(harness, "SLOW", 0.1)
    act, told = WRONG[name]

    def call(_: Any, folder: Path, __: Any) -> None:
        if folder.name == "x-4":
            act(folder)

    kind = Kind("x", lambda _, folder, rng: (folder / "seen").write_text(str(rng.random()), encoding="utf-8"), call)
    tally = Tally()
    faults = list(fuzz(kind, None, 0, range(9), tmp_path, tally))
    assert [f.number for f in faults] == [4]
    assert told in faults[0].what
    assert tally.fine == 8
    assert [p.name for p in tmp_path.iterdir()] == ["x-4"]  # to be looked at
    assert "python -m tests.fuzz x 0 4" in str(faults[0])


def test_a_case_is_made_of_its_number_alone(world, tmp_path):
    for kind in KINDS.values():
        made = []
        for folder in _folders(tmp_path / kind.name):
            kind.make(world, folder, harness.random_of(kind.name, SEED, 7))
            made.append({p.relative_to(folder): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()})
        assert made[0] == made[1]
        assert made[0]


def _folders(parent: Path) -> Iterator[Path]:
    for name in ("one", "other"):
        (parent / name).mkdir(parents=True)
        yield parent / name
