"""Promises 11 and 14, and what else may befall a run: signals, a closed terminal, a second run, a clock that jumps."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import socket
import time
from pathlib import Path

import pytest
from tests.crash.disk import Asked, operations, put
from tests.crash.process import Process, events, left_over, result

from trivium.errors import BusyError
from trivium.interrupt import Stopped
from trivium.lock import let_go, only_run

SAVED = re.compile(
    r"error: interrupted at step (\d+) of 60 of x, which is saved\n  run the same command again to go on\n$"
)


@pytest.fixture(scope="module")
def expected(base):
    """The result of an unbroken run of each cell, once."""
    known: dict = {}

    def of(name: str, cell) -> dict:
        if name not in known:
            whole = cell(name)
            ended = Process(whole).wait()
            assert ended.code == 0, ended.said
            known[name] = result(whole)
        return known[name]

    return of


@pytest.mark.promise(11)
@pytest.mark.parametrize(
    ("number", "times", "moments"),
    [
        (signal.SIGTERM, 1, 2),
        (signal.SIGINT, 2, 2),
        (signal.SIGHUP, 1, 1),
        *(pytest.param(n, t, 30, marks=pytest.mark.slow) for n in (signal.SIGTERM, signal.SIGINT) for t in (1, 2)),
    ],
)
def test_a_signal_at_any_moment_loses_nothing(number, times, moments, cell, expected, tried):
    """Sent after the first step; twice: the second follows at once. Nothing that was trained is trained again."""
    rng, name = random.Random(f"{number}{times}"), "sft-lora"
    for _ in range(moments):
        recipe = cell(name, save_every=3)
        process = Process(recipe)
        process.wait_for("step 1/60")
        time.sleep(rng.uniform(0, 0.6))
        for _ in range(times):
            process.send(number)
            time.sleep(rng.uniform(0, 0.02))
        asked = time.monotonic()
        ended = process.wait()
        tried(signals=times)
        assert "Traceback" not in ended.said, ended.said
        if ended.code == 0:
            continue  # it was done before it heard
        assert ended.code == 75, ended.said
        assert time.monotonic() - asked < 5
        assert left_over(recipe.parent / "out") == []
        found = SAVED.search(ended.said)
        again = Process(recipe).wait()
        assert again.code == 0, again.said
        if found:
            assert f"goes on after step {found[1]} of 60" in again.said or found[1] == "60"
        assert events(recipe)["steps_repeated"] == 0
        assert result(recipe) == expected(name, cell)


@pytest.mark.promise(11)
@pytest.mark.parametrize(
    ("number", "times", "every"),
    [
        (signal.SIGTERM, 2, 29),
        *(pytest.param(n, t, 1, marks=pytest.mark.slow) for n, t in ((signal.SIGTERM, 1), (signal.SIGINT, 2))),
    ],
)
def test_a_signal_at_any_operation_on_the_disk(number, times, every, cell, tried):
    """Before the first step, inside each save, and while the result is written; once, and twice at once."""
    short = {"max_steps": 6, "save_every": 2, "keep_checkpoints": 1}
    assert Process(cell("sft-lora", **short)).wait().code == 0
    whole = cell("sft-lora", **short)
    total = operations(whole)
    expected, first = result(whole), 1 + random.Random(number).randrange(every)
    for k in range(first, total + 1, every):
        recipe = cell("sft-lora", **short)
        ended = Process(recipe, meanwhile=lambda k=k: put(Asked(k, number, times))).wait()
        tried(signals=times, operations=1)
        assert ended.code in (0, 75), f"operation {k}: {ended.said}"
        assert "Traceback" not in ended.said, f"operation {k}: {ended.said}"
        assert left_over(recipe.parent / "out") == [], f"operation {k}"
        again = Process(recipe).wait()
        assert again.code == 0, f"operation {k}: {again.said}"
        assert events(recipe)["steps_repeated"] == 0, f"operation {k}"
        assert result(recipe) == expected, f"operation {k}"
        shutil.rmtree(recipe.parent)


@pytest.mark.promise(11)
@pytest.mark.parametrize("late", [False, True])
def test_a_signal_amid_the_letting_go_of_the_lock(late, tmp_path, monkeypatch):
    """The end of the process lets go of it then; and of no other's that has come meanwhile."""
    unlink = Path.unlink

    def interrupted(path: Path) -> None:
        monkeypatch.setattr(Path, "unlink", unlink)
        if late:
            unlink(path)
        raise Stopped

    with pytest.raises(Stopped), only_run(tmp_path):
        monkeypatch.setattr(Path, "unlink", interrupted)
    other = tmp_path / ".lock"
    assert other.exists() != late
    if late:
        other.write_text("{}", encoding="utf-8")
    let_go()
    assert other.exists() == late
    let_go()
    with only_run(tmp_path):
        assert other.exists()
    assert not other.exists()


