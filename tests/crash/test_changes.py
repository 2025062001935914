"""Promise 10, and other changes between two attempts: data, settings, damage, faults; and which model is the result."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.crash.process import Process, at_step, events, faulty_losses, result


def interrupted(recipe: Path, at: int = 25) -> None:
    """A run that was stopped after step ``at``."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    ended = Process(recipe, meanwhile=lambda: at_step(at, stop)).wait()
    assert ended.code == 75, ended.said
    assert f"interrupted at step {at} of 60" in ended.said


def change(recipe: Path, **values: object) -> None:
    read = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    read["stages"][0] |= values
    recipe.write_text(yaml.safe_dump(read), encoding="utf-8")


def climbing_later() -> None:
    """In this process: after half of the steps the loss is climbed, so that the best model is not the last."""
    from trivium.train import loop

    rate, done = loop.set_rate, [0]

    def turned(optimizers: Any, factor: float) -> None:
        done[0] += 1
        rate(optimizers, factor if done[0] <= 30 else -factor)

    loop.set_rate = turned


EDITS = {
    "edit": lambda rows: [rows[0].replace("red", "blue").replace("cat", "dog"), *rows[1:]],
    "reorder": lambda rows: rows[::-1],
    "append": lambda rows: [*rows, rows[0].replace("a", "e")],
    "remove": lambda rows: rows[:-1],
}


@pytest.mark.promise(10)
@pytest.mark.parametrize("edit", EDITS)
def test_changed_data_is_refused_and_named(edit, cell, tried):
    tried(changes=1)
    recipe = cell("sft-lora")
    interrupted(recipe)
    file = recipe.parent / "chats.jsonl"
    before = file.read_bytes()
    rows = file.read_text(encoding="utf-8").splitlines(keepends=True)
    file.write_text("".join(EDITS[edit](rows)), encoding="utf-8")
    assert file.read_bytes() != before
    ended = Process(recipe).wait()
    assert ended.code == 2, ended.said
    assert f"error: {file}: changed since x was interrupted at step 25 of 60\n" in ended.said
    assert "--accept-changed-data" in ended.said
    assert "no longer promised" in ended.said
    file.write_bytes(before)
    again = Process(recipe).wait()
    assert again.code == 0, again.said
    assert "goes on after step 25 of 60" in again.said


@pytest.mark.promise(10)
def test_changed_data_can_be_accepted(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    file = recipe.parent / "chats.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": "red", "completion": "blue"}\n', encoding="utf-8")
    ended = Process(recipe, "--accept-changed-data").wait()
    assert ended.code == 0, ended.said
    assert f"goes on with changed data ({file}); no longer promised: every example once per epoch" in ended.said
    assert "goes on after step 25" in ended.said
    assert events(recipe)["accepted_changed_data"] == [str(file)]
    assert "done before" in Process(recipe).wait().said


@pytest.mark.promise(10)
def test_new_data_for_a_finished_stage_is_meant_though_its_best_checkpoint_is_kept(cell):
    recipe = cell("sft-full", eval_every=5)
    assert "its checkpoint is kept in" in Process(recipe, meanwhile=climbing_later).wait().said
    file = recipe.parent / "chats.jsonl"
    file.write_text(file.read_text(encoding="utf-8") + '{"prompt": "red", "completion": "blue"}\n', encoding="utf-8")
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "was under way" not in ended.said
    assert "step 1/60" in ended.said


