"""Checkpoints: found whole or named as damaged, kept or let go, never half there."""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from trivium import files
from trivium.errors import CheckpointError, DiskError
from trivium.train.checkpoint import Checkpoints, peek, steps_in

ABOUT = {"training": "this one"}


def tensors(step: int) -> dict[str, dict[str, torch.Tensor]]:
    made = torch.Generator().manual_seed(step)
    return {
        "weights": {"a": torch.randn(7, 3, generator=made), "b": torch.randn(5, generator=made)},
        "optimizer": {"0.a.exp_avg": torch.randn(7, 3, generator=made), "0.a.step": torch.tensor(float(step))},
        "rng": {"cpu": torch.arange(16, dtype=torch.uint8)},
    }


def save(kept: Checkpoints, step: int, **more: Any) -> None:
    kept.save(step, tensors(step), {"step": step}, {"metrics.jsonl": f'{{"step": {step}}}\n'}, **more)


def filled(folder: Path, *steps: int, last: int = 9, **more: Any) -> Checkpoints:
    kept = Checkpoints(folder, ABOUT, last)
    for step in steps:
        save(kept, step, **more)
    kept.wait()
    return kept


def names(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


@pytest.mark.parametrize("beside", [False, True])
def test_what_was_saved_comes_back(beside, tmp_path):
    filled(tmp_path, 3, 12, beside=beside)
    found = Checkpoints(tmp_path, ABOUT).newest()
    assert found is not None
    assert (found.step, found.state) == (12, {"step": 12})
    assert (found.folder / "metrics.jsonl").read_text(encoding="utf-8") == '{"step": 12}\n'
    expected = tensors(12)
    assert found.tensors().keys() == expected.keys()
    for name, group in found.tensors().items():
        assert all(torch.equal(t, expected[name][k]) for k, t in group.items())
    assert peek(tmp_path) == {"step": 12}


def test_where_there_is_nothing(tmp_path):
    assert Checkpoints(tmp_path / "not there", ABOUT).newest() is None
    assert Checkpoints(tmp_path, ABOUT).newest() is None
    assert peek(tmp_path) is None


@pytest.mark.promise(5)
def test_the_last_ones_and_the_best_are_kept(tmp_path, tried):
    kept = Checkpoints(tmp_path, ABOUT, last=2)
    for step in range(1, 101):
        save(kept, step, best=step in (3, 20))
        assert step in steps_in(tmp_path)
        tried(saves=1)
    assert steps_in(tmp_path) == [20, 99, 100]
    assert names(tmp_path) == ["step-00000020", "step-00000099", "step-00000100"]


def test_numbers_beyond_eight_digits_are_in_order(tmp_path):
    filled(tmp_path, 99_999_999, 100_000_000)
    found = Checkpoints(tmp_path, ABOUT).newest()
    assert found is not None
    assert found.step == 100_000_000


def damages(folder: Path, rng: random.Random) -> Path:
    """Damage one file of a checkpoint in one of the ways there are; returns it."""
    file = rng.choice(sorted(folder.iterdir()))
    data = file.read_bytes()
    kind = rng.choice(["flip", "cut", "empty", "delete", "swap", "zeros", "longer", "directory"])
    if kind == "flip":
        at = rng.randrange(len(data))
        file.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
    elif kind == "cut":
        file.write_bytes(data[: rng.randrange(len(data))])
    elif kind == "empty":
        file.write_bytes(b"")
    elif kind == "delete":
        file.unlink()
    elif kind == "swap":  # with the same file of the checkpoint before: it is whole, but another
        other = folder.with_name("step-00000010") / file.name
        file.write_bytes(other.read_bytes())
        assert file.read_bytes() != data or file.name == "rng.safetensors"
        if file.read_bytes() == data:
            file.write_bytes(data + b"\0")
    elif kind == "zeros":
        file.write_bytes(bytes(len(data)))
    elif kind == "longer":
        file.write_bytes(data + b"\n")
    else:
        file.unlink()
        file.mkdir()
    return file


@pytest.mark.promise(4)
@pytest.mark.parametrize("part", range(4))
def test_every_damage_is_found_and_named(part, tmp_path, tried):
    """A thousand damages: the file is named, and the checkpoint before is taken."""
    filled(tmp_path / "whole", 10, 20)
    rng = random.Random(part)
    for number in range(250):
        copy = Path(shutil.copytree(tmp_path / "whole", tmp_path / f"copy{number}"))
        file = damages(copy / "step-00000020", rng)
        kept = Checkpoints(copy, ABOUT)
        found = kept.newest()
        assert found is not None
        assert found.step == 10, f"{file} is damaged"
        assert len(kept.rejected) == 1
        assert kept.rejected[0].startswith(str(file)), f"{kept.rejected[0]} names another file than {file}"
        shutil.rmtree(copy)
        tried(damages=1)


@pytest.mark.promise(4)
def test_whole_checkpoints_in_the_wrong_place_are_no_good(tmp_path):
    filled(tmp_path / "a", 10, 20)
    (tmp_path / "a" / "step-00000020").rename(tmp_path / "a" / "step-00000030")
    kept = Checkpoints(tmp_path / "a", ABOUT)
    found = kept.newest()
    assert found is not None
    assert found.step == 10
    assert "belongs to another folder (step 20, not 30)" in kept.rejected[0]
    other = Checkpoints(tmp_path / "b", {"training": "another one"})
    save(other, 40)
    shutil.copytree(tmp_path / "b" / "step-00000040", tmp_path / "a" / "step-00000040")
    found = Checkpoints(tmp_path / "a", ABOUT).newest()
    assert found is not None
    assert found.step == 10


@pytest.mark.promise(4)
def test_a_manifest_leads_to_no_file_outside(tmp_path):
    filled(tmp_path / "a", 10)
    folder = tmp_path / "a" / "step-00000010"
    secret = tmp_path / "secret"
    shutil.move(folder / "state.json", secret)
    (folder / "state.json").symlink_to(secret)
    kept = Checkpoints(tmp_path / "a", ABOUT)
    with pytest.raises(CheckpointError, match=r"state.json is missing"):
        kept.newest()


@pytest.mark.promise(4)
def test_where_all_are_damaged_nothing_begins_unasked(tmp_path):
    filled(tmp_path, 10, 20)
    for step in ("step-00000010", "step-00000020"):
        (tmp_path / step / "weights.safetensors").unlink()
    with pytest.raises(CheckpointError) as caught:
        Checkpoints(tmp_path, ABOUT).newest()
    assert "step-00000020/weights.safetensors is missing, and 1 more" in caught.value.what
    assert "--fresh" in caught.value.remedy
    assert caught.value.exit_code == 4
    assert steps_in(tmp_path) == [10, 20], "somebody may still mend them"


@pytest.mark.promise(5)
def test_damaged_ones_do_not_push_out_the_last_good_one(tmp_path):
    filled(tmp_path, 10, 20, 30)
    for step in ("step-00000020", "step-00000030"):
        (tmp_path / step / "state.json").write_text("{}", encoding="utf-8")
    kept = Checkpoints(tmp_path, ABOUT, last=2)
    assert kept.newest().step == 10  # type: ignore[union-attr]
    save(kept, 15)
    assert steps_in(tmp_path) == [10, 15, 20, 30]
    save(kept, 20)
    assert steps_in(tmp_path) == [15, 20, 30]
    save(kept, 35)
    assert steps_in(tmp_path) == [20, 35]


def save_and_wait(kept: Checkpoints, step: int, beside: bool) -> None:
    save(kept, step, beside=beside)
    kept.wait()


def operations(act: Any) -> int:
    count = [0]

    def counting(name: str, path: Path, act: Any) -> Any:
        count[0] += 1
        return act()

    before, files.operation = files.operation, counting
    try:
        act()
    finally:
        files.operation = before
    return count[0]


@pytest.mark.promise(3, 5)
@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS])
def test_a_save_that_fails_at_any_operation_leaves_the_others(beside, code, tmp_path, monkeypatch, tried):
    filled(tmp_path / "first", 10, 20, last=1)
    total = operations(
        lambda: save(Checkpoints(Path(shutil.copytree(tmp_path / "first", tmp_path / "n")), ABOUT, 1), 30)
    )
    assert total > 12
    for k in range(1, total + 1):
        copy = Path(shutil.copytree(tmp_path / "first", tmp_path / f"copy{k}"))
        kept, done = Checkpoints(copy, ABOUT, last=1), [0]

        def failing(name: str, path: Path, act: Any, done=done, k=k) -> Any:
            done[0] += 1
            if done[0] >= k:
                raise OSError(code, os.strerror(code))
            return act()

        with monkeypatch.context() as broken:
            broken.setattr(files, "operation", failing)
            with pytest.raises(DiskError):
                save_and_wait(kept, 30, beside)
        assert not any(n.endswith(".partial") for n in names(copy))
        found = Checkpoints(copy, ABOUT).newest()
        assert found is not None
        assert found.step in (20, 30), f"operation {k}"
        save(kept, 40)
        assert Checkpoints(copy, ABOUT).newest().step == 40  # type: ignore[union-attr]
        tried(operations=1)


