"""Several processes: promise 13 (dead or stuck ones), and what promises 9, 11 and 16 say of two of them."""

from __future__ import annotations

import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file
from tests.crash.process import Process, events, left_over, result
from tests.crash.several import Several, free_port

LORA = {"name": "lora", "r": 2}
SMALL = {"batch_size": 6, "micro_batch_tokens": 24, "max_steps": 100, "save_every": 50, "learning_rate": 3e-4}
SAME = {  # dropout is each process's own, so that what drops out is not the same for one and for two
    "pretrain": ("pretrain-full", {"optimizer": "adamw"}),
    "pretrain-muon": ("pretrain-full", {}),
    "sft": ("sft-lora", {"method": LORA}),
    "sft-one-forest": ("sft-lora", {"method": LORA, "micro_batch_tokens": 1024}),
    "dpo": ("preference-lora", {"method": LORA}),
    "dpo-full": ("preference-full", {}),
    "dpo-moving": ("preference-moving", {"method": LORA}),
    "kto": ("preference-kto", {"method": LORA}),
    "reward": ("reward-lora", {"method": LORA}),
}
QUICK = ("sft", "kto", "sft-one-forest")  # of fewer steps
LOST = re.compile(
    r"error: process (\d) of 2 \(pid (\d+) on \S+\) (has died|has been silent for [\d.]+ s, and was killed)\n"
)


def done(ended: list) -> list:
    for end in ended:
        assert end.code == 0, end.said
    return ended


@pytest.mark.promise(16)
@pytest.mark.parametrize(
    ("name", "steps"), [(n, 20) for n in QUICK] + [pytest.param(n, 100, marks=pytest.mark.slow) for n in SAME]
)
def test_two_processes_train_as_one(name, steps, cell):
    """Promise 16, over 100 steps: losses and gradient norms within 1e-6, and weights within 1e-5."""
    which, more = SAME[name]
    changed = {**SMALL, "max_steps": steps, **more}
    one, two = cell(which, **changed), cell(which, **changed)
    assert Process(one).wait().code == 0
    second = done(Several(two).wait())[1]
    assert second.said == ""
    a, b = result(one), result(two)
    assert (a["tokens"], len(a["rows"])) == (b["tokens"], len(b["rows"]))
    worst: Counter = Counter()
    for x, y in zip(a["rows"], b["rows"], strict=True):
        assert [x[k] for k in ("step", "tokens", "examples") if k in x] == [
            y[k] for k in ("step", "tokens", "examples") if k in y
        ]
        assert x.keys() == y.keys()
        for key in {"loss", "grad_norm", "eval_loss"} & x.keys():
            worst[key] = max(worst[key], abs(x[key] / y[key] - 1))
    weights = [load_file(next((r.parent / "out" / "x").glob("*model*.safetensors"))) for r in (one, two)]
    apart = max(float((weights[0][n] - weights[1][n]).abs().max()) for n in weights[0])
    print(f"{name}: weights {apart:.1e}", *(f"{k} {v:.1e}" for k, v in worst.items()))
    assert worst["loss"] < 1e-6
    assert worst["grad_norm"] < 1e-6
    assert apart < 1e-5


@pytest.mark.promise(16)
@pytest.mark.slow
def test_three_processes_and_another_number_of_them(cell):
    """More processes than some steps have work for; and a run that goes on with fewer, or more, which is said."""
    changed = {**SMALL, "batch_size": 2, "max_steps": 30, "save_every": 5, "method": LORA}
    one, three, mixed = (cell("sft-lora", **changed) for _ in range(3))
    assert Process(one).wait().code == 0
    done(Several(three, count=3).wait())
    for count, before in ((3, 0), (1, 3), (2, 1)):
        running = Several(mixed, count=count) if count > 1 else Process(mixed)
        first = running.ranks[0] if isinstance(running, Several) else running
        first.wait_for("goes on after" if before else "step 1/30")
        if count != 2:
            while not saved(mixed):
                time.sleep(0.002)
            running.send(signal.SIGTERM)
        ended = running.wait() if isinstance(running, Several) else [running.wait()]
        assert all(end.code == (0 if count == 2 else 75) for end in ended), [end.said for end in ended]
        if before:
            assert f"not to the last bit what an unbroken run gives: processes {before} → {count}" in ended[0].said
    rows = [[row for row in result(recipe)["rows"] if "loss" in row] for recipe in (one, three, mixed)]
    for step in zip(*rows, strict=True):
        assert max(row["loss"] for row in step) / min(row["loss"] for row in step) - 1 < 1e-6


# --- promise 9