@pytest.mark.promise(11)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_before_the_first_step(number, cell):
    recipe = cell("sft-lora")
    process = Process(recipe)
    process.wait_for("sft from the model")
    process.send(number)
    ended = process.wait()
    assert ended.code == 75, ended.said
    assert ended.said.endswith("run the same command again to go on\n")
    assert Process(recipe).wait().code == 0
    assert left_over(recipe.parent / "out") == []


@pytest.mark.promise(11)
def test_a_signal_that_a_library_turns_into_its_own_error(cell):
    """As an import does that is interrupted; and what follows while the process ends changes the exit code no more."""
    recipe = cell("sft-lora")

    def meanwhile() -> None:
        from trivium import chain

        def check(recipe) -> None:
            try:
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(1)
            except BaseException:
                raise ModuleNotFoundError("Could not import module 'LlamaConfig'") from None

        chain.check_sizes = check
        from trivium.cli import main

        say = main.say

        def impatient(text: str) -> None:
            say(text)
            os.kill(os.getpid(), signal.SIGINT)

        main.say = impatient

    ended = Process(recipe, meanwhile=meanwhile).wait()
    assert ended.code == 75, ended.said
    assert "Traceback" not in ended.said
    assert "finished stages and checkpoints are kept" in ended.said


@pytest.mark.promise(11)
def test_a_signal_amid_a_save(cell, expected):
    recipe = cell("sft-lora", save_every=4)

    def slow_disk() -> None:
        from trivium import files

        def slow(name, path, act):
            if "step-00000008" in str(path):
                time.sleep(0.05)
                if name == "fsync":
                    os.kill(os.getpid(), signal.SIGTERM)
            return act()

        files.operation = slow

    ended = Process(recipe, meanwhile=slow_disk).wait()
    assert ended.code == 75, ended.said
    assert SAVED.search(ended.said), ended.said
    assert left_over(recipe.parent / "out") == []
    assert Process(recipe).wait().code == 0
    assert result(recipe) == expected("sft-lora", cell)


@pytest.mark.promise(11)
def test_a_signal_amid_an_evaluation_does_not_wait_for_its_end(cell, expected):
    recipe = cell("preference-lora", save_every=50)

    def in_evaluation() -> None:
        from trivium import stage_training

        evaluate, times = stage_training.evaluate, [0]

        def evaluating(*arguments):
            times[0] += 1
            if times[0] == 2:  # the first one in the middle of the training
                os.kill(os.getpid(), signal.SIGTERM)
            return evaluate(*arguments)

        stage_training.evaluate = evaluating

    ended = Process(recipe, meanwhile=in_evaluation).wait()
    assert ended.code == 75, ended.said
    assert "interrupted at step 20 of 60 of x, which is saved" in ended.said
    assert "step 20/60  held-out" not in ended.said
    again = Process(recipe).wait()
    assert again.code == 0, again.said
    assert "step 20/60  held-out" in again.said, "it is done then"
    assert result(recipe) == expected("preference-lora", cell)


def test_nohup_and_a_terminal_that_is_closed(cell, expected):
    """What is ignored stays ignored; and nobody listening ends no run."""
    recipe = cell("sft-lora")

    def meanwhile() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        from trivium.train import loop

        rate, steps = loop.set_rate, [0]

        def closing(*arguments):
            steps[0] += 1
            if steps[0] == 10:
                os.kill(os.getpid(), signal.SIGHUP)
                os.close(2)
            rate(*arguments)

        loop.set_rate = closing

    ended = Process(recipe, meanwhile=meanwhile).wait()
    assert ended.code == 0, ended.said
    assert result(recipe) == expected("sft-lora", cell)


def test_a_clock_that_jumps_changes_nothing(cell, expected):
    recipe = cell("sft-lora", save_every=None, save_minutes=0.001)

    def jumping() -> None:
        now, times = time.time, [0]

        def jump() -> float:
            times[0] += 1
            return now() + (-1) ** times[0] * 1e8

        time.time = jump

    ended = Process(recipe, meanwhile=jumping).wait(0.9, then=signal.SIGKILL)
    if ended.killed:
        ended = Process(recipe, meanwhile=jumping).wait()
    assert ended.code == 0, ended.said
    assert result(recipe) == expected("sft-lora", cell)
    assert events(recipe)["checkpoints"]["saved"] > 3


# --- two runs