@pytest.mark.promise(5)
def test_a_write_that_was_lost_is_noticed_before_anything_is_deleted(tmp_path, monkeypatch, tried):
    """The disk says yes and keeps nothing: 100 saves, each with another lost write."""
    kept = filled(tmp_path, 1, last=1)
    rng, seal = random.Random(0), files.seal
    for step in range(2, 102):
        lost = rng.randrange(3)

        def afterwards(folder: Path, about: Any, lost=lost) -> None:
            seal(folder, about)
            victim = sorted(folder.glob("*.safetensors"))[lost]
            victim.write_bytes(bytes(victim.stat().st_size))

        with monkeypatch.context() as broken:
            broken.setattr(files, "seal", afterwards)
            with pytest.raises(DiskError, match="just after it was written"):
                save(kept, step)
        found = Checkpoints(tmp_path, ABOUT).newest()
        assert found is not None
        assert found.step == 1, "the last good checkpoint is there"
        tried(lost_writes=1)


class Asked(BaseException):
    """What the handler of a signal raises."""


@pytest.mark.promise(11)
def test_a_signal_while_it_is_waited_for_leaves_no_save_half_done(tmp_path, monkeypatch):
    """Whoever waits again waits until it is written, also before Python 3.13, whose `join` would come back at once."""

    def slow(name: str, path: Path, act: Any) -> Any:
        time.sleep(0.05)
        return act()

    def asked(number: int, frame: Any) -> None:
        raise Asked

    kept, before = Checkpoints(tmp_path, ABOUT), signal.signal(signal.SIGALRM, asked)
    monkeypatch.setattr(files, "operation", slow)
    try:
        save(kept, 10, beside=True)
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(Asked):
            kept.wait()
        kept.wait()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert not kept.writing
    assert names(tmp_path) == ["step-00000010"]
