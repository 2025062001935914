"""Promise 19: what the summary says happened is what was made to happen, and nothing else.

Each trial is one run with bad, over-long and repeated rows, a process that dies preparing them, steps that are not
finite, a loss that jumps, kills, requests to stop and a damaged checkpoint: which, and where, is drawn by chance.
"""

from __future__ import annotations

import json
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from tests.crash.process import Process, at_step, faulty_losses, result

from trivium.train.checkpoint import steps_in

STEPS, EVERY = 60, 5
WEIGHTS = "weights.safetensors"
BAD = ['{"prompt": "x", "comp', '{"prompt": "x", "completion": " "}', "nonsense", '{"mesages": []}', '["a"]']


@dataclass
class Made:
    """What a trial is made to go through."""

    bad: list[int] = field(default_factory=list)  # lines
    over_long: list[int] = field(default_factory=list)
    repeated: int = 0
    good: int = 0
    died: bool = False
    not_finite: list[int] = field(default_factory=list)  # steps
    jumps: list[int] = field(default_factory=list)
    ends: list[tuple[int, int, bool]] = field(default_factory=list)  # (step, signal, the newest checkpoint is damaged)


def drawn(rng: random.Random) -> Made:
    ends = sorted(rng.sample(range(12, STEPS - 1), rng.randrange(4)))
    return Made(
        died=rng.random() < 0.5,
        not_finite=sorted(rng.sample(range(2, STEPS), rng.randrange(4))),
        jumps=[rng.randrange(30, STEPS)] if rng.random() < 0.5 else [],
        ends=[(at, rng.choice([signal.SIGKILL, signal.SIGTERM]), rng.random() < 0.4) for at in ends],
    )


def write(file: Path, made: Made, rng: random.Random) -> None:
    """The good rows of a file, and among them bad, over-long and repeated ones."""
    good = file.read_text(encoding="utf-8").splitlines()
    long = json.dumps({"prompt": "7x" * 80, "completion": "blue"})
    rows = [(row, "good") for row in good] + [(row, "repeated") for row in rng.sample(good, rng.randrange(4))]
    rows += [(rng.choice(BAD), "bad") for _ in range(rng.randrange(6))] + [(long, "over_long")] * rng.randrange(2)
    rng.shuffle(rows)
    file.write_text("".join(row + "\n" for row, _ in rows), encoding="utf-8")
    kinds = [kind for _, kind in rows]
    made.good, made.repeated = len(good), kinds.count("repeated")
    made.bad = [n for n, kind in enumerate(kinds, 1) if kind == "bad"]
    made.over_long = [n for n, kind in enumerate(kinds, 1) if kind == "over_long"]


def faults(made: Made, recipe: Path, end: tuple[int, int] | None) -> Callable[[], None]:
    """What happens in a process: its losses are at fault, a process it starts dies, and its end comes at a step."""

    def put() -> None:
        os.environ["TRIVIUM_CACHE"] = str(recipe.parent / "cache")
        faulty_losses(made.not_finite, made.jumps)
        if made.died:
            from trivium.data import prepare

            class Dying(prepare.Workers):
                def __init__(self, maker: Any, count: int) -> None:
                    super().__init__(maker, 1)
                    self.processes[0].kill()

            prepare.LITTLE, prepare.cores, prepare.Workers = 0, lambda: 2, Dying
        if end is not None:
            at_step(end[0], lambda: os.kill(os.getpid(), end[1]))

    return put


def is_whole(folder: Path) -> bool:
    """Whether a checkpoint's weights are as long as its manifest says: the one damage that is done here."""
    listed = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["files"]
    return bool((folder / WEIGHTS).stat().st_size == listed[WEIGHTS][0])


def carried_out(made: Made, recipe: Path) -> tuple[str, dict[str, Any]]:
    """The run, ended and begun again as drawn; returns what it said last, and what its journal should say."""
    after: list[int] = []
    repeated = rejected = 0
    for step, number, damaged in made.ends:
        ended = Process(recipe, meanwhile=faults(made, recipe, (step, number))).wait()
        assert ended.code == (75 if number == signal.SIGTERM else -number), ended.said
        (training,) = (recipe.parent / "out").glob("x.training/*")
        logged = step if number == signal.SIGTERM else step - 1  # a kill comes before the update, a stop after it
        there = [training / f"step-{n:08}" for n in reversed(steps_in(training))]
        if damaged and sum(map(is_whole, there)) > 1:
            newest = next(filter(is_whole, there)) / WEIGHTS
            newest.write_bytes(newest.read_bytes()[:-1])
        found = next(filter(is_whole, there))
        rejected += there.index(found)
        after.append(int(found.name.removeprefix("step-")))
        repeated += logged - after[-1]
    ended = Process(recipe, meanwhile=faults(made, recipe, None)).wait()
    assert ended.code == 0, ended.said
    return ended.said, {"attempts": len(after) + 1, "after": after, "repeated": repeated, "rejected": rejected}


