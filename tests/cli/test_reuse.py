"""What is done is not done again, what has changed is, and the same seed gives the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from trivium.chain import run_recipe
from trivium.recipe_file import read_recipe

SHORT = {"max_steps": 1, "batch_size": 2, "eval_data": 0}
STAGES = [
    {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT},
    {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", "method": "lora", **SHORT},
    {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", **SHORT},
]
NAMES = ["base", "chat", "aligned"]


@pytest.fixture(scope="module")
def done_once(tmp_path_factory, data, write_recipe) -> Path:
    """A folder with data, recipe.yaml and out/, to be copied."""
    here = tmp_path_factory.mktemp("reuse")
    shutil.copytree(data, here, dirs_exist_ok=True)
    run_recipe(read_recipe(write_recipe(here, STAGES)), here / "out")
    return here


@pytest.fixture
def here(done_once, tmp_path) -> Path:
    return Path(shutil.copytree(done_once, tmp_path / "copy"))


def stamps(out: Path) -> dict[str, int]:
    return {name: (out / name / "trivium.json").stat().st_mtime_ns for name in NAMES}


def again(here: Path, trivium, *more: object) -> tuple[list[str], str]:
    """Run the recipe in ``here`` once more: the stages that ran, and what was said."""
    before = stamps(here / "out")
    done = trivium("run", here / "recipe.yaml", "--out", here / "out", *more)
    assert done.code == 0, done.err
    after = stamps(here / "out")
    return [n for n in NAMES if before[n] != after[n]], done.err


REMADE = ("summary.json", "report.html")
WRITTEN = (*REMADE, "measures.json")


def test_a_second_run_trains_nothing(here, trivium):
    files = {p: p.stat().st_mtime_ns for p in (here / "out").rglob("*") if p.is_file() and p.name not in REMADE}
    summary = (here / "out" / "summary.json").read_text(encoding="utf-8")
    ran, said = again(here, trivium)
    assert ran == []
    assert said.count("not run again") == 3
    assert "step 1/1" not in said
    assert {p: p.stat().st_mtime_ns for p in files} == files
    assert (here / "out" / "summary.json").read_text(encoding="utf-8") == summary


@pytest.mark.parametrize(
    ("change", "rerun"),
    [
        ("stages.aligned.beta=0.2", ["aligned"]),
        ("stages.chat.learning_rate=3e-4", ["chat", "aligned"]),
        ("stages.chat.method.r=2", ["chat", "aligned"]),
        ("seed=1", NAMES),
        ("stages.chat.micro_batch_tokens=512", []),
        ("stages.chat.device=cpu", []),
        ("stages.aligned.recompute=none", []),
    ],
)
def test_a_change_reruns_its_stage_and_what_follows(here, trivium, change, rerun):
    assert again(here, trivium, "--set", change)[0] == rerun


def test_changed_data_reruns_and_moved_data_does_not(here, trivium):
    (here / "elsewhere").mkdir()
    (here / "chats.jsonl").rename(here / "elsewhere" / "talks.jsonl")
    moved = ("--set", f"stages.chat.data={here / 'elsewhere' / 'talks.jsonl'}")
    assert again(here, trivium, *moved)[0] == []
    with (here / "elsewhere" / "talks.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"prompt": "red", "completion": "blue"}\n')
    assert again(here, trivium, *moved)[0] == ["chat", "aligned"]


def test_changed_held_out_data_reruns_nothing_trained_before_it(here, trivium):
    shutil.copy(here / "text.jsonl", here / "held.jsonl")
    assert again(here, trivium, "--set", f"stages.aligned.eval_data={here / 'pairs.jsonl'}")[0] == ["aligned"]


def test_a_deleted_stage_is_trained_again_the_same(here, trivium):
    weights = (here / "out" / "chat" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(here / "out" / "chat")
    (here / "out" / "chat").mkdir()
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 2
    assert "not a folder of trivium" in done.error
    (here / "out" / "chat").rmdir()
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 0
    assert done.err.count("not run again") == 2
    assert (here / "out" / "chat" / "adapter_model.safetensors").read_bytes() == weights


def test_what_an_unfinished_attempt_left_is_swept(here, trivium):
    shutil.move(here / "out" / "aligned", here / "out" / "aligned.partial")
    done = trivium("run", here / "recipe.yaml", "--out", here / "out")
    assert done.code == 0
    assert {p.name for p in (here / "out").iterdir()} == {"aligned", "base", "chat", "tokenizer", *WRITTEN}


def test_a_moved_run_still_opens_and_is_not_run_again(here, trivium):
    moved = here.rename(here.with_name("moved"))
    done = trivium("generate", moved / "out" / "aligned", "red cat", "--max-new-tokens", 3)
    assert done.code == 0, done.err
    record = json.loads((moved / "out" / "aligned" / "trivium.json").read_text(encoding="utf-8"))
    assert not Path(record["base"]["path"]).is_absolute()
    assert again(moved, trivium)[0] == []


def test_until_stops_after_its_stage(here, trivium):
    done = trivium("run", here / "recipe.yaml", "--out", here / "new", "--until", "base")
    assert done.code == 0
    assert {p.name for p in (here / "new").iterdir()} == {"base", "tokenizer", *WRITTEN}
    assert "chat" not in done.out
    done = trivium("run", here / "recipe.yaml", "--out", here / "new", "--until", "bas")
    assert done.code == 2
    assert "did you mean 'base'" in done.error


def test_set_reaches_everything(here, trivium, monkeypatch):
    sub = here / "sub"
    sub.mkdir()
    shutil.copy(here / "chats.jsonl", sub / "here.jsonl")
    monkeypatch.chdir(sub)
    done = trivium(
        "run", here / "recipe.yaml", "--out", here / "out",
        "--set", "stages.chat.data=here.jsonl",
        "--set", "stages.chat.learning_rate=1e-4",
        "--set", "stages.chat.method={name: bottleneck, r: 2, dropout: 1e-1}",
        "--set", "stages.aligned.max_steps=2",
        "--set", "stages.aligned.data=[../pairs.jsonl]",
    )  # fmt: skip
    assert done.code == 0, done.err
    chat, aligned = (
        json.loads((here / "out" / n / "trivium.json").read_text(encoding="utf-8"))["settings"]
        for n in ("chat", "aligned")
    )
    assert chat["data"] == str(sub / "here.jsonl")
    assert chat["learning_rate"] == 1e-4
    assert chat["method"] == aligned["method"] == {"name": "bottleneck", "r": 2, "dropout": 0.1}
    assert aligned["max_steps"] == 2
    assert Path(aligned["data"]).resolve() == here / "pairs.jsonl"


@pytest.mark.parametrize("method", ["full", "lora", {"name": "bottleneck", "dropout": 0.2}])
def test_the_same_seed_gives_the_same_weights_bitwise(done_once, tmp_path, write_recipe, method):
    stage = {"name": "x", "stage": "sft", "data": str(done_once / "chats.jsonl"), "method": method, **SHORT}
    stage |= {"max_steps": 3, "learning_rate": 1e-2}
    found = []
    for number, seed in enumerate((0, 0, 1)):
        recipe = write_recipe(tmp_path, [stage], model=str(done_once / "out" / "base"), seed=seed)
        run_recipe(read_recipe(recipe), tmp_path / str(number))
        found.append(next((tmp_path / str(number) / "x").glob("*.safetensors")).read_bytes())
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_a_new_model_is_the_same_for_the_same_seed(done_once, tmp_path):
    found = []
    for number, seed in enumerate((0, 1)):
        recipe = read_recipe(done_once / "recipe.yaml", [f"seed={seed}"])
        run_recipe(recipe, tmp_path / str(number), until="base")
        found.append((tmp_path / str(number) / "base" / "model.safetensors").read_bytes())
    assert found[0] == (done_once / "out" / "base" / "model.safetensors").read_bytes()
    assert found[0] != found[1]
