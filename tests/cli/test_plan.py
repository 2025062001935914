"""``trivium plan``: what it says is what a run does, and it does nothing itself."""

from __future__ import annotations

import json
import shutil

import pytest
from tests.cli.conftest import LORA, SHORT

from trivium import stage_memory
from trivium.planning.kept import PLAN, TIMES


@pytest.fixture(scope="module")
def planned(walk, tmp_path_factory):
    """The plan of the walk, made where nothing of it is done."""
    from trivium.planning.plan import plan_recipe
    from trivium.recipe_file import read_recipe

    out = tmp_path_factory.mktemp("plan") / "out"
    return out, plan_recipe(read_recipe(walk.recipe), out)


def test_it_says_of_every_stage_what_the_run_did(planned, walk):
    _, plan = planned
    assert [s["name"] for s in plan["stages"]] == [s["name"] for s in walk.summary["stages"]]
    for stage in plan["stages"]:
        record = walk.record(stage["name"])
        assert stage["identity"] == record["identity"]
        assert stage["method"] == record["method"]
        for key in ("trained_parameters", "total_parameters", "steps", "epochs"):
            assert stage[key] == record[key], (stage["name"], key)
        assert {k: stage["rows"][k] for k in ("read", "used", "held_out")} == {
            k: record["rows"][k] for k in ("read", "used", "held_out")
        }
        assert stage["disk"]["result"] == pytest.approx(record["bytes_on_disk"], rel=0.15, abs=20_000)
        assert stage["seconds"]["training"] > 0
        assert stage["seconds"]["evaluation"] > 0


def test_it_leaves_nothing_but_the_plan(planned):
    out, plan = planned
    assert [p.name for p in out.iterdir()] == [PLAN]
    assert json.loads((out / PLAN).read_text(encoding="utf-8")) == plan


def test_as_a_command_and_beside_what_came(data, tmp_path, trivium, write_recipe):
    stages = [{"name": "base", "stage": "pretrain", "data": str(data / "text.jsonl"), **SHORT}]
    stages += [
        {"name": "chat", "stage": "sft", "from": "base", "data": str(data / "chats.jsonl"), "method": LORA, **SHORT}
    ]
    recipe, out = write_recipe(tmp_path, stages, prompts=[]), tmp_path / "out"
    done = trivium("plan", recipe, "--out", out)
    assert done.code == 0, done.err
    for word in ("parameters", "work", "memory", "disk", "time", "weights", "moments", "log-probabilities", "in all: "):
        assert word in done.out
    assert "step 1/" not in done.err, "steps that are tried are not told as a training"
    ran = trivium("run", recipe, "--out", out)
    assert ran.code == 0, ran.err
    assert ran.out.count(" planned ") >= 2
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    plan = json.loads((out / PLAN).read_text(encoding="utf-8"))
    for stage, told in zip(summary["stages"], plan["stages"], strict=True):
        assert stage["planned"]["peak"] == told["memory"]["peak"]
        # the tests' own memory is in both, which was as large a moment ago
        assert stage["planned"]["peak"] == pytest.approx(stage["peak_memory_bytes"], rel=0.3)
        assert stage["planned"]["seconds"] == sum(told["seconds"][k] for k in TIMES)
    assert "planned " in (out / "report.html").read_text(encoding="utf-8")
    again = trivium("plan", recipe, "--out", out)
    assert "chat: done before, and not run again" in again.out
    changed = trivium("run", recipe, "--out", out, "--set", "stages.chat.learning_rate=0.001")
    assert changed.code == 0
    assert "planned" not in changed.out, "the plan was of other stages"


def test_what_does_not_fit_is_said_with_what_would_and_not_begun(data, tmp_path, trivium, write_recipe, monkeypatch):
    stages = [{"name": "base", "stage": "pretrain", "data": str(data / "text.jsonl"), **SHORT}]
    recipe, out = write_recipe(tmp_path, stages, prompts=[]), tmp_path / "out"
    monkeypatch.setattr(stage_memory, "free_memory", lambda device: 0)
    planned = trivium("plan", recipe, "--out", out)
    assert planned.code == 6
    assert "DOES NOT FIT INTO" in planned.out
    assert "would fit" in planned.out
    shutil.rmtree(out)
    ran = trivium("run", recipe, "--out", out)
    assert ran.code == 6
    assert "stages.base: it would take " in ran.error
    assert len(ran.error.strip().splitlines()) <= 3
    assert "step 1/" not in ran.err
    assert not (out / "base").exists()


def test_a_damaged_plan_is_not_believed(tmp_path):
    from trivium.planning.kept import planned_of

    for text in (
        "",
        "{",
        "[]",
        '{"stages": 3}',
        '{"stages": [{"identity": "x"}]}',
        '{"stages": [{"identity": "x", "seconds": 1}]}',
    ):
        (tmp_path / PLAN).write_text(text, encoding="utf-8")
        assert planned_of(tmp_path, "x") == {}


@pytest.mark.parametrize("method", ["full", LORA])
def test_a_device_that_is_not_here(data, tmp_path, trivium, write_recipe, method):
    stages = [{"name": "base", "stage": "pretrain", "data": str(data / "text.jsonl"), **SHORT}]
    stages += [
        {"name": "chat", "stage": "sft", "from": "base", "data": str(data / "chats.jsonl"), "method": method, **SHORT}
    ]
    recipe = write_recipe(tmp_path, stages, prompts=[])
    done = trivium("plan", recipe, "--out", tmp_path / "out", "--memory", "2GB", "--tflops", "10")
    assert done.code == 0, done.err
    assert "of 2.0 GB on the device asked about" in done.out
    assert "which is assumed" in done.out
    assert not (tmp_path / "out").exists()
    small = trivium("plan", recipe, "--memory", "500MB")
    assert small.code == 6
    assert "DOES NOT FIT INTO 500 MB" in small.out


@pytest.mark.parametrize(("more", "said"), [("--memory 24", "24GB or 900MB"), ("--tflops 3", "--memory 24GB")])
def test_what_was_asked_wrongly(data, tmp_path, trivium, write_recipe, more, said):
    stages = [{"name": "base", "stage": "pretrain", "data": str(data / "text.jsonl"), **SHORT}]
    done = trivium("plan", write_recipe(tmp_path, stages), *more.split())
    assert done.code == 2
    assert said in done.error
