"""A comparison end to end: its numbers, its page, what is not run again, what happens to a way that fails."""

from __future__ import annotations

import copy
import json
import re

import pytest
import yaml
from tests.comparing.conftest import STAGES

import trivium
from trivium import checks
from trivium.cli.main import app
from trivium.comparing import comparison
from trivium.comparing.collect import TASKS, same_rows
from trivium.comparing.comparison import compare
from trivium.comparing.page import page
from trivium.comparing.plan import make_plan
from trivium.comparing.show import costs, gains, lines, table
from trivium.errors import ModelError, NonFiniteError, RecipeError
from trivium.recipe_file import read_recipe


def test_every_way_is_trained_on_the_same_rows(done):
    found, _, said = done
    assert found["same_rows"].startswith("the same ")
    assert "for each of 2 seeds" in found["same_rows"]
    runs = {(way["name"], run["seed"]): run for way in found["ways"] for run in way["runs"]}
    assert list(runs) == [(name, seed) for name in ("full", "lora", "houlsby") for seed in (5, 6)]
    for seed in (5, 6):
        assert len({runs[name, seed]["order"] for name in ("full", "lora", "houlsby")}) == 1
    assert len({runs["lora", seed]["identity"] for seed in (5, 6)}) == 2
    assert re.search(r"lora +r 2 +0.01\n", said)


def test_the_numbers_are_those_of_the_runs(done):
    found, out, _ = done
    assert json.loads((out / "compare.json").read_text(encoding="utf-8")) == json.loads(json.dumps(found))
    for way in found["ways"]:
        losses = []
        for run in way["runs"]:
            record = json.loads((out / run["folder"] / "chat" / "trivium.json").read_text(encoding="utf-8"))
            assert run["loss"] == record["metrics"]["after_loss"]
            assert record["settings"]["learning_rate"] == way["learning_rate"]
            assert run["bits_per_byte_before"] is not None
            losses.append(run["loss"])
        assert way["mean"]["loss"] == pytest.approx(sum(losses) / 2)
        assert way["spread"]["loss"] == pytest.approx(abs(losses[0] - losses[1]) / 2**0.5)
    full, lora, houlsby = found["ways"]
    assert full["mean"]["bytes_of_tasks"] == TASKS * full["mean"]["bytes_on_disk"]
    assert lora["mean"]["bytes_of_tasks"] == full["mean"]["bytes_on_disk"] + TASKS * lora["mean"]["bytes_on_disk"]
    assert "merge_difference" not in full["mean"]
    assert houlsby["mean"]["trained_parameters"] > lora["mean"]["trained_parameters"]
    assert found["quality"]["key"] == "loss"


def test_what_is_told_fits_a_terminal(done):
    found, _, _ = done
    told = "\n".join(lines(found))
    assert max(map(len, told.splitlines())) <= 100
    assert all(re.search(rf"(?m)^{name} ", told) for name in ("full", "lora", "houlsby"))
    assert "±" in told
    assert "●" in told


def test_the_page_needs_nothing_else_and_believes_nothing(done):
    found, out, _ = done
    text = (out / "compare.html").read_text(encoding="utf-8")
    assert "<script" not in text
    assert not re.search(r'(?:href|src)="(?!data:)', text)
    assert text.count("<svg") == 3
    evil = copy.deepcopy(found)
    evil["name"] = "<script>alert(1)</script>"
    evil["ways"][1] |= {"runs": [], "mean": {}, "error": {"what": "<script>", "remedy": "&", "exit_code": 2}}
    assert "<script" not in page(evil, out)


def test_a_second_comparison_trains_nothing_and_another_way_is_added(done, here, tmp_path):
    import shutil

    _, out, _ = done
    shutil.copytree(out.parent, tmp_path / "copy")
    before = {p: p.stat().st_mtime_ns for p in (tmp_path / "copy").rglob("trivium.json")}
    again = compare(read_recipe(tmp_path / "copy" / "recipe.yaml"), tmp_path / "copy" / "out", ["full", "lora", "ia3"])
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert [way["name"] for way in again["ways"]] == ["full", "lora", "ia3"]
    assert again["ways"][0]["mean"]["loss"] == done[0]["ways"][0]["runs"][0]["loss"]
    assert (tmp_path / "copy" / "out" / "ia3" / "seed5" / "chat" / "trivium.json").is_file()


def test_a_runs_own_recipe_repeats_it(done, tmp_path):
    found, out, _ = done
    alone = trivium.run(out / "lora" / "seed5.yaml", tmp_path / "alone")
    assert alone["stages"][0]["metrics"]["after_loss"] == found["ways"][1]["runs"][0]["loss"]