@pytest.mark.promise(14)
def test_a_second_run_is_refused_with_who_is_there(cell):
    recipe = cell("sft-lora", max_steps=2000)
    first = Process(recipe)
    first.wait_for("step 1/")
    second = Process(recipe).wait()  # says into the same file
    assert second.code == 2, second.said
    assert re.search(rf"another run is at work here \(process {first.pid} on \S+\)\n  wait for it", second.said)
    first.send(signal.SIGTERM)
    assert first.wait().code == 75


@pytest.mark.promise(14)
def test_of_several_that_start_at_once_one_runs(tmp_path, tried):
    """Twenty times three, half of them where a run has died; whoever is refused is told who is there."""
    died = os.fork() or os._exit(0)
    os.waitpid(died, 0)
    left = json.dumps({"pid": died, "host": socket.gethostname(), "started": "1"})
    for number in range(20):
        if number % 2:
            (tmp_path / ".lock").write_text(left, encoding="utf-8")
        (gate, opens), (over, ends), (reader, writer) = os.pipe(), os.pipe(), os.pipe()
        children = [child for _ in range(3) if (child := starts(tmp_path, gate, opens, over, ends, writer))]
        os.close(opens)
        said = b""
        while said.count(b"\n") < 3:
            said += os.read(reader, 4096)
        told = said.decode().splitlines()
        os.close(ends)
        for child in children:
            os.waitpid(child, 0)
        for handle in (gate, over, reader, writer):
            os.close(handle)
        ran = [line.split()[1] for line in told if line.startswith("ran ")]
        assert len(ran) == 1, told
        refused = [line for line in told if line.startswith("refused ") and f"(process {ran[0]} on " in line]
        assert len(refused) == 2, told
        assert not (tmp_path / ".lock").exists()
        tried(starts=3)


def starts(folder: Path, gate: int, opens: int, over: int, ends: int, writer: int) -> int:
    """A process that takes the folder when ``gate`` is opened, tells what came of it, and keeps it until ``over``."""
    if child := os.fork():
        return child
    os.close(opens)
    os.close(ends)
    os.read(gate, 1)
    try:
        with only_run(folder):
            os.write(writer, f"ran {os.getpid()}\n".encode())
            os.read(over, 1)
    except BusyError as error:
        os.write(writer, f"refused {error.what}\n".encode())
    finally:
        os._exit(0)


@pytest.mark.promise(14)
def test_a_stale_lock_is_recognised(cell):
    recipe = cell("sft-lora", max_steps=2000)
    first = Process(recipe)
    first.wait_for("step 1/")
    first.send(signal.SIGKILL)
    assert first.wait().killed
    lock = recipe.parent / "out" / ".lock"
    assert json.loads(lock.read_text(encoding="utf-8"))["pid"] == first.pid
    second = Process(recipe)
    second.wait_for("step ")
    second.send(signal.SIGTERM)
    ended = second.wait()
    assert f"process {first.pid} on " in ended.said
    assert "died in this folder; its lock is taken over" in ended.said
    assert not lock.exists()


def test_fresh_starts_over_and_keeps_the_old_folder(cell):
    recipe = cell("sft-lora", save_every=10)
    process = Process(recipe)
    process.wait_for("step 20/60")
    process.send(signal.SIGTERM)
    process.wait()
    out = recipe.parent / "out"
    before = {p.relative_to(out) for p in out.rglob("*")}
    ended = Process(recipe, "--fresh").wait()
    assert ended.code == 0, ended.said
    assert f"what was there is kept in {out}.1" in ended.said
    assert "goes on" not in ended.said
    aside = Path(f"{out}.1")
    assert {p.relative_to(aside) for p in aside.rglob("*")} == before
    assert Process(recipe, "--fresh").wait().code == 0
    assert Path(f"{out}.2").is_dir()


def test_fresh_moves_nothing_that_is_not_ours(cell):
    recipe = cell("sft-lora")
    out = recipe.parent / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("mine", encoding="utf-8")
    ended = Process(recipe, "--fresh").wait()
    assert ended.code == 2, ended.said
    assert "not a run of trivium, so it is not moved" in ended.said
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_nothing_that_is_not_ours_is_swept(cell):
    recipe = cell("sft-lora", max_steps=2)
    mine = [recipe.parent / "out" / name for name in ("photos", "photos.old", "notes.old", "draft.partial", "x.gone")]
    for folder in mine:
        folder.mkdir(parents=True)
    first = Process(recipe, "--fresh").wait()
    assert first.code == 2, "they are no run's"
    assert Process(recipe).wait().code == 0
    assert all(folder.is_dir() for folder in mine)


def test_fresh_with_nothing_there(cell):
    recipe = cell("sft-lora", max_steps=2)
    ended = Process(recipe, "--fresh").wait()
    assert ended.code == 0, ended.said
    assert "kept in" not in ended.said
    assert not (recipe.parent / "out.1").exists()
