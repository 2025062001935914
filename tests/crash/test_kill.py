"""Promise 1: a run that is killed at any moment and started again ends in the bits of an unbroken one.

What this rests on, that the same seed gives the same run, is promise 15 (`test_twice.py`).
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections import Counter
from pathlib import Path

import pytest
from tests.crash.process import CELLS, Process, at_step, die, events, left_over, result

from trivium.peft.settings import METHODS, PRESETS

QUICK = ("pretrain-full", "sft-lora", "preference-bottleneck", "preference-moving")


def kill_until_done(recipe, rng: random.Random, most: float) -> int:
    """Run it, killed after up to ``most`` seconds, until it is done; returns how often it was killed."""
    kills = 0
    while True:
        ended = Process(recipe).wait(rng.uniform(0.05, most), then=signal.SIGKILL)
        if not ended.killed:
            assert ended.code == 0, ended.said
            return kills
        kills += 1


@pytest.mark.promise(1)
@pytest.mark.parametrize(
    ("name", "kills"),
    [(n, 3) for n in QUICK] + [pytest.param(n, 50, marks=pytest.mark.slow) for n in CELLS],
)
def test_a_killed_run_ends_in_the_same_bits(name, kills, cell, tried):
    whole = cell(name)
    process = Process(whole)
    assert process.wait().code == 0
    took = time.monotonic() - process.started
    expected = result(whole)
    rng, survived = random.Random(name), 0
    while survived < kills:
        recipe = cell(name)
        found = kill_until_done(recipe, rng, most=0.9 * took)
        assert result(recipe) == expected
        assert left_over(recipe.parent / "out") == []
        assert events(recipe)["attempts"] <= found + 1
        survived += found
        tried(kills=found, resumed_runs=1)


@pytest.mark.promise(1)
def test_it_goes_on_rather_than_beginning_again(cell, tried):
    recipe = cell("sft-lora", save_every=10)
    assert Process(recipe, meanwhile=lambda: at_step(25, die)).wait().killed
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "goes on after step 20 of 60" in ended.said
    found = events(recipe)
    assert (found["attempts"], found["went_on_after"], found["steps_repeated"]) == (2, [20], 4)
    whole = cell("sft-lora")
    assert Process(whole).wait().code == 0
    assert result(whole) == result(recipe), "nor does it matter how often it is saved"
    tried(kills=1, resumed_runs=1)


QUICK_METHODS = ("pissa", "qlora", "prefix")  # what starts from the base itself, by computing on it or packing it


@pytest.mark.promise(1)
@pytest.mark.parametrize(
    "method",
    [
        *QUICK_METHODS,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (*METHODS, *PRESETS) if n not in QUICK_METHODS),
    ],
)
def test_every_method_goes_on_in_the_same_bits(method, cell, tried):
    sizes = {"pissa": {"r": 4}, "olora": {"r": 4}, "compacter": {"r": 4}, "prompt": {"num_virtual_tokens": 4},
             "prefix": {"num_virtual_tokens": 4}, "top_layers": {"layers": 1}}  # fmt: skip
    changed = {"method": {"name": method, **sizes.get(method, {})}, "max_steps": 12, "save_every": 2}
    whole, recipe = cell("sft-lora", **changed), cell("sft-lora", **changed)
    assert Process(whole).wait().code == 0
    killed = Process(recipe, meanwhile=lambda: at_step(8, die)).wait()
    assert killed.killed, killed.said
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "goes on after step " in ended.said
    assert result(recipe) == result(whole)
    tried(kills=1, resumed_runs=1)


def tell_rows(recipe: Path, processes: int) -> None:
    """In this process: the rows of each step go into a file, and so many processes prepare the data."""
    from trivium.data import prepare
    from trivium.train.log import TrainingLog

    os.environ["TRIVIUM_CACHE"] = str(recipe.parent / "cache")  # else it would find them prepared
    if processes:
        workers = prepare.Workers
        prepare.LITTLE, prepare.cores = 0, lambda: 4
        prepare.Workers = lambda maker, count: workers(maker, processes)
    step = TrainingLog.step

    def writing(self, log, spike=False):
        with (recipe.parent / "rows.txt").open("a", encoding="utf-8") as file:
            file.write(f"{log.step} {', '.join(log.rows)}\n")
        step(self, log, spike)

    TrainingLog.step = writing


def told_rows(recipe: Path) -> dict[int, list[str]]:
    """The rows of each step by name; a step that was done again had the same."""
    seen: dict[int, list[str]] = {}
    for line in (recipe.parent / "rows.txt").read_text(encoding="utf-8").splitlines():
        step, rows = line.split(" ", 1)
        names = [row.rpartition("/")[2] for row in rows.split(", ")]
        assert seen.setdefault(int(step), names) == names, "a step that is done again has the same rows"
    return seen


@pytest.mark.promise(9)
@pytest.mark.parametrize(
    ("processes", "kills"), [(0, 3), *(pytest.param(n, 10, marks=pytest.mark.slow) for n in (0, 1, 4))]
)
def test_every_example_exactly_once_per_epoch_however_often_it_is_killed(processes, kills, cell, tried):
    """The rows of each step, in order, are those of an unbroken run, and each epoch has every row once."""
    whole = cell("sft-lora")
    assert Process(whole, meanwhile=lambda: tell_rows(whole, 0)).wait().code == 0
    expected = told_rows(whole)
    assert sorted(expected) == list(range(1, 61))
    seen = Counter(row for rows in expected.values() for row in rows)
    assert len(seen) == 43
    assert max(seen.values()) - min(seen.values()) <= 1
    rng, survived = random.Random(processes), 0
    while survived < kills:
        killed = cell("sft-lora")
        while True:
            process = Process(killed, meanwhile=lambda killed=killed: tell_rows(killed, processes))
            if survived % 3:  # every third dies while its data is prepared, or before
                process.wait_for("epochs of", "done before")  # the latter where it was killed at its very end
            ended = process.wait(rng.uniform(0, 0.4) if survived < kills else 60, then=signal.SIGKILL)
            if not ended.killed:
                break
            survived += 1
        assert ended.code == 0, ended.said
        assert told_rows(killed) == expected
        tried(examples=sum(seen.values()))
    tried(kills=survived)