def test_other_settings_begin_again_and_going_back_goes_on(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    change(recipe, learning_rate=1e-3)
    other = Process(recipe)
    other.wait_for("step 1/60")
    other.send(signal.SIGTERM)
    said = other.wait().said
    assert "x was under way at step 25 with learning_rate 0.003 (now 0.001): that training is kept in" in said
    assert "goes on" not in said
    change(recipe, learning_rate=3e-3)
    ended = Process(recipe).wait()
    assert ended.code == 0
    assert "goes on after step 25 of 60" in ended.said


def test_what_only_arranges_the_work_may_change_and_is_said(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    change(recipe, micro_batch_tokens=64, save_every=7)
    ended = Process(recipe).wait()
    assert ended.code == 0
    assert "goes on after step 25" in ended.said
    assert "not to the last bit what an unbroken run gives: micro_batch_tokens 1024 → 64" in ended.said


@pytest.mark.promise(4)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(cell):
    whole = cell("preference-full")
    assert Process(whole).wait().code == 0
    recipe = cell("preference-full")
    interrupted(recipe, 23)
    newest = next((recipe.parent / "out").glob("x.training/*/step-00000023")) / "optimizer.safetensors"
    data = bytearray(newest.read_bytes())
    data[len(data) // 2] ^= 4
    newest.write_bytes(data)
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert f"rejected: {newest} is damaged (its SHA-256 is not the one in the manifest)" in ended.said
    assert "goes on after step 20 of 60" in ended.said
    assert len(events(recipe)["rejected"]) == 1
    assert result(recipe) == result(whole)


@pytest.mark.promise(4)
def test_where_every_checkpoint_is_damaged_the_user_decides(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    for file in (recipe.parent / "out").glob("x.training/*/step-*/weights.safetensors"):
        file.write_bytes(b"")
    ended = Process(recipe).wait()
    assert ended.code == 4, ended.said
    assert re.search(
        r"error: no checkpoint is whole: \S+weights.safetensors is damaged \(0 bytes, not [\d,]+\), and \d more",
        ended.said,
    )
    assert "--fresh" in ended.said
    assert Process(recipe, "--fresh").wait().code == 0


@pytest.mark.promise(4)
def test_a_training_without_its_checkpoints_does_not_begin_again_in_silence(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    for folder in (recipe.parent / "out").glob("x.training/*/step-*"):
        shutil.rmtree(folder)
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "an attempt before came to step 25, but has no checkpoint: this one starts at step 1" in ended.said
    assert "under way as another stage" not in ended.said


def test_a_renamed_stage_tells_of_the_training_under_its_former_name(cell):
    recipe = cell("sft-lora")
    interrupted(recipe)
    change(recipe, name="renamed")
    ended = Process(recipe).wait()
    assert ended.code == 0, ended.said
    assert "this very training is under way as another stage, in " in ended.said


@pytest.mark.parametrize("name", [".lock", "x.training"])
def test_what_stands_in_the_way_is_a_clear_error(name, cell):
    recipe = cell("sft-lora")
    there = recipe.parent / "out" / name
    there.parent.mkdir()
    there.mkdir() if name == ".lock" else there.touch()
    ended = Process(recipe).wait()
    assert ended.code == 3, ended.said
    assert "Traceback" not in ended.said
    assert f"{there}" in ended.said


@pytest.mark.parametrize("loss", ["dpo", pytest.param("kto", marks=pytest.mark.slow)])
def test_the_parents_numbers_are_kept_by_what_they_are_of_and_mended(cell, monkeypatch, tmp_path, loss):
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path))
    there = "they were computed before, for the same rows and the same parent"
    whole = cell("preference-full", loss=loss)
    ended = Process(whole).wait()
    assert ended.code == 0, ended.said
    assert there not in ended.said
    (kept,) = (tmp_path / "reference").iterdir()
    for damage in (None, b"", "gone"):
        recipe = cell("preference-full", loss=loss)
        interrupted(recipe)
        if damage == "gone":
            shutil.rmtree(kept)
        elif damage is not None:
            next(kept.glob("*.safetensors")).write_bytes(damage)
        ended = Process(recipe).wait()
        assert ended.code == 0, ended.said
        assert (there in ended.said) == (damage is None)
        assert result(recipe) == result(whole)
    other = Process(cell("preference-full", loss=loss, beta=0.7)).wait()
    assert there in other.said, "another beta has the same parent"
    seen = cell("preference-full", loss=loss, seed=3)
    assert there not in Process(seen).wait().said or loss == "dpo", "kto's mismatched answers follow the order"
    assert len(list((tmp_path / "reference").iterdir())) <= 2


@pytest.mark.promise(4)
def test_a_finished_stage_that_is_damaged_is_not_built_upon(cell):
    recipe = cell("sft-full", save_every=None)
    read = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    read["stages"].append({**read["stages"][0], "name": "y", "from": "x"})
    assert Process(recipe).wait().code == 0
    recipe.write_text(yaml.safe_dump(read), encoding="utf-8")
    weights = recipe.parent / "out" / "x" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    ended = Process(recipe).wait()
    assert ended.code == 4, ended.said
    assert f"error: {weights} is damaged (its SHA-256 is not the one in the manifest)" in ended.said
    weights.write_bytes(data[:-1])
    ended = Process(recipe).wait()
    assert ended.code == 4, ended.said


# --- faults


def poison(recipe: Path, steps: tuple[int, ...], *more: object):
    """A run whose loss is not a number at these steps."""
    return Process(recipe, *more, meanwhile=lambda: faulty_losses(steps)).wait()


@pytest.mark.promise(6)
def test_a_step_that_is_not_finite_stops_and_goes_on_from_there(cell):
    whole = cell("sft-lora")
    assert Process(whole).wait().code == 0
    recipe = cell("sft-lora", save_every=20)
    ended = poison(recipe, (33,))
    assert ended.code == 5, ended.said
    said = re.search(r"error: step 33: the loss is not finite \(nan\); rows: \S+chats.jsonl:\d+, ", ended.said)
    assert said, ended.said
    again = Process(recipe).wait()
    assert again.code == 0
    assert "goes on after step 32 of 60" in again.said
    assert result(recipe) == result(whole), "neither weights, moments nor the random state have seen it"


@pytest.mark.promise(6, 19)
def test_so_many_steps_may_be_left_out_and_each_is_counted(cell, tried):
    recipe = cell("sft-lora", skip_non_finite=2)
    ended = poison(recipe, (10, 30))
    assert ended.code == 0, ended.said
    assert "step 10 left out (1 of 2): the loss is not finite (nan); rows: " in ended.said
    found = events(recipe)["skipped"]
    assert [s["step"] for s in found] == [10, 30]
    assert all(len(s["rows"]) == 4 for s in found)
    tried(steps_left_out=2)
    assert "; 2 steps left out as not finite (10, 30)" in ended.said
    assert poison(cell("sft-lora", skip_non_finite=1), (10, 30)).code == 5


@pytest.mark.promise(19)
def test_steps_left_out_before_a_kill_still_count(cell):
    recipe = cell("sft-lora", skip_non_finite=1)
    assert poison(recipe, (10, 30)).code == 5
    ended = poison(recipe, (30,))
    assert ended.code == 5, "the one that was allowed is used up"
    assert poison(recipe, (30,), "--set", "stages.x.skip_non_finite=2").code == 0
    assert [s["step"] for s in events(recipe)["skipped"]] == [10, 30]


# --- the result


def test_the_best_model_can_be_the_result_without_training_again(cell):
    recipe = cell("sft-full", eval_every=5)
    ended = Process(recipe, meanwhile=climbing_later).wait()
    assert ended.code == 0, ended.said
    told = re.search(r"the held-out loss was lowest after step (\d+): (\d\.\d+)\n", ended.said)
    assert told, ended.said
    assert 30 <= int(told[1]) < 45
    last = json.loads((recipe.parent / "out" / "x" / "trivium.json").read_text(encoding="utf-8"))
    assert last["metrics"]["after_loss"] > float(told[2])
    change(recipe, result="best")
    again = Process(recipe).wait()
    assert again.code == 0, again.said
    assert "goes on after step 60 of 60" in again.said
    best = json.loads((recipe.parent / "out" / "x" / "trivium.json").read_text(encoding="utf-8"))
    assert best["metrics"]["after_loss"] == pytest.approx(float(told[2]), abs=1e-3)
    assert not list((recipe.parent / "out").glob("x.training*"))
    declared = cell("sft-full", eval_every=5, result="best")
    assert Process(declared, meanwhile=climbing_later).wait().code == 0
    one, other = result(declared), result(recipe)
    assert one["files"] == other["files"]
    assert one["rows"] == other["rows"] or len(one["rows"]) == len(other["rows"]) + 1