def saved(recipe: Path) -> bool:
    found = (recipe.parent / "out").glob("x.training/*/step-*/manifest.json")
    return any(not path.parent.name.endswith(".partial") for path in found)


def telling(recipe: Path):
    """Each process writes down which rows it computes, the first one also which rows the log names."""

    def meanwhile(rank: int) -> None:
        from trivium.train.log import TrainingLog
        from trivium.train.several import Several as Joined

        share, step = Joined.share, TrainingLog.step
        computed: list[str] = []

        def sharing(self, forests):
            mine = share(self, forests)
            computed[:] = [e.origin.rpartition("/")[2] for f in mine for e in f.examples]
            return mine

        def writing(self, log, spike=False):
            with (recipe.parent / f"rows{rank}.txt").open("a", encoding="utf-8") as file:
                names = [row.rpartition("/")[2] for row in log.rows]
                file.write(json.dumps([log.step, names, computed]) + "\n")
            step(self, log, spike)

        Joined.share, TrainingLog.step = sharing, writing

    return meanwhile


def told(recipe: Path, rank: int, which: int) -> dict[int, list[str]]:
    """The rows of each step; of a step that was done again, which must have had the same ones, once."""
    seen: dict[int, list[str]] = {}
    for line in (recipe.parent / f"rows{rank}.txt").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        assert seen.setdefault(row[0], row[which]) == row[which]
    return seen


@pytest.mark.promise(9)
def test_every_example_exactly_once_per_epoch(cell):
    """With kills; each row of a step is computed by one of the two, and the log's order is that of one process."""
    changed = {**SMALL, "batch_size": 4, "max_steps": 30, "save_every": 3}
    one, two = cell("sft-lora", **changed), cell("sft-lora", **changed)
    alone = telling(one)
    assert Process(one, meanwhile=lambda: alone(0)).wait().code == 0
    rng, kills = random.Random(5), 0
    while True:
        running = Several(two, meanwhile=telling(two))
        if kills < 2:
            running.ranks[0].wait_for("step 1/30" if kills == 0 else "goes on after")
            while not saved(two) and running.ranks[0].running(0.01):
                pass
            time.sleep(rng.uniform(0.0, 0.2))
            with_it = running.ranks[kills]
            if with_it.running():
                with_it.send(signal.SIGKILL)
        ended = running.wait()
        if all(end.code == 0 for end in ended):
            break
        kills += 1
    assert kills == 2
    logged, shares = told(two, 0, 1), [told(two, rank, 2) for rank in range(2)]
    assert logged == told(one, 0, 1)
    assert sorted(logged) == list(range(1, 31))
    for step, rows in logged.items():
        assert Counter(rows) == Counter(shares[0][step]) + Counter(shares[1][step])
    assert all(shares[0][step] and shares[1][step] for step in range(1, 22)), "both have work"
    seen = Counter(row for rows in logged.values() for row in rows)
    assert len(seen) == 43
    assert max(seen.values()) - min(seen.values()) <= 1


# --- promise 13


def impatient(rank: int) -> None:
    """What waits for a frozen process waits a tenth as long: the figure itself is a slow test's."""
    from trivium.train import heartbeat

    heartbeat.SILENT = 2.5


def broken(recipe: Path, rank: int, number: int, rng: random.Random, quick: bool = True) -> tuple[float, str] | None:
    """Kill or freeze a rank while it trains; returns how long the other one took to end, and what it said. None where
    they were done before."""
    running = Several(recipe, meanwhile=impatient if quick else lambda rank: None)
    running.ranks[0].wait_for("held-out loss" if not quick else "goes on after" if saved(recipe) else "step 1/")
    time.sleep(rng.uniform(0.0, 0.1 if quick else 1.0))
    while quick and not saved(recipe) and running.ranks[0].running(0.01):
        pass
    victim, other = running.ranks[rank], running.ranks[1 - rank]
    if not (victim.running() and other.running()):
        done(running.wait())
        return None
    victim.send(number)
    asked = time.monotonic()
    if not other.running(0.02):  # it was done when the victim heard
        done([other.wait()])
        victim.send(signal.SIGKILL)
        victim.wait()
        return None
    ended = other.wait(40)
    took = time.monotonic() - asked
    dead = victim.wait(5)
    assert dead.killed, "nobody is left behind, also where it was frozen"
    if ended.code == 0:
        return None
    assert ended.code == 75, ended.said
    lost = LOST.search(ended.said)
    assert lost, ended.said
    assert (int(lost[1]), int(lost[2])) == (rank, victim.pid)
    assert "run the same command again to go on\n" in ended.said
    assert "Traceback" not in ended.said
    return took, ended.said


