"""Runs of a tiny model in processes of their own, which are killed, starved of disk, or damaged meanwhile.

A process is a fork of this one, in which everything is imported: it dies as any other, and is there at once.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trivium import files

LORA = {"name": "lora", "r": 2, "dropout": 0.1}
BOTTLENECK = {"name": "bottleneck", "r": 4, "dropout": 0.1}
COMMON = {"max_steps": 60, "batch_size": 4, "eval_data": 0.2, "learning_rate": 3e-3, "save_every": 5}
DATA = {"pretrain": "text.jsonl", "sft": "chats.jsonl", "preference": "pairs.jsonl", "reward": "pairs.jsonl"}
CELLS = {
    "pretrain-full": {"stage": "pretrain", "method": "full", "optimizer": "muon"},
    "pretrain-lora": {"stage": "pretrain", "method": LORA},
    "pretrain-bottleneck": {"stage": "pretrain", "method": BOTTLENECK},
    "sft-full": {"stage": "sft", "method": "full", "dropout": 0.1},
    "sft-lora": {"stage": "sft", "method": LORA},
    "sft-bottleneck": {"stage": "sft", "method": BOTTLENECK},
    "preference-full": {"stage": "preference", "method": "full"},
    "preference-lora": {"stage": "preference", "method": LORA},
    "preference-bottleneck": {"stage": "preference", "method": BOTTLENECK},
    "preference-kto": {"stage": "preference", "method": LORA, "loss": "kto"},
    "preference-moving": {"stage": "preference", "method": LORA, "reference_sync_steps": 4, "reference_mixup": 0.6},
    "preference-moving-full": {"stage": "preference", "method": "full", "reference_sync_steps": 4},
    "reward-lora": {"stage": "reward", "method": LORA},
}


@dataclass
class Ended:
    """How a process ended: its exit code, minus the signal that killed it; and what it said."""

    code: int
    said: str

    @property
    def killed(self) -> bool:
        return self.code == -signal.SIGKILL


class Process:
    """``trivium run`` in a fork. ``meanwhile`` is called in it first, and may put another `files.operation` there."""

    def __init__(
        self, recipe: Path, *more: object, meanwhile: Callable[[], None] = lambda: None, log: Path | None = None
    ) -> None:
        self.log = log or recipe.parent / "said.txt"
        self.log.write_text("", encoding="utf-8")
        self.started = time.monotonic()
        self.pid = os.fork()
        if self.pid:
            return
        code = 1
        gc.freeze()  # what the tests have made is not the run's to look through, which would copy it
        try:
            handle = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            for stream in (1, 2):
                os.dup2(handle, stream)
            sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
            sys.argv = ["trivium", "run", str(recipe), "--out", str(recipe.parent / "out"), *map(str, more)]
            meanwhile()
            from trivium.cli.main import main

            main()
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)

    def send(self, number: int) -> None:
        os.kill(self.pid, number)

    def running(self, seconds: float = 0.0) -> bool:
        """Whether it has not ended, also after ``seconds``; it is not reaped by asking."""
        time.sleep(seconds)
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    def wait(self, seconds: float = 120.0, then: int | None = None) -> Ended:
        """Until it has ended, or ``seconds`` are over and signal ``then`` is sent."""
        end = time.monotonic() + seconds
        while True:
            found, status = os.waitpid(self.pid, os.WNOHANG)
            if found:
                return Ended(os.waitstatus_to_exitcode(status), self.log.read_text(errors="replace"))
            if time.monotonic() > end:
                assert then is not None, f"it should have ended: {self.log.read_text(errors='replace')}"
                self.send(then)
                end = time.monotonic() + 120
            time.sleep(0.002)

    def wait_for(self, *texts: str) -> None:
        """Until it has said one of these."""
        end = time.monotonic() + 60
        while not self.log.exists() or not any(text in self.log.read_text(errors="replace") for text in texts):
            assert time.monotonic() < end, self.log.read_text(errors="replace")
            time.sleep(0.002)


def at_step(number: int, act: Callable[[], object]) -> None:
    """In this process: before the update of step ``number``, when what it saves is written (a disk's pace is not
    tested), ``act`` is done."""
    from trivium import stage_training
    from trivium.train import loop

    train, rate, at = stage_training.train, loop.set_rate, [0]

    def counting(task: Any, after_step: Any, done: int = 0) -> None:
        at[0] = done
        train(task, after_step, done)

    def acting(*arguments: Any) -> None:
        at[0] += 1
        if at[0] == number:
            for thread in threading.enumerate():
                if thread.name == "checkpoint":
                    thread.join()
            act()
        rate(*arguments)

    stage_training.train, loop.set_rate = counting, acting


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def faulty_losses(not_finite: Container[int], jumps: Container[int] = ()) -> None:
    """In this process: the loss is not a number at some steps, and fifty times what it is at others."""
    from trivium import stage_training

    train = stage_training.train

    def faulty(task: Any, after_step: Any, done: int = 0) -> None:
        at, real = [done], task.objective.compute

        def batches(n: int) -> Any:
            at[0] = n + 1
            return task.batches(n)

        def compute(logprob: Any, forest: Any, reference: Any) -> Any:
            found = real(logprob, forest, reference)
            factor = float("nan") if at[0] in not_finite else 50.0 if at[0] in jumps else 1.0
            if factor != 1.0:
                found.sum = found.sum * factor
                found.stats = {k: v * factor for k, v in found.stats.items()}
            return found

        goal = dataclasses.replace(task.objective, compute=compute)
        train(dataclasses.replace(task, objective=goal, batches=batches), after_step, done)

    stage_training.train = faulty


def write_rows(folder: Path, rows: int = 48) -> None:
    import random

    rng = random.Random(0)
    words = ["red", "blue", "green", "old", "young", "small", "cat", "dog", "bird", "sat", "ran", "saw", "tree"]

    def some(n: int) -> str:
        return " ".join(rng.choice(words) for _ in range(n))

    made: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": some(12)} for _ in range(rows)],
        "chats": [{"prompt": some(4), "completion": some(5)} for _ in range(rows)],
        "pairs": [{"prompt": some(4), "chosen": some(5), "rejected": some(4)} for _ in range(rows)],
    }
    for name, values in made.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(v) + "\n" for v in values), encoding="utf-8")


def result(recipe: Path, name: str = "x") -> dict[str, Any]:
    """What must be the same however often a run was killed: weights, moments, random state, every step's numbers."""
    folder = recipe.parent / "out" / name
    record = json.loads((folder / "trivium.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    numbers = [{k: v for k, v in row.items() if k not in ("seconds", "elapsed")} for row in rows]
    for row in numbers:  # its rows are paths, and each run has its own folder
        row |= {"spike": [Path(place).name for place in row["spike"]]} if "spike" in row else {}
    steps = [row["step"] for row in rows if not any(k.startswith("eval_") for k in row)]
    assert steps == list(range(1, record["steps"] + 1)), "no step is missing or there twice"
    held = {"weights.safetensors", "optimizer.safetensors", "rng.safetensors"}
    assert set(record["events"]["state_sha256"]) - {"reference.safetensors"} == held
    return {
        "state": record["events"]["state_sha256"],
        "files": {p.name: files.sha256_file(p) for p in folder.glob("*.safetensors")},
        "rows": numbers,
        "tokens": record["tokens"],
        "metrics": record["metrics"],
    }


def left_over(out: Path) -> list[str]:
    """Names of what only a process that died may leave."""
    return [p.name for p in out.rglob("*") if p.name.endswith((".partial", ".old", ".gone", ".lock"))]


def events(recipe: Path) -> dict[str, Any]:
    record = json.loads((recipe.parent / "out" / "x" / "trivium.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = record["events"]
    return found