def test_a_way_that_fails_is_told_and_the_others_go_on(here, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    found = compare(read_recipe(recipe()), tmp_path / "out", ["qlora", "full"], seeds=2)
    qlora, full = found["ways"]
    assert qlora["runs"] == []
    assert "a quantised base needs bitsandbytes" in qlora["error"]["what"]
    assert len(full["runs"]) == 2
    assert sum(folder.parent.name == "qlora" for folder in here) == 1  # another seed would change nothing
    assert "needs bitsandbytes" in table(found, gains(found))
    assert "needs bitsandbytes" in table(found, costs(found))
    assert "needs bitsandbytes" in (tmp_path / "out" / "compare.html").read_text(encoding="utf-8")


def test_where_all_fail_the_first_error_ends_it(here, recipe, tmp_path, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(ModelError, match="needs bitsandbytes"):
        compare(read_recipe(recipe()), tmp_path / "out", ["qlora"])


def test_an_adapter_is_trained_with_adamw_where_the_recipe_has_muon(tmp_path, recipe):
    read = read_recipe(recipe(stages=[STAGES[0], {**STAGES[1], "optimizer": "muon", "method": "full"}]))
    plan = make_plan(read, tmp_path, ["full", "lora"])
    assert [plan.run(way, 5)["stages"][0]["optimizer"] for way in plan.ways] == ["muon", "adamw"]


def test_a_mistake_in_what_comes_before_ends_it_at_once(here, recipe, tmp_path):
    path = recipe(stages=[{**STAGES[0], "max_length": 100_000}, STAGES[1]])
    with pytest.raises(RecipeError, match="more than the model's context"):
        compare(read_recipe(path), tmp_path / "out", ["lora"])
    assert len(here) == 1


def test_a_seed_that_fails_is_left_out_of_the_mean(done, monkeypatch, recipe, tmp_path):
    found = done[0]

    def one(plan, way, seed, requests):
        if seed == 6 and way.name == "lora":
            raise NonFiniteError("step 2: the loss is nan", "lower the learning rate")
        return found["ways"][0]["runs"][0]

    monkeypatch.setattr(comparison, "_one", one)
    monkeypatch.setattr(comparison, "_parent", lambda plan: None)
    monkeypatch.setattr(comparison, "write_page", lambda found, out: None)
    told = compare(read_recipe(recipe()), tmp_path / "out", ["full", "lora"], seeds=2)
    assert [len(way["runs"]) for way in told["ways"]] == [2, 1]
    assert "lora: 1 of 2 seeds; step 2: the loss is nan; lower the learning rate" in lines(told)


def test_preference_is_ranked_by_accuracy_and_forgetting_by_the_recipes_text(here, recipe, tmp_path):
    path = recipe(eval_text="text.jsonl")
    found = compare(read_recipe(path), tmp_path / "out", ["full", "lora"], stage="aligned")
    assert found["quality"]["key"] == "accuracy"
    assert not (tmp_path / "out" / "general.jsonl").exists()
    assert "accuracy" in table(found, gains(found))
    assert all("bits_per_byte" in way["mean"] for way in found["ways"])


def test_without_any_text_forgetting_is_said_to_be_missing(here, done, recipe, tmp_path):
    stage = {k: v for k, v in STAGES[1].items() if k != "from"}
    path = recipe(stages=[stage], model=str(done[1] / "parent" / "base"))
    found = compare(read_recipe(path), tmp_path / "out", ["lora"])
    assert not (tmp_path / "out" / "parent").exists()
    assert any("forgetting was not measured" in line for line in lines(found))
    assert "bits/byte" not in table(found, gains(found))


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": 7}, "b had 7 rows, a 8 (seed 0)"),
        ({"trained_tokens": 90}, "b had 90 trained tokens, a 100 (seed 0)"),
        ({"order": "y"}, "b had the rows in another order than a (seed 0)"),
    ],
)
def test_a_difference_of_rows_is_named(changed, said):
    run = {"seed": 0, "rows": 8, "steps": 2, "trained_tokens": 100, "order": "x"}
    assert same_rows([{"name": "a", "runs": [run]}, {"name": "b", "runs": [run | changed]}]) == f"not the same: {said}"


def test_the_start_is_measured_once(done):
    _, out, _ = done
    seconds = [
        json.loads(file.read_text(encoding="utf-8"))["models"]["model"]["seconds"]
        for file in sorted(out.glob("*/seed*/measures.json"))
    ]
    assert len(seconds) == 6
    assert len(set(seconds)) == 1


def test_the_command_and_the_api(here, recipe, tmp_path, monkeypatch, capsys):
    path = recipe()
    monkeypatch.chdir(tmp_path)
    arguments = ["compare", str(path), "--methods", "lora,ia3", "--set", "stages.chat.max_steps=1", "--stage", "chat"]
    app(arguments, standalone_mode=False)
    told = capsys.readouterr().out
    assert told.endswith("runs/walk-compare/compare.json\nruns/walk-compare/compare.html\n")
    assert "ia3" in told
    found = trivium.compare(path, ["lora"], out="runs/walk-compare", overrides=["stages.chat.max_steps=1"])
    assert [way["name"] for way in found["ways"]] == ["lora"]
    assert not [f for f in here[3:] if f.name == "seed6"]
    inside = yaml.safe_load((tmp_path / "runs/walk-compare/lora/seed5.yaml").read_text(encoding="utf-8"))
    assert inside["stages"][0]["max_steps"] == 1