@pytest.mark.promise(19)
@pytest.mark.parametrize("seed", [pytest.param(n, marks=[pytest.mark.slow] if n >= 2 else []) for n in range(24)])
def test_the_summary_tells_what_happened_and_nothing_else(seed, cell, tried):
    rng = random.Random(seed)
    made = drawn(rng)
    recipe = cell("sft-lora", save_every=EVERY, skip_non_finite=3, max_length=100, on_overflow="drop",
                  duplicates="drop", bad_rows=1.0)  # fmt: skip
    file = recipe.parent / "chats.jsonl"
    write(file, made, rng)
    said, journal = carried_out(made, recipe)

    (stage,) = json.loads((recipe.parent / "out" / "summary.json").read_text(encoding="utf-8"))["stages"]
    rows, events = stage["rows"], stage["events"]
    assert rows["set_aside"] == len(made.bad)
    assert rows["over_long"] == len(made.over_long)
    assert (rows["dropped"], rows["duplicates"]) == (made.repeated, made.repeated)
    assert rows["used"] + rows["held_out"] == made.good
    assert rows["read"] == made.good + made.repeated + len(made.bad) + len(made.over_long)
    assert rows.get("died", 0) == made.died
    quarantine = recipe.parent / "out" / "x" / "quarantine.jsonl"
    found = quarantine.read_text(encoding="utf-8").splitlines() if quarantine.exists() else []
    assert [json.loads(line)["origin"] for line in found] == [f"{file}:{n}" for n in sorted(made.bad + made.over_long)]

    assert (events["attempts"], events["went_on_after"]) == (journal["attempts"], journal["after"])
    assert (events["steps_repeated"], len(events["rejected"])) == (journal["repeated"], journal["rejected"])
    assert [one["step"] for one in events["skipped"]] == made.not_finite
    jumps = [step for step in made.jumps if step not in made.not_finite]
    assert [one["step"] for one in events["spikes"]] == jumps
    assert len(result(recipe)["rows"]) >= STEPS, "each step once"
    told(said, made, journal, jumps)
    tried(
        runs=1, rows_set_aside=len(found), steps_left_out=len(made.not_finite), jumps=len(jumps), ends=len(made.ends),
        rejections=journal["rejected"], processes_that_died=int(made.died),
    )  # fmt: skip


def told(said: str, made: Made, journal: dict[str, Any], jumps: list[int]) -> None:
    """The line at the end of the run says the same, and is silent on what did not happen."""
    (line,) = (line for line in said.splitlines() if line.startswith("x: ") and " rows = " in line)
    phrases = {
        f"{len(made.bad)} set aside": len(made.bad),
        f"{len(made.over_long)} over-long": len(made.over_long),
        f"{made.repeated} dropped": made.repeated,
        "1 times a process died preparing them": made.died,
        f"{journal['attempts']} attempts, on after step {', '.join(map(str, journal['after']))}, "
        f"{journal['repeated']} steps done again": made.ends,
        f"{journal['rejected']} rejection{'s' * (journal['rejected'] != 1)} of a checkpoint": journal["rejected"],
        f"{len(made.not_finite)} step{'s' * (len(made.not_finite) != 1)} left out as not finite "
        f"({', '.join(map(str, made.not_finite))})": made.not_finite,
        f"the loss jumped at step {', '.join(map(str, jumps))}": jumps,
    }  # fmt: skip
    for phrase, happened in phrases.items():
        assert (phrase in line) == bool(happened), f"{phrase!r} in {line!r}"
    words = {"set aside": made.bad, "attempts": made.ends, "rejection": journal["rejected"], "died": made.died,
             "left out as": made.not_finite, "jumped": jumps}  # fmt: skip
    for word, happened in words.items():
        assert (word in line) == bool(happened), f"{word!r} in {line!r}"