@pytest.fixture(scope="module")
def expected(base):
    """The result of an unbroken run of two processes, of each cell, once."""
    known: dict = {}

    def of(name: str, cell, **changed) -> dict:
        key = json.dumps([name, changed])
        if key not in known:
            whole = cell(name, **changed)
            done(Several(whole).wait())
            known[key] = result(whole)
        return known[key]

    return of


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("rank", "number"),
    [
        (0, signal.SIGSTOP),
        (1, signal.SIGKILL),
        pytest.param(0, signal.SIGKILL, marks=pytest.mark.slow),
        pytest.param(1, signal.SIGSTOP, marks=pytest.mark.slow),
    ],
)
def test_a_lost_process_is_named_and_the_run_goes_on(rank, number, cell, expected):
    """Killed or frozen; with dropout, which each process draws on its own: the end is in the same bits all the same."""
    changed = {"micro_batch_tokens": 24, "max_steps": 40, "save_every": 5}
    recipe = cell("sft-lora", **changed)
    took = broken(recipe, rank, number, random.Random(f"{rank}{number}"))
    assert took is not None, "this test has to hit it"
    assert took[0] < 12
    again = done(Several(recipe).wait())
    assert "goes on after step" in again[0].said
    assert result(recipe) == expected("sft-lora", cell, **changed)
    assert left_over(recipe.parent / "out") == []


@pytest.mark.promise(13)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["pretrain-full", "sft-lora", "preference-kto", "preference-moving"])
def test_however_often_one_is_killed(name, cell, expected, tried):
    changed = {"micro_batch_tokens": 24, "max_steps": 60, "save_every": 5}
    rng, slowest, survived = random.Random(name), 0.0, 0
    while survived < 12:
        recipe = cell(name, **changed)
        for _ in range(3):
            found = broken(recipe, rng.randrange(2), signal.SIGKILL, rng)
            if found is None:
                break
            slowest, survived = max(slowest, found[0]), survived + 1
        done(Several(recipe).wait())
        assert result(recipe) == expected(name, cell, **changed)
    print(f"{name}: {survived} kills survived, the other ended within {slowest:.1f} s")
    tried(kills=survived)


@pytest.mark.promise(13)
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_a_frozen_process_is_noticed_within_30_seconds(rank, cell, expected):
    changed = {"micro_batch_tokens": 24, "max_steps": 120, "save_every": 5}
    recipe = cell("sft-lora", **changed)
    found = broken(recipe, rank, signal.SIGSTOP, random.Random(rank), quick=False)
    assert found is not None
    print(f"rank {rank} frozen: the other ended after {found[0]:.1f} s")
    assert found[0] < 30
    done(Several(recipe).wait())
    assert result(recipe) == expected("sft-lora", cell, **changed)


@pytest.mark.promise(13)
@pytest.mark.parametrize("where", [pytest.param(n, marks=pytest.mark.slow) for n in ("evaluation", "before", "save")])
def test_killed_elsewhere_than_in_a_step(where, cell, expected):
    """While the data is prepared, while the first one evaluates and the other one waits, amid a save."""
    changed = {"micro_batch_tokens": 24, "max_steps": 40, "save_every": 5}
    recipe = cell("sft-lora", **changed)

    def meanwhile(rank: int) -> None:
        def die(*_, **__):
            os.kill(os.getpid(), signal.SIGKILL)

        if where == "before" and rank == 1:
            from trivium import stage_runner

            stage_runner.proven_by_first = die
        if where == "evaluation" and rank == 1:
            from trivium import stage_training

            train = stage_training.train
            stage_training.train = lambda *a: (threading.Timer(0.5, die).start(), train(*a))
        if where == "evaluation" and rank == 0:
            from trivium import stage_training

            evaluate = stage_training.evaluate
            stage_training.evaluate = lambda *a: (time.sleep(8), evaluate(*a))[1]
        if where == "save" and rank == 0:
            from trivium import files

            act_as = files.operation
            files.operation = lambda n, p, act: die() if "step-00000010" in str(p) else act_as(n, p, act)

    running = Several(recipe, meanwhile=meanwhile)
    ended = running.wait()
    survivor, victim = (ended[1], ended[0]) if where == "save" else (ended[0], ended[1])
    assert victim.killed
    assert survivor.code == 75, survivor.said
    assert LOST.search(survivor.said), survivor.said
    done(Several(recipe).wait())
    assert result(recipe) == expected("sft-lora", cell, **changed)


# --- promise 11


