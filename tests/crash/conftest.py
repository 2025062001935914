"""A tiny model, and recipes of one stage that start from it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.crash.process import CELLS, COMMON, DATA, write_rows

from trivium.chain import run_recipe
from trivium.recipe_file import read_recipe


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with data and ``base``, the tiny model that all cells start from."""
    here = tmp_path_factory.mktemp("crash")
    write_rows(here)
    model = {"architecture": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
             "vocab_size": 320, "max_position_embeddings": 128}  # fmt: skip
    stage = {"name": "base", "stage": "pretrain", "data": "text.jsonl", "max_steps": 2, "batch_size": 4}
    (here / "base.yaml").write_text(yaml.safe_dump({"name": "b", "model": model, "stages": [stage]}), encoding="utf-8")
    torch.set_num_threads(1)
    run_recipe(read_recipe(here / "base.yaml"), here / "out")
    return here


@pytest.fixture
def cell(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """``cell("sft-lora", save_every=1)`` writes a recipe of this one stage in a new folder, and returns its path."""

    def write(name: str, **changed: Any) -> Path:
        here = tmp_path_factory.mktemp(name)
        for file in base.glob("*.jsonl"):
            (here / file.name).write_bytes(file.read_bytes())
        stage = {"name": "x", "data": DATA[CELLS[name]["stage"]], **COMMON, **CELLS[name], **changed}
        recipe = {"name": "crash", "seed": 1, "model": str(base / "out" / "base"), "prompts": [], "stages": [stage]}
        (here / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
        return here / "recipe.yaml"

    return write
