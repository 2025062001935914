"""Promises 2, 3 and 5: a save is whole or absent, a full disk harms nothing, the last good checkpoint is kept.

At every single operation on the disk of a run the process dies, the disk is full, or the power is cut; then the same
command runs again. `make test` takes every few of them, `make test-all` every one.
"""

from __future__ import annotations

import contextlib
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from tests.crash.disk import Dies, Full, PowerCut, operations, put
from tests.crash.process import Process, left_over, result

from trivium.train.checkpoint import steps_in

SHORT = {"max_steps": 6, "save_every": 2, "keep_checkpoints": 1}
EVERY = 29  # so manieth operation, where there is little time
DISKS = {"dies": Dies, "full": Full, "power": PowerCut}
ABOUT = {"dies": (2, 5), "full": (3, 5), "power": (2, 5)}  # promises


def checkpoints(recipe: Path) -> list[int]:
    return [s for folder in (recipe.parent / "out").glob("x.training/*") for s in steps_in(folder)]


@pytest.mark.parametrize("disk", [pytest.param(d, marks=pytest.mark.promise(*ABOUT[d])) for d in DISKS])
@pytest.mark.parametrize(
    ("name", "every"),
    [("sft-lora", EVERY), *(pytest.param(n, 1, marks=pytest.mark.slow) for n in ("pretrain-full", "preference-full"))],
)
def test_every_operation_of_a_run(disk, name, every, cell, tried):
    assert Process(cell(name, **SHORT)).wait().code == 0
    whole = cell(name, **SHORT)
    total = operations(whole)
    expected = result(whole)
    assert total > 60
    first = 1 + random.Random(disk).randrange(every)
    for k in range(first, total + 1, every):
        recipe = cell(name, **SHORT)
        ended = Process(recipe, meanwhile=lambda k=k: put(DISKS[disk](k))).wait()
        if disk == "full":
            assert ended.code == 3, f"operation {k}: {ended.said}"
            assert re.search(r"error: \S+: the disk is full \(\S+ \S?B needed, \S+ \S?B free\)", ended.said), ended.said
            assert "Traceback" not in ended.said
            assert left_over(recipe.parent / "out") == [], f"operation {k}"
        else:
            assert ended.killed, f"operation {k}: {ended.said}"
        had = checkpoints(recipe)
        again = Process(recipe).wait()
        assert again.code == 0, f"operation {k}: {again.said}"
        assert not had or "goes on after step" in again.said or "done before" in again.said, (
            f"operation {k}: {again.said}"
        )
        assert result(recipe) == expected, f"operation {k}"
        assert left_over(recipe.parent / "out") == []
        shutil.rmtree(recipe.parent)
        tried(operations=1)


@pytest.fixture
def small_disk(tmp_path: Path):
    """``small_disk(kilobytes)``: a real file system of this size."""
    mounted: list[Path] = []

    def mount(kilobytes: int) -> Path:
        folder = tmp_path / f"disk{len(mounted)}"
        folder.mkdir()
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", folder], capture_output=True)
        if done.returncode:
            pytest.skip("a file system of limited size cannot be mounted here")
        mounted.append(folder)
        return folder

    yield mount
    for folder in mounted:
        subprocess.run(["umount", "-l", folder], check=True)


@pytest.mark.promise(3)
def test_too_little_room_is_said_before_the_first_step(cell, small_disk):
    recipe = cell("sft-full", save_every=2)
    there = small_disk(3000)
    moved = Path(shutil.copy(recipe, there / "recipe.yaml"))
    for file in recipe.parent.glob("*.jsonl"):
        shutil.copy(file, there)
    ended = Process(moved).wait()
    assert ended.code == 3
    assert re.search(r"not enough room for checkpoints and the result \(\d\S* MB needed, \d\S* MB free\)", ended.said)
    assert "keep_checkpoints: 1" in ended.said
    assert "step 1/" not in ended.said
    assert left_over(there) == []


@pytest.mark.promise(3)
@pytest.mark.parametrize("name", ["sft-full", "preference-full"])
def test_a_real_disk_that_fills_up_meanwhile(name, cell, small_disk):
    whole = cell(name)
    assert Process(whole).wait().code == 0
    there = small_disk(16_000)
    recipe = Path(shutil.copy(cell(name, save_every=3), there / "recipe.yaml"))
    for file in whole.parent.glob("*.jsonl"):
        shutil.copy(file, there)
    filler = there / "filler"

    def fill() -> None:
        from trivium.train import loop

        rate, steps = loop.set_rate, [0]

        def filling(*arguments: object) -> None:
            steps[0] += 1
            if steps[0] == 20:
                with filler.open("wb", buffering=0) as file, contextlib.suppress(OSError):
                    while True:
                        file.write(bytes(512))
            rate(*arguments)

        loop.set_rate = filling

    ended = Process(recipe, meanwhile=fill, log=whole.parent / "said.txt").wait()  # not on the disk that fills up
    assert ended.code == 3, ended.said
    assert re.search(r"the disk is full \(\S+ \S?B needed, \S+ \S?B free\)", ended.said), ended.said
    assert "Traceback" not in ended.said
    assert left_over(there) == []
    filler.unlink()
    again = Process(recipe).wait()
    assert again.code == 0, again.said
    assert "goes on after step 18 of 60" in again.said
    assert result(recipe) == result(whole)