@pytest.mark.promise(11)
@pytest.mark.parametrize(
    ("number", "to"),
    [
        (signal.SIGINT, (1,)),
        pytest.param(signal.SIGTERM, (0, 1), marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, (0,), marks=pytest.mark.slow),
    ],
)
def test_a_request_to_stop_is_everybodys(number, to, cell, expected):
    """Sent to both or to one: the first one saves, all end, one tells."""
    changed = {"micro_batch_tokens": 24, "max_steps": 40, "save_every": 5}
    recipe = cell("sft-lora", **changed)
    running = Several(recipe)
    running.ranks[0].wait_for("step 1/40")
    time.sleep(0.1)
    asked = time.monotonic()
    for rank in to:
        running.ranks[rank].send(number)
    ended = running.wait()
    assert [end.code for end in ended] == [75, 75], [end.said for end in ended]
    assert time.monotonic() - asked < 8
    found = re.findall(r"error: interrupted at step (\d+) of 40 of x, which is saved\n", "".join(e.said for e in ended))
    assert len(found) == 1, [end.said for end in ended]
    assert "Traceback" not in ended[0].said + ended[1].said
    assert left_over(recipe.parent / "out") == []
    again = done(Several(recipe).wait())
    assert f"goes on after step {found[0]} of 40" in again[0].said
    assert events(recipe)["steps_repeated"] == 0
    assert result(recipe) == expected("sft-lora", cell, **changed)


@pytest.mark.promise(11)
def test_a_request_to_stop_before_the_first_step(cell):
    recipe = cell("sft-lora")
    running = Several(recipe)
    running.ranks[0].wait_for("sft from the model")
    running.ranks[1].send(signal.SIGTERM)
    ended = running.wait()
    assert [end.code for end in ended] == [75, 75], [end.said for end in ended]
    assert "".join(end.said for end in ended).count("run the same command again to go on\n") == 1
    assert left_over(recipe.parent / "out") == []


def test_a_request_to_stop_while_nobody_has_come(cell):
    recipe = cell("sft-lora")
    running = Several(recipe, only=0)
    time.sleep(0.5)
    running.send(signal.SIGTERM)
    (ended,) = running.wait(20)
    assert ended.code == 75, ended.said
    assert ended.said.endswith("run the same command again to go on\n")


# --- errors


def test_a_users_error_is_told_once(cell):
    recipe = cell("sft-lora", learning_rate=-1)
    ended = Several(recipe).wait()
    assert [end.code for end in ended] == [2, 2]
    assert "".join(end.said for end in ended).count("error: ") == 1


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("rank", "what"),
    [
        (1, "user"),
        (0, "bug"),
        (0, "everywhere"),
        pytest.param(0, "user", marks=pytest.mark.slow),
        pytest.param(1, "bug", marks=pytest.mark.slow),
    ],
)
def test_an_error_of_one_ends_all(rank, what, cell):
    """Its own exit code for all, told once, within seconds, and no lock is left."""
    recipe = cell("sft-lora", micro_batch_tokens=24)

    def meanwhile(mine: int) -> None:
        from trivium.errors import DiskError
        from trivium.train import loop

        rate, steps = loop.set_rate, [0]

        def failing(*arguments):
            steps[0] += 1
            if steps[0] == 7 and (mine == rank or what == "everywhere"):
                if what == "bug":
                    raise AssertionError("it is broken here")
                raise DiskError("a disk is full", "free some space")
            rate(*arguments)

        loop.set_rate = failing

    began = time.monotonic()
    ended = Several(recipe, meanwhile=meanwhile).wait()
    code = 1 if what == "bug" else 3
    said = ended[0].said + ended[1].said
    assert [end.code for end in ended] == [code, code], said
    assert said.count("it is broken here" if what == "bug" else "error: a disk is full") == (
        2 if what == "bug" else 1
    ), said
    assert said.count("Traceback") == (1 if what == "bug" else 0)
    assert time.monotonic() - began < 30
    assert left_over(recipe.parent / "out") == []


def test_other_data_or_another_plan_is_noticed(cell):
    recipe = cell("sft-lora", micro_batch_tokens=24)

    def otherwise(rank: int) -> None:
        if rank:
            from trivium import stage_runner

            run_order = stage_runner.run_order
            stage_runner.run_order = lambda stage, data: run_order(stage.model_copy(update={"seed": 5}), data)

    ended = Several(recipe, meanwhile=otherwise).wait()
    said = ended[0].said + ended[1].said
    assert [end.code for end in ended] == [2, 2], said
    assert said.count("error: process 1 reads other data than process 0") == 1


