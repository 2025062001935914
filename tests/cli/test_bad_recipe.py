"""A recipe with a mistake: exit code 2, what and where, the remedy, no traceback, nothing trained, nothing written."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

NEW = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 320}
BASE = {"name": "base", "stage": "pretrain", "data": "text.jsonl", "max_length": 64, "max_steps": 1, "batch_size": 2}
CHAT = {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", "max_steps": 1, "method": "lora"}
RECIPE = {"name": "bad", "model": {**NEW, "max_position_embeddings": 128}, "stages": [BASE, CHAT]}
NAN, INF = float("nan"), float("inf")


def changed(base: dict[str, Any] | None = None, chat: dict[str, Any] | None = None, **top: Any) -> dict[str, Any]:
    value = {**copy.deepcopy(RECIPE), **top}
    value["stages"] = top.get("stages", [{**BASE, **(base or {})}, {**CHAT, **(chat or {})}])
    return value


def in_model(**more: Any) -> dict[str, Any]:
    return changed(model={**RECIPE["model"], **more})


# name: (the recipe, what the message has to hold)
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "a misspelt key": (changed(sede=1), ["unknown key sede", "did you mean 'seed'?", "keys there are:"]),
    "a misspelt key of a stage": (
        changed(chat={"lerning_rate": 1}),
        ["unknown key stages.chat.lerning_rate", "did you mean 'learning_rate'?"],
    ),
    "a misspelt key of a method": (
        changed(chat={"method": {"name": "lora", "rr": 3}}),
        ["stages.chat.method", "'rr'; did you mean 'r'?", "alpha, alpha_pattern, dora"],
    ),
    "a misspelt method": (changed(chat={"method": "lorra"}), ["stages.chat.method", "did you mean 'lora'?"]),
    "a method without a name": (changed(chat={"method": {"r": 4}}), ["stages.chat.method", "no name"]),
    "a rank of nothing": (changed(chat={"method": {"name": "lora", "r": 0}}), ["stages.chat.method", "r is 0"]),
    "a misspelt size": (in_model(hiden_size=3), ["model.hiden_size", "did you mean 'hidden_size'?"]),
    "a misspelt architecture": (in_model(architecture="lama"), ["model.architecture", "did you mean 'llama'?"]),
    "a size that is text": (in_model(hidden_size="big"), ["model.hidden_size", "'big' is not a whole number"]),
    "sizes that do not fit": (in_model(num_attention_heads=3), ["model.hidden_size: 32", "multiple of 3"]),
    "an architecture that is a number": (in_model(architecture=3), ["model:", "architecture is 3"]),
    "neither path nor architecture": (changed(model={"hidden_size": 3}), ["model:", "`path`", "`architecture`"]),
    "a model that is a number": (changed(model=3), ["model: 3 is no model"]),
    "a tokenizer that is not there": (in_model(tokenizer="nowhere"), ["nowhere: no such folder"]),
    "a vocabulary too small for bytes": (in_model(vocab_size=10), ["vocabulary of 10 is too small", "262"]),
    "a vocabulary that is a word": (in_model(vocab_size="many"), ["model.vocab_size", "not a number of tokens"]),
    "a vocabulary that is nothing": (in_model(vocab_size=None), ["model.vocab_size", "not a number of tokens"]),
    "a model folder that is not there": (
        changed(model="./nowhere", stages=[{**CHAT, "from": None}]),
        ["nowhere: no such model folder", "hub id"],
    ),
    "SFT on a new model": (changed(stages=[{**CHAT, "from": None}]), ["stages.chat", "no tokenizer", "pretrain"]),
    "an unknown from": (changed(chat={"from": "bas"}), ["stages.chat.from", "did you mean 'base'?", "before it: base"]),
    "a from that comes later": (changed(stages=[CHAT, BASE]), ["stages.chat.from", "it comes later"]),
    "a stage from itself": (changed(chat={"from": "chat"}), ["stages.chat.from", "it comes later"]),
    "an unknown stage": (changed(base={"stage": "pretraining"}), ["stages.base.stage", "did you mean 'pretrain'?"]),
    "data that is not there": (changed(base={"data": "texts.jsonl"}), ["texts.jsonl", "did you mean 'text.jsonl'?"]),
    "a later stage's data that is not there": (
        changed(chat={"data": "chat.jsonl"}),
        ["chat.jsonl", "did you mean 'chats.jsonl'?"],
    ),
    "held-out data that is not there": (changed(chat={"eval_data": "chats.json"}), ["did you mean 'chats.jsonl'?"]),
    "a later stage's data that is empty": (changed(chat={"data": "empty.jsonl"}), ["no rows", "empty.jsonl is empty"]),
    "data of an unknown kind": (changed(chat={"data": "notes.xyz"}), ["notes.xyz", ".jsonl"]),
    "no data": (changed(base={"data": []}), ["stages.base.data", "names no file"]),
    "epochs and max_steps": (changed(base={"epochs": 1}), ["stages.base", "epochs and max_steps contradict"]),
    "batch_size and batch_tokens": (changed(base={"batch_tokens": 64}), ["batch_size and batch_tokens contradict"]),
    "a loss that does not fit": (changed(chat={"loss": "dpo"}), ["stages.chat", "next_token, not dpo"]),
    "beta without pairs": (changed(chat={"beta": 0.1}), ["stages.chat", "beta"]),
    "track": (changed(track="tensorbord"), ["track", "'tensorboard'"]),
    "prompts": (changed(prompts="x"), ["prompts", "list"]),
    "eval_text that is not there": (changed(eval_text="nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "eval_text without text": (changed(eval_text="chats.jsonl"), ["eval_text", "chats.jsonl", "no row"]),
    "sft_weight without pairs": (changed(chat={"sft_weight": 1.0}), ["stages.chat", "sft_weight", "it is for dpo"]),
    "train_on without conversations": (changed(base={"train_on": "all"}), ["stages.base", "train_on"]),
    "muon with an adapter": (changed(chat={"optimizer": "muon"}), ["stages.chat", "muon is for full training"]),
    "muon with an inherited adapter": (
        changed(stages=[BASE, CHAT, {**CHAT, "name": "more", "from": "chat", "method": None, "optimizer": "muon"}]),
        ["stages.more.optimizer", "muon"],
    ),
    "a length over the context": (changed(base={"max_length": 500}), ["stages.base.max_length: 500", "128"]),
    "a later length over the context": (changed(chat={"max_length": 500}), ["stages.chat.max_length: 500", "128"]),
    "modules that are not there": (
        changed(chat={"method": {"name": "lora", "target_modules": ["q_prj"]}}),
        ["stages.chat.method", "'q_prj'", "did you mean 'q_proj'?"],
    ),
    "a device that is no device": (changed(chat={"device": "mps:7x"}), ["stages.chat.device"]),
    "an unknown device": (changed(base={"device": "gpu"}), ["stages.base.device", "'gpu'", "cuda"]),
    "a negative rate": (changed(base={"learning_rate": -1}), ["stages.base.learning_rate", "-1"]),
    "a rate of NaN": (changed(base={"learning_rate": NAN}), ["stages.base.learning_rate", "nan"]),
    "an infinite rate": (changed(base={"learning_rate": INF}), ["stages.base", "learning_rate", "finite"]),
    "a warm-up of NaN": (changed(base={"warmup_ratio": NAN}), ["stages.base.warmup_ratio", "nan"]),
    "a share of NaN": (changed(base={"eval_data": NAN}), ["stages.base.eval_data", "no share of the data"]),
    "a share of two": (changed(base={"eval_data": 2}), ["stages.base.eval_data", "no share of the data"]),
    "steps that are true": (changed(base={"max_steps": True}), ["stages.base.max_steps", "true is no value"]),
    "a loss that is true": (changed(chat={"loss": {"next_token": True}}), ["stages.chat.loss", "true is no value"]),
    "steps that are words": (changed(base={"max_steps": "many"}), ["stages.base.max_steps", "'many'"]),
    "no steps": (changed(base={"max_steps": 0}), ["stages.base.max_steps"]),
    "a negative seed": (changed(seed=-1), ["seed", "-1"]),
    "a seed too large for torch": (changed(seed=2**70), ["seed"]),
    "two stages of one name": (changed(chat={"name": "base"}), ["stages.base.name", "rename one"]),
    "two names that differ in case": (changed(chat={"name": "Base"}), ["stages.Base.name", "rename one"]),
    "a name that leads out": (changed(base={"name": "../x"}), ["name", "'../x'"]),
    "a name that is hidden": (changed(base={"name": ".x"}), ["name", "'.x'"]),
    "the name of a stage's base": (changed(chat={"name": "base-base"}), ["stages.base-base.name", "rename one"]),
    "no stages": (changed(stages=[]), ["stages", "at least 1"]),
    "stages that are text": (changed(stages="base"), ["stages", "list"]),
    "a stage that is text": (changed(stages=["base"]), ["stages.0", "'base'"]),
    **{
        f"the name {name}": (changed(stages=[{**BASE, "name": name}]), [f"'{name}'", "choose another name"])
        for name in ("model", "tokenizer", "data", "Model", "summary.json", "x.partial", "x.old")
    },
}  # fmt: skip


@pytest.fixture
def here(data, tmp_path) -> Path:
    for file in data.iterdir():
        (tmp_path / file.name).symlink_to(file)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "notes.xyz").write_text("x", encoding="utf-8")
    return tmp_path


def check(done: Any, *says: str) -> None:
    assert done.code == 2, done.err
    assert done.error, "nothing was said"
    assert len(done.error.strip().splitlines()) <= 3
    assert "Traceback" not in done.err
    assert "step 1/" not in done.err, "something was trained before the mistake was seen"
    for text in says:
        assert text in done.error, f"{text!r} is not in {done.error!r}"
    assert done.error.strip().count("\n") == 1, "one line of what, one of remedy"


@pytest.mark.parametrize("name", CASES)
def test_a_mistake_is_named(name, here, trivium):
    value, says = CASES[name]
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    check(trivium("run", path, "--out", here / "out"), *says)
    left = [p.name for p in (here / "out").rglob("*")] if (here / "out").exists() else []
    assert not [n for n in left if n.endswith((".partial", ".safetensors"))]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b"name: x\nmodel: y: z\n", ":2: not YAML"),
        (b"name: x\n\tmodel: y\n", ":2: not YAML"),
        (b"name: x\nstages: [\n", ": not YAML"),
        (b"- name: x\n", "a recipe is a mapping"),
        (b"", "a recipe is a mapping"),
        (b"just words", "a recipe is a mapping"),
        (b"\x00\xff\xfe\x01", "not UTF-8 text"),
        (b"name: a\x00b\n", "not YAML"),
        (b"name: a\nmodel: x\nname: b\nstages: []\n", ":3: 'name' is given a second time"),
        (b"name: a\nmodel: x\nstages:\n  - name: b\n    stage: sft\n    stage: sft\n", ":6: 'stage' is given a second"),
        (b"name: a\nmodel: {path: x, path: y}\nstages: []\n", ":2: 'path' is given a second time"),
        (b"name: !!python/object/apply:os.getcwd []\n", ":1: not YAML"),
        (b"name: a\nmodel: x\nstages: &s [*s]\n", "100,000 values"),
        (b"name: a\nseed: " + b"9" * 5000 + b"\n", "not YAML"),
        (b"[" * 3000, "nested too deeply"),
        (b"[1, 2]: x\n", "not YAML"),
        (b"name: a\nstages: []\n", "model is missing"),
    ],
)
def test_what_is_no_recipe(text, says, tmp_path, trivium):
    path = tmp_path / "recipe.yaml"
    path.write_bytes(text)
    check(trivium("run", path), says, "recipe.yaml")


def test_the_line_is_named(here, trivium):
    text = "name: x\nmodel: y\nstages:\n  - name: a\n    stage: sft\n    data: chats.jsonl\n    beta: -1\n"
    (here / "recipe.yaml").write_text(text, encoding="utf-8")
    check(trivium("run", here / "recipe.yaml"), "recipe.yaml:7: stages.a.beta", "-1")


def test_a_missing_recipe(here, trivium):
    (here / "recipe.yaml").touch()
    check(trivium("run", here / "recipee.yaml"), "no such recipe; did you mean 'recipe.yaml'?")
    check(trivium("run", here / "nowhere" / "recipe.yaml"), "no such recipe")
    check(trivium("run", here), "cannot be read")


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("nonsense", "not key=value"),
        ("=1", "not key=value"),
        ("stages.chta.beta=1", "did you mean 'chat'?"),
        ("stages.chat.lerning_rate=1", "did you mean 'learning_rate'?"),
        ("sede=1", "did you mean 'seed'?"),
        ("name.x=1", "'name' holds no keys"),
        ("stages.chat=1", "'stages' holds no keys"),
        ("stages=1", "stages: "),
        ("stages.chat.data=nowhere.jsonl", "no such file or folder"),
        ("stages.chat.method=[", "there is no method '['"),
        ("stages.chat.method.rr=4", "did you mean 'r'?"),
        ("model.hiden_size=4", "did you mean 'hidden_size'?"),
    ],
)
def test_a_bad_override(override, says, here, trivium):
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    check(trivium("run", path, "--out", here / "out", "--set", override), says)


def test_out_is_a_file(here, trivium):
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    for out in (here / "notes.xyz", here / "notes.xyz" / "below"):
        done = trivium("run", path, "--out", out)
        assert done.code == 3
        assert f"{out}: cannot be written" in done.error
        assert "--out" in done.error
    assert (here / "notes.xyz").read_text(encoding="utf-8") == "x"


@pytest.mark.skipif("__import__('torch').cuda.is_available()")
def test_cuda_that_is_not_there(here, trivium):
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(chat={"device": "cuda"})), encoding="utf-8")
    check(trivium("run", path), "stages.chat.device: cuda is not available here", "this machine has: cpu")


@pytest.mark.parametrize(
    ("chat", "says", "heavy"),
    [({"lr": 1}, "unknown key stages.chat.lr", set()), ({"data": "chat.jsonl"}, "did you mean 'chats.", {"torch"})],
)
def test_a_plain_mistake_is_said_before_anything_heavy_is_imported(here, chat, says, heavy):
    path = here / "recipe.yaml"
    path.write_text(yaml.safe_dump(changed(chat=chat)), encoding="utf-8")
    code = (
        "import sys, atexit\n"
        "atexit.register(lambda: print(*{'torch', 'transformers'} & set(sys.modules)))\n"
        "from trivium.cli.main import main\n"
        "main()"
    )
    command = [sys.executable, "-c", code, "run", str(path)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert says in done.stderr
    assert set(done.stdout.split()) <= heavy
    assert not (here / "runs").exists()
