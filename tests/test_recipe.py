"""What a recipe says, as it is read: paths, overrides, numbers, the shipped examples' fields."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from trivium.errors import RecipeError
from trivium.recipe import Recipe, Stage
from trivium.recipe_file import parse_recipe, read_recipe

TEXT = """\
name: one
model: {architecture: llama, hidden_size: 32, rms_norm_eps: 1e-6}
stages:
  - {name: base, stage: pretrain, data: text.jsonl, learning_rate: 1e-3}
  - {name: chat, stage: sft, from: base, data: [a.jsonl, ~/b.jsonl, hf://o/n/x.parquet], method: lora}
"""


def read(text: str = TEXT, *overrides: str, folder: Path = Path("/recipes")) -> Recipe:
    return parse_recipe(text, folder / "r.yaml", list(overrides))


def test_paths_are_relative_to_the_recipe():
    base, chat = read().stages
    assert base.paths == "/recipes/text.jsonl"
    assert chat.paths == ["/recipes/a.jsonl", str(Path("~/b.jsonl").expanduser()), "hf://o/n/x.parquet"]


@pytest.mark.parametrize(
    ("model", "place"),
    [
        ("./here", "/recipes/here"),
        ("model.gguf", "/recipes/model.gguf"),
        ("/abs/olute", "/abs/olute"),
        ("folder", "/recipes/folder"),
        ("owner/name", "owner/name"),
    ],
)
def test_a_model_is_a_path_or_a_hub_id(model, place):
    for override in (f"model={model}", f"model={{path: {model}}}"):
        found = read(TEXT, override).model
        assert (found if isinstance(found, str) else found["path"]) == place


def test_a_folder_beside_the_recipe_wins_over_the_hub(tmp_path):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    assert read(TEXT, "model=owner/name", folder=tmp_path).model == str(tmp_path / "owner" / "name")


def test_numbers_as_people_write_them():
    recipe = read(TEXT, "stages.chat.learning_rate=2e-4", "stages.chat.method={name: lora, dropout: 1E-1, alpha: 5e+0}")
    assert isinstance(recipe.model, dict)
    assert recipe.model["rms_norm_eps"] == 1e-6
    assert recipe.stages[0].learning_rate == 1e-3
    assert recipe.stages[1].learning_rate == 2e-4
    assert recipe.stages[1].method == {"name": "lora", "dropout": 0.1, "alpha": 5.0}


@pytest.mark.parametrize("name", ["1e4x", "e4", "3-a", "1e"])
def test_names_that_look_like_numbers_stay_names(name):
    assert read(TEXT, f"name={name}").name == name


def test_a_method_is_a_name_or_a_mapping():
    assert read().stages[1].method == {"name": "lora"}
    assert read(TEXT, "stages.chat.method.r=4").stages[1].method == {"name": "lora", "r": 4}
    assert read(TEXT, "stages.chat.method=full").stages[1].method == {"name": "full"}


def test_an_override_can_add_take_away_and_reach_the_model():
    recipe = read(TEXT, "seed=7", "stages.chat.method=null", "model.num_hidden_layers=3")
    assert recipe.seed == 7
    assert recipe.stages[1].method is None
    assert isinstance(recipe.model, dict)
    assert recipe.model["num_hidden_layers"] == 3


def test_a_path_in_an_override_may_be_relative_to_the_current_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.jsonl").touch()
    recipe = read(TEXT, "stages.base.data=mine.jsonl", "stages.chat.data=[min*.jsonl, other.jsonl]")
    assert recipe.stages[0].paths == str(tmp_path / "mine.jsonl")
    assert recipe.stages[1].paths == [str(tmp_path / "min*.jsonl"), "/recipes/other.jsonl"]
    (held_out,) = read(TEXT, "stages.base.eval_data=mine.jsonl").stages[0].eval_data
    assert held_out.path == str(tmp_path / "mine.jsonl")
    assert read(TEXT, "stages.base.eval_data=0.1").stages[0].eval_data == 0.1


def test_an_alias_is_no_repetition():
    text = "name: x\nmodel: m/n\ncommon: &c {stage: sft, data: d}\nstages:\n  - {<<: *c, name: a}\n"
    with pytest.raises(RecipeError, match=r"r.yaml:3: unknown key common"):
        read(text)
    text = "name: x\nmodel: m/n\nstages:\n  - &a {name: a, stage: sft, data: d}\n  - {<<: *a, name: b}\n"
    assert [s.name for s in read(text).stages] == ["a", "b"]


def test_every_field_has_one_sentence():
    for model in (Recipe, Stage):
        for name, field in model.model_fields.items():
            assert field.description, name
            assert field.description.endswith("."), name


def test_an_override_beside_a_stage_whose_name_is_no_name():
    text = TEXT.replace("name: base,", "name: {a: 1},")
    with pytest.raises(RecipeError, match=r"name: Input should be a valid string"):
        read(text, "stages.chat.seed=1")


def test_a_recipe_that_is_not_utf_8(tmp_path):
    (tmp_path / "r.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(RecipeError, match=r"r\.yaml: not UTF-8 text"):
        read_recipe(tmp_path / "r.yaml")


def test_aliases_that_grow_without_end_are_refused_at_once():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12))
    for text in (bomb + TEXT, f"name: &x [*x]\n{TEXT[10:]}"):
        started = time.process_time()
        with pytest.raises(RecipeError, match="more than 100,000 values"):
            read(text)
        assert time.process_time() - started < 1
    assert read("name: &n one\n" + TEXT[10:].replace("name: chat", "name: chat, train_on: last")).name == "one"


@pytest.mark.parametrize(
    "value", ["!!timestamp x", "!!int x", "!!bool x", "!!float x", "!!binary é", '"\\ud800"', "2020-13-45"]
)
def test_a_value_that_is_none_of_its_kind(value):
    with pytest.raises(RecipeError, match=r"not YAML|seed"):
        read(f"{TEXT}seed: {value}\n")
    with pytest.raises(RecipeError):
        read(TEXT, f"seed={value}")


def test_a_key_that_is_half_a_character():
    with pytest.raises(RecipeError, match=r"r.yaml:6: not YAML: half a character"):
        read(TEXT + '"\\ud800": 1\n')
