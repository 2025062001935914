"""A tiny walk to compare ways on, and comparisons in this process, which costs no start of another one."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from tests.crash.process import write_rows

from trivium.comparing import process, worker
from trivium.comparing.comparison import compare
from trivium.recipe_file import read_recipe

MODEL = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
SHORT = {"max_steps": 3, "batch_size": 4, "eval_data": 0.2}
STAGES: list[dict[str, Any]] = [
    {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT, "dtype": "float32"},
    {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", **SHORT, "learning_rate": 1e-2,
     "method": {"name": "lora", "r": 2}},
    {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", **SHORT},
]  # fmt: skip


def write(folder: Path, stages: list[dict[str, Any]] = STAGES, model: Any = MODEL, **more: Any) -> Path:
    """``recipe.yaml`` with its data."""
    write_rows(folder)
    value = {"name": "walk", "seed": 5, "model": model, "stages": stages, **more}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
    return folder / "recipe.yaml"


@contextlib.contextmanager
def in_this_process() -> Iterator[list[Path]]:
    """Runs are carried out here; gives the folders of those that were."""
    ran: list[Path] = []

    def carry_out(recipe: Path, folder: Path, requests: Path | None = None) -> dict[str, Any]:
        ran.append(folder)
        told, _ = worker.outcome(str(recipe), str(folder), str(requests or ""))
        if "error" in told:
            raise process._error(told["error"])
        return told

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(process, "carry_out", carry_out)
        yield ran


@pytest.fixture
def here() -> Iterator[list[Path]]:
    """Every run of the test is carried out in this process."""
    with in_this_process() as ran:
        yield ran


@pytest.fixture(scope="session")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path, str]:
    """A finished comparison of three ways with two seeds: its numbers, its folder, what was said. Read only."""
    folder = tmp_path_factory.mktemp("comparing")
    recipe, said, threads = write(folder), io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(said), in_this_process():
        found = compare(read_recipe(recipe), folder / "out", ["full", "lora", "houlsby"], seeds=2)
    torch.set_num_threads(threads)
    return found, folder / "out", said.getvalue()


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """``recipe(stages=..., model=...)`` writes a recipe with its data in a new folder."""
    return lambda **given: write(tmp_path, **given)