def test_another_recipe_is_noticed(cell):
    def otherwise(rank: int) -> None:
        if rank:
            sys.argv += ["--set", "stages.x.learning_rate=0.5"]

    ended = Several(cell("sft-lora"), meanwhile=otherwise).wait()
    assert [end.code for end in ended] == [2, 2], [end.said for end in ended]
    assert "error: process 1 was given another recipe or other options than process 0\n" in ended[1].said


def test_what_knows_nothing_of_several_is_refused(cell):
    ended = Several(cell("sft-lora"), "--profile").wait()
    assert [end.code for end in ended] == [2, 2]
    assert "error: --profile tells of one process, and there are 2\n" in ended[0].said + ended[1].said


# --- torchrun itself

WALK = [
    {"name": "base", "stage": "pretrain", "data": "text.jsonl", "max_steps": 4, "batch_size": 4},
    {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", "method": LORA, "max_steps": 4},
    {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", "max_steps": 4},
    {"name": "whole", "stage": "preference", "from": "chat", "data": "pairs.jsonl", "method": "full", "max_steps": 4},
]


def torchrun(recipe: Path, count: int = 2) -> subprocess.Popen:
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(count),
               "--master_port", str(free_port()), "-m", "trivium", "run", str(recipe), "--out",
               str(recipe.parent / "out")]  # fmt: skip
    said = (recipe.parent / "said.txt").open("w")
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said, text=True, cwd=recipe.parent)


def trains(recipe: Path) -> list[int]:
    """The processes, when they have begun to train."""
    end, said = time.monotonic() + 90, ""
    while "step 1/4" not in said:
        assert time.monotonic() < end, said
        said = (recipe.parent / "said.txt").read_text()
        time.sleep(0.05)
    found = re.search(r"2 processes: pid (\d+), (\d+) on", said)
    assert found, said
    return [int(pid) for pid in found.groups()]


def test_torchrun_carries_out_a_recipe(base, tmp_path):
    """From nothing through all three steps; the second time, without torchrun, there is nothing to do."""
    for file in base.glob("*.jsonl"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    model = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
             "vocab_size": 300, "max_position_embeddings": 128}  # fmt: skip
    shared = {"batch_size": 4, "micro_batch_tokens": 32, "eval_data": 0}
    recipe = tmp_path / "recipe.yaml"
    stages = [{**stage, **shared} for stage in WALK]
    recipe.write_text(yaml.safe_dump({"name": "walk", "model": model, "prompts": [], "stages": stages}))
    running = torchrun(recipe)
    out, _ = running.communicate(timeout=120)
    said = (tmp_path / "said.txt").read_text()
    assert running.returncode == 0, said
    assert said.count("2 processes: pid ") == 1
    assert "Warning" not in said
    assert "frame #" not in said
    assert out.count("summary.json") == 1
    again = done(Several(recipe).wait())
    assert again[0].said.count("done before") == len(WALK)
    assert again[1].said == ""
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert [stage["name"] for stage in summary["stages"]] == [stage["name"] for stage in WALK]


@pytest.mark.promise(13)
@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_torchrun_with_a_process_that_dies(rank, cell):
    """Its agent ends the other one at once: the message is told all the same."""
    recipe = cell("sft-lora", micro_batch_tokens=24, max_steps=400)
    running = torchrun(recipe)
    pids = trains(recipe)
    os.kill(pids[rank], signal.SIGKILL)
    running.communicate(timeout=60)
    said = (recipe.parent / "said.txt").read_text()
    assert f"error: process {rank} of 2 (pid {pids[rank]} on {socket.gethostname()}) has died\n" in said
    assert "frame #" not in said
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_torchrun_is_asked_to_stop(number, cell):
    """It passes that on to both: saved, told once, nobody left."""
    recipe = cell("sft-lora", micro_batch_tokens=24, max_steps=400)
    running = torchrun(recipe)
    pids = trains(recipe)
    running.send_signal(number)
    running.communicate(timeout=60)
    said = (recipe.parent / "said.txt").read_text()
    assert len(re.findall(r"error: interrupted at step \d+ of 400 of x, which is saved\n", said)) == 1, said
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert left_over(recipe.parent / "out") == []


@pytest.mark.promise(13)
@pytest.mark.slow
def test_torchrun_itself_dies(cell):
    """Its processes would be orphans, and the store is gone with it."""
    recipe = cell("sft-lora", micro_batch_tokens=24, max_steps=4000)
    running = torchrun(recipe)
    pids = trains(recipe)
    running.kill()
    running.communicate(timeout=60)
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert "error: the launcher (torchrun) of process" in (recipe.parent / "said.txt").read_text()
