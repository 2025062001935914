"""Which stage is compared, from what, which ways, at which learning rates; what each run's own recipe says."""

from __future__ import annotations

import copy

import pytest
import yaml
from tests.comparing.conftest import MODEL, STAGES

from trivium.comparing.plan import METHODS, general_texts, make_plan, settings_said
from trivium.errors import RecipeError
from trivium.peft.settings import rate_of
from trivium.recipe import Recipe


def a_recipe(stages=STAGES, model=MODEL, **more) -> Recipe:
    return Recipe.model_validate({"name": "walk", "seed": 5, "model": model, "stages": copy.deepcopy(stages), **more})


def plan(recipe, tmp_path, **given):
    return make_plan(recipe, tmp_path, **given)


@pytest.mark.parametrize(
    ("asked", "stage", "before"),
    [(None, "chat", ["base"]), ("aligned", "aligned", ["base", "chat"])],
)
def test_the_stage_and_what_it_comes_from(tmp_path, asked, stage, before):
    found = plan(a_recipe(), tmp_path, stage=asked)
    assert (found.stage.name, [s.name for s in found.before]) == (stage, before)
    parent = found.parent()
    assert [s["name"] for s in parent["stages"]] == before
    Recipe.model_validate(parent)
    run = found.run(found.ways[0], 5)
    assert run["model"] == str(tmp_path / "parent" / before[-1])
    assert run["prompts"] == []


def test_a_stage_on_the_given_model_has_no_run_before_it(tmp_path):
    stages = [{k: v for k, v in s.items() if k != "from"} for s in STAGES[1:2]]
    found = plan(a_recipe(stages, {"path": "owner/name", "rope_theta": 1.0}), tmp_path)
    assert found.parent() is None
    assert found.run(found.ways[0], 5)["model"] == {"path": "owner/name", "rope_theta": 1.0}


@pytest.mark.parametrize(
    ("kinds", "chosen"),
    [(["pretrain", "preference", "sft"], "sft"), (["pretrain", "preference"], "preference"),
     (["pretrain", "pretrain"], "pretrain")],
)  # fmt: skip
def test_without_a_name_the_first_stage_that_fine_tunes(tmp_path, kinds, chosen):
    data = {"pretrain": "text.jsonl", "sft": "chats.jsonl", "preference": "pairs.jsonl"}
    stages = [{"name": f"s{n}", "stage": kind, "data": data[kind]} | ({"from": "s0"} if n else {})
              for n, kind in enumerate(kinds)]  # fmt: skip
    found = plan(a_recipe(stages), tmp_path)
    assert found.stage.stage == chosen
    assert found.stage.name != "s0"


def test_each_way_learns_at_the_rate_it_wants(tmp_path):
    ways = {w.name: w for w in plan(a_recipe(), tmp_path, methods=["full", "lora", "dora", "ia3", "lora@1e-3"]).ways}
    own = {"name": "lora", "r": 2}
    full = 1e-2 / rate_of(own)
    for name, way in ways.items():
        wanted = 1e-3 if name == "lora@0.001" else full * rate_of(way.method)
        assert way.learning_rate == pytest.approx(wanted)
    assert ways["lora"].method == ways["lora@0.001"].method == own  # the recipe's settings are its method's
    assert ways["dora"].method == {"name": "lora", "dora": True}
    assert settings_said("dora", ways["dora"].method) == "lora, dora true"


def test_a_rate_left_out_is_the_stages_default(tmp_path):
    stages = copy.deepcopy(STAGES)
    del stages[1]["learning_rate"]
    ways = plan(a_recipe(stages), tmp_path).ways
    assert [w.name for w in ways] == list(METHODS)
    assert ways[0].learning_rate == 2e-5
    assert ways[1].learning_rate == pytest.approx(2e-5 * rate_of({"name": "lora"}))


def test_what_a_run_would_have_taken_from_its_parent_is_written_down(tmp_path):
    found = plan(a_recipe(), tmp_path, seeds=2)
    assert found.seeds == [5, 6]
    stage = found.run(found.ways[1], 6)["stages"][0]
    assert stage["dtype"] == "float32"
    assert "from" not in stage
    text = yaml.safe_dump(found.run(found.ways[1], 6))
    assert Recipe.model_validate(yaml.safe_load(text)).seed == 6


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"methods": ["lroa"]}, "did you mean 'lora'"),
        ({"methods": ["lora", "lora"]}, "lora is named twice"),
        ({"methods": ["lora@fast"]}, "'fast' is no learning rate"),
        ({"methods": ["lora@-1"]}, "'-1' is no learning rate"),
        ({"methods": [""]}, "no method ''"),
        ({"stage": "chatt"}, "did you mean 'chat'"),
        ({"stage": "base"}, "starts from random weights"),
        ({"seeds": 0}, "no number of seeds"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, given, said):
    with pytest.raises(RecipeError, match=said):
        plan(a_recipe(), tmp_path, **given)


def test_a_recipe_that_only_begins_has_nothing_to_compare(tmp_path):
    with pytest.raises(RecipeError, match="no stage that fine-tunes"):
        plan(a_recipe(STAGES[:1]), tmp_path)


def test_general_text_is_what_the_first_pretraining_holds_out():
    stages = [{k: v for k, v in s.items() if k != "from"} for s in STAGES[1:2]]
    assert general_texts(a_recipe(stages, "owner/name")) == ()
