"""Recipes: values of another type, lines of YAML changed, bytes; and what a run checks before it opens a model."""

from __future__ import annotations

import contextlib
import copy
import shutil
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import yaml
from tests.fuzz.mutate import ODD, as_json, bytes_of, misspelt, value_of
from tests.fuzz.world import World

from trivium import chain
from trivium.checks import check_fit
from trivium.peft.settings import METHODS, PRESETS
from trivium.recipe_file import read_recipe

YAML_ODD = (
    "!!python/object/apply:os.system [x]", "!!binary aGk=", "!!set {a, b}", "&a [*a]", "*nowhere", "1:30", "0o17",
    "2020-01-01",
    "2020-13-45", "~", ".nan", "-.inf", "1_000", "yes", "|\n  a\n b", "? a\n: b", "---", "'", '"', "{", "- - -",
    "\t- a", "%TAG ! x",
    "<<: *a", "<<: {a: 1}", "@a", "`a`", "[a, b", "{a: {b: {c: [1, {d: 2}]}}}", "\ufeff", "\u2028", "a: b: c",
    "!!int x", "!!timestamp x",
    "0x" + "f" * 400, "1" + "0" * 5000, "[" * 400, "{a: " * 400, "9" * 30 + ":1", "=", "!!float 1e999", "1e999",
    "2020-01-01T25:61:00",
)  # fmt: skip
BOMB = "b0: &b0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"b{n}: &b{n} [{', '.join([f'*b{n - 1}'] * 10)}]\n" for n in range(1, 9)
)
GOOD = {
    "epochs": [1, 0.5], "max_steps": [1, 3], "batch_size": [1, 4], "batch_tokens": [64], "micro_batch_tokens": [64],
    "learning_rate": [1e-3],
    "schedule": ["cosine", "wsd"], "warmup_ratio": [0, 0.1], "optimizer": ["adamw", "muon"], "weight_decay": [0.1],
    "max_grad_norm": [1],
    "max_length": [32, 64], "on_overflow": ["drop", "split", "truncate_left"], "bad_rows": [0, 1],
    "duplicates": ["drop"], "scored": ["all"],
    "date": ["2024-01-01"], "train_on": ["last", "all"], "recompute": ["layers", 1], "memory": ["2GB", "1.5 GiB"],
    "dropout": [0.1],
    "eval_data": [0.1, "pairs.jsonl", ["text.jsonl"]], "eval_every": [2], "save_every": [3], "save_minutes": [1.5],
    "keep_checkpoints": [1],
    "result": ["best"], "skip_non_finite": [1], "seed": [3], "dtype": ["float32", "auto"], "device": ["cpu", "cuda:7",
    "mps"], "beta": [0.2],
    "loss": ["ipo", "kto", "orpo", {"dpo": 1, "hinge": 0.5}, "simpo"], "sft_weight": [0.1], "label_smoothing": [0.1],
    "gamma": [0.5],
    "divergence": ["js", "alpha"], "divergence_alpha": [0.5], "ld_alpha": [0.5], "desirable_weight": [1],
    "undesirable_weight": [2],
    "center_rewards": [0.01], "reference": ["kept"], "reference_sync_steps": [5], "reference_mixup": [0.5],
    "data": [["text.jsonl", {"path": "chats.jsonl", "weight": 2}], "*.jsonl", {"path": "pairs.jsonl",
    "fields": {"prompt": "q"}}, "."],
}  # fmt: skip
TOP = {"track": ["tensorboard", "wandb"], "prompts": [[], ["a"]], "judge": [{"reward": "taste"},
    {"endpoint": "http://localhost:1/v1", "model": "x"}],
       "judge_prompts": [0, 2], "eval_text": ["text.jsonl"], "seed": [1]}  # fmt: skip
METHOD_VALUES = (
    1,
    2,
    0.5,
    "q_proj",
    ["q_proj", "v_proj"],
    {"q_proj": 4},
    "all-linear",
    "nf4",
    True,
    "pissa",
    "houlsby",
    "(a+)+$",
    "*",
    "[",
)


class Far(Exception):
    """The recipe was found good; what comes now takes a model."""


def make_recipe(world: World, folder: Path, rng: Random) -> None:
    for file in world.folder.glob("*.jsonl"):
        shutil.copy(file, folder)
    value = copy.deepcopy(rng.choice(world.recipes))
    for _ in range(rng.choice((0, 1, 3))):
        name = rng.choice([*GOOD, "method"])
        rng.choice(value["stages"])[name] = _method(rng) if name == "method" else rng.choice(GOOD[name])
    if rng.random() < 0.2:
        name = rng.choice(list(TOP))
        value[name] = rng.choice(TOP[name])
    how = rng.random()
    if how < 0.5:
        text = as_json(value_of(rng, value), indent=rng.random() < 0.5)
    else:
        text = yaml.safe_dump(value, sort_keys=False)
        text = _lines(rng, text) if how < 0.75 else text
    data = text.encode("utf-8", "surrogatepass")
    if how >= 0.75:
        data = bytes_of(rng, data, yaml.safe_dump(rng.choice(world.recipes), sort_keys=False).encode())
    (folder / "recipe.yaml").write_bytes(data)


def _method(rng: Random) -> Any:
    """Any method, with some of its settings."""
    name = rng.choice([*METHODS, *PRESETS])
    known = [f.name for f in fields(METHODS[PRESETS.get(name, {"name": name})["name"]].settings)]
    return {"name": name, **{k: rng.choice(METHOD_VALUES) for k in known if rng.random() < 0.2}}


def _lines(rng: Random, text: str) -> str:
    """Lines of a YAML file changed: another value, another indent, a line twice or elsewhere."""
    lines = text.split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(lines))
        key, colon, _ = lines[at].partition(":")
        odd = rng.choice(YAML_ODD)
        ways = (f"{key}{colon} {odd}", f"{key}{colon} {odd}", lines[at][1:], f" {lines[at]}",
            f"{lines[at]}\n{lines[at]}", odd, "",
                lines[rng.randrange(len(lines))], f"{misspelt(rng, key)}{colon} 1",
                    f"{key}{colon} *b{rng.randrange(9)}")  # fmt: skip
        lines[at] = rng.choice(ways)
    text = "\n".join(lines)
    return BOMB + text if "*b" in text else text


def call_recipe(world: World, folder: Path, rng: Random) -> None:
    overrides = []
    while rng.random() < 0.15:
        place = f"{rng.choice(('chat', 'base', 'x', '0'))}.{rng.choice([*GOOD, 'method', 'method.r', 'name'])}"
        others = ("model", "model.hidden_size", "stages", "", "a.b", "stages.chat", "model.path")
        key = rng.choice([f"stages.{place}", *TOP, *others])
        odd = rng.choice((*YAML_ODD, *(as_json(o) for o in ODD), "1", "lora", "text.jsonl"))
        overrides.append(rng.choice((f"{key}={odd}", key, f"={odd}")))
    recipe = read_recipe(folder / "recipe.yaml", overrides)
    with mock.patch.object(chain, "make_folder", side_effect=Far), contextlib.suppress(Far):
        chain.run_recipe(recipe, folder / "out")
    settings, _ = chain._resolved(recipe, recipe.stages)
    check_fit(world.model, recipe, [*settings.values()])
