"""Promise 1: a run that is killed at any moment and started again ends in the bits of an unbroken one.

Promise 15, that the same seed gives the same run, is what this rests on, and is looked at in the same place.
"""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections import Counter

import pytest
from tests.crash.process import CELLS, Process, events, left_over, result

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


@pytest.mark.parametrize(
    ("name", "kills"),
    [(n, 3) for n in QUICK] + [pytest.param(n, 50, marks=pytest.mark.slow) for n in CELLS],
)
def test_a_killed_run_ends_in_the_same_bits(name, kills, cell):
    whole = cell(name)
    process = Process(whole)
    assert process.wait().code == 0
    took = time.monotonic() - process.started
    expected = result(whole)
    rng, survived = random.Random(name), 0
    while survived < kills:
        recipe = cell(name)
        found = kill_until_done(recipe, rng, most=1.1 * took)
        assert result(recipe) == expected
        assert left_over(recipe.parent / "out") == []
        assert events(recipe)["steps_repeated"] >= 0
        survived += found
    print(f"{name}: {survived} kills survived")


def test_it_goes_on_rather_than_beginning_again(cell):
    recipe = cell("sft-lora", save_every=10)
    assert Process(recipe, meanwhile=lambda: kill_at_step(25)).wait().killed
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "goes on after step 20 of 60" in ended.said
    found = events(recipe)
    assert (found["attempts"], found["went_on_after"], found["steps_repeated"]) == (2, [20], 4)
    whole = cell("sft-lora")
    assert Process(whole).wait().code == 0
    assert result(whole) == result(recipe), "nor does it matter how often it is saved"


QUICK_METHODS = ("pissa", "qlora", "prefix")  # what starts from the base itself, by computing on it or packing it


@pytest.mark.parametrize(
    "method",
    [
        *QUICK_METHODS,
        *(pytest.param(n, marks=pytest.mark.slow) for n in (*METHODS, *PRESETS) if n not in QUICK_METHODS),
    ],
)
def test_every_method_goes_on_in_the_same_bits(method, cell):
    sizes = {"pissa": {"r": 4}, "olora": {"r": 4}, "compacter": {"r": 4}, "prompt": {"num_virtual_tokens": 4},
             "prefix": {"num_virtual_tokens": 4}, "top_layers": {"layers": 1}}  # fmt: skip
    changed = {"method": {"name": method, **sizes.get(method, {})}, "max_steps": 12, "save_every": 2}
    whole, recipe = cell("sft-lora", **changed), cell("sft-lora", **changed)
    assert Process(whole).wait().code == 0
    killed = Process(recipe, meanwhile=lambda: kill_at_step(8)).wait()
    assert killed.killed, killed.said
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "goes on after step " in ended.said
    assert result(recipe) == result(whole)


def kill_at_step(number: int) -> None:
    """In this process, before its update, when what it saves is written: a disk's pace is not tested."""
    from trivium.train import loop

    rate, steps = loop.set_rate, [0]

    def dying(*arguments):
        steps[0] += 1
        if steps[0] == number:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            os.kill(os.getpid(), signal.SIGKILL)
        rate(*arguments)

    loop.set_rate = dying


def test_every_example_exactly_once_per_epoch_however_often_it_is_killed(cell):
    """Promise 9: the rows of each step, in order, are those of an unbroken run, and each epoch has every row once."""

    def told(recipe) -> dict[int, list[str]]:
        """The rows of each step by name; of a step that was done again, both times."""
        seen: dict[int, list[str]] = {}
        for line in (recipe.parent / "rows.txt").read_text(encoding="utf-8").splitlines():
            step, rows = line.split(" ", 1)
            names = [row.rpartition("/")[2] for row in rows.split(", ")]
            assert seen.setdefault(int(step), names) == names, "a step that is done again has the same rows"
        return seen

    def telling(recipe) -> None:
        from trivium.train.log import TrainingLog

        step = TrainingLog.step

        def writing(self, log, spike=False):
            with (recipe.parent / "rows.txt").open("a", encoding="utf-8") as file:
                file.write(f"{log.step} {', '.join(log.rows)}\n")
            step(self, log, spike)

        TrainingLog.step = writing

    whole, killed = cell("sft-lora"), cell("sft-lora")
    assert Process(whole, meanwhile=lambda: telling(whole)).wait().code == 0
    rng, kills = random.Random(3), 0
    while True:
        process = Process(killed, meanwhile=lambda: telling(killed))
        if kills < 3:
            process.wait_for("held-out loss")
        ended = process.wait(rng.uniform(0, 0.4) if kills < 3 else 60, then=signal.SIGKILL)
        kills += ended.killed
        if not ended.killed:
            break
    assert told(killed) == told(whole)
    assert sorted(told(whole)) == list(range(1, 61))
    stream = [row for step in range(1, 61) for row in told(whole)[step]]
    seen = Counter(stream)
    assert len(seen) == 43
    assert max(seen.values()) - min(seen.values()) <= 1
