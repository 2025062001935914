"""The process of a run: it stops with the one that started it, goes on afterwards, and its death is told."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from tests.comparing.conftest import STAGES

from trivium.cli.main import main
from trivium.comparing import process
from trivium.comparing.comparison import compare
from trivium.errors import DataError, UserError
from trivium.recipe_file import read_recipe

carry_out = process.carry_out


def forked(log: Path, *arguments: object) -> int:
    """The command line in a fork of this process, in which everything is imported; gives its process id."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        sys.argv = ["trivium", *map(str, arguments)]
        process.carry_out = carry_out
        main()
    except SystemExit as end:
        code = int(end.code or 0)
    finally:
        os._exit(code)


def wait_for(what, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end
        time.sleep(0.02)


def alive(folder: Path) -> list[str]:
    """The processes that work for a comparison in ``folder``."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            told = file.read_bytes().decode(errors="replace")
        except OSError:
            continue
        if str(folder) in told and "trivium" in told:
            found.append(told)
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGKILL, marks=pytest.mark.slow)])
def test_an_interrupted_comparison_leaves_nothing_running_and_goes_on(done, recipe, tmp_path, here, number):
    stage = {k: v for k, v in STAGES[1].items() if k != "from"} | {"max_steps": 150, "save_every": 3}
    path, out = recipe(stages=[stage], model=str(done[1] / "parent" / "base")), tmp_path / "out"
    pid = forked(tmp_path / "said.txt", "compare", path, "--methods", "lora", "--out", out)
    wait_for(lambda: list(out.glob("lora/seed5/chat.training/*/step-*")))
    os.kill(pid, number)
    ended = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    told = (tmp_path / "said.txt").read_text(encoding="utf-8")
    wait_for(lambda: not alive(out))
    if number == signal.SIGTERM:
        assert ended == 75, told
        assert "error: lora, seed 5: interrupted at step" in told
        assert told.rstrip().endswith("run the same command again to go on")
        assert told.count("error:") == 1
        found = compare(read_recipe(path, ["stages.chat.save_every=1000"]), out, ["lora"])
        record = json.loads((out / "lora" / "seed5" / "chat" / "trivium.json").read_text(encoding="utf-8"))
        assert record["events"]["attempts"] == 2
        assert found["ways"][0]["runs"][0]["steps"] == 150


def test_the_error_of_a_run_is_its_own(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    stage = {"name": "x", "stage": "sft", "data": "missing.jsonl"}
    recipe.write_text(json.dumps({"name": "x", "model": "nowhere", "stages": [stage]}), encoding="utf-8")
    with pytest.raises(DataError, match=r"missing\.jsonl"):
        process.carry_out(recipe, tmp_path / "out")


@pytest.mark.parametrize(("act", "said"), [("kill -9 $$", "killed by signal 9"), ("exit 1", "exit code 1")])
def test_a_process_that_dies_is_told(tmp_path, monkeypatch, act, said):
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\n{act}\n", encoding="utf-8")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))
    with pytest.raises(UserError, match=said):
        process.carry_out(tmp_path / "recipe.yaml", tmp_path / "out")
