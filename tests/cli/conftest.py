"""A tiny walk through all three steps, run once and read by many tests; the command line, called in this process."""

from __future__ import annotations

import copy
import json
import random
import signal
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

WORDS = [
    "red",
    "blue",
    "green",
    "old",
    "young",
    "small",
    "big",
    "cat",
    "dog",
    "bird",
    "sat",
    "ran",
    "saw",
    "ate",
    "tree",
]
MODEL = {
    "architecture": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 320,
    "max_position_embeddings": 128,
}
SHORT = {"max_steps": 2, "batch_size": 4, "eval_data": 0.2, "learning_rate": 1e-2}
LORA = {"name": "lora", "r": 2}
BOTTLENECK = {"name": "bottleneck", "r": 4}
WALK = {
    "name": "walk",
    "model": MODEL,
    "stages": [
        {"name": "base", "stage": "pretrain", "data": "text.jsonl", **SHORT, "optimizer": "muon"},
        {"name": "chat", "stage": "sft", "from": "base", "data": "chats.jsonl", "method": LORA, **SHORT},
        {"name": "aligned", "stage": "preference", "from": "chat", "data": "pairs.jsonl", **SHORT},
        {"name": "tutor", "stage": "sft", "from": "base", "data": "chats.jsonl", "method": BOTTLENECK, **SHORT},
        {"name": "judged", "stage": "preference", "from": "tutor", "data": "pairs.jsonl", **SHORT},
        {"name": "whole", "stage": "preference", "from": "aligned", "data": "pairs.jsonl", "method": "full", **SHORT},
        {"name": "again", "stage": "sft", "from": "whole", "data": "chats.jsonl", "method": LORA, **SHORT},
    ],
}


@dataclass
class Done:
    """How a command ended."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The lines from ``error:`` on; "" where there is none."""
        at = self.err.find("error: ")
        return self.err[at:] if at >= 0 else ""


@pytest.fixture
def trivium(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Done]]:
    """``trivium("run", recipe, ...)`` as in a shell, but in this process."""
    from trivium import interrupt
    from trivium.cli.main import main
    from trivium.interrupt import SIGNALS

    handlers = {number: signal.getsignal(number) for number in SIGNALS}

    def run(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["trivium", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return Done(int(ended.value.code or 0), out, err)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)
    interrupt._asked.clear()  # else what runs next in this process would take it for its own


def write_data(folder: Path, seed: int = 0) -> Path:
    """``text.jsonl``, ``chats.jsonl`` and ``pairs.jsonl``, of a few words each."""
    rng = random.Random(seed)

    def words(n: int) -> str:
        return " ".join(rng.choice(WORDS) for _ in range(n))

    def turns() -> list[dict[str, str]]:
        return [{"role": "user", "content": words(3)}, {"role": "assistant", "content": words(3)}]

    rows: dict[str, list[dict[str, Any]]] = {
        "text": [{"text": words(12)} for _ in range(40)],
        "chats": [{"messages": turns() * (1 + n % 2)} for n in range(24)],
        "pairs": [{"prompt": words(4), "chosen": words(4), "rejected": words(3)} for _ in range(24)],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, values in rows.items():
        text = "".join(json.dumps(value) + "\n" for value in values)
        (folder / f"{name}.jsonl").write_text(text, encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three data files; read only."""
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def write_recipe() -> Callable[..., Path]:
    """``write_recipe(folder, stages=[...], model=...)`` writes ``recipe.yaml`` there."""

    def write(folder: Path, stages: list[dict[str, Any]], model: Any = MODEL, **more: Any) -> Path:
        path = folder / "recipe.yaml"
        value = {"name": "walk", "model": model, "stages": stages, **more}
        path.write_text(yaml.safe_dump(value, sort_keys=False), encoding="utf-8")
        return path

    return write


@dataclass
class Walk:
    """A finished run, never written to by a test."""

    folder: Path
    recipe: Path
    summary: dict[str, Any]
    said: str

    def record(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / name / "trivium.json").read_text(encoding="utf-8"))
        return found


@pytest.fixture(scope="session")
def walk(tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """Pretraining; LoRA SFT and DPO; bottleneck SFT and DPO; full DPO; LoRA SFT on that: one run of seven stages."""
    import contextlib
    import io

    from trivium.chain import run_recipe
    from trivium.recipe_file import read_recipe

    here = write_data(tmp_path_factory.mktemp("walk"))
    recipe = here / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(copy.deepcopy(WALK), sort_keys=False), encoding="utf-8")
    said, threads = io.StringIO(), torch.get_num_threads()
    torch.set_num_threads(1)
    with contextlib.redirect_stderr(said):
        summary = run_recipe(read_recipe(recipe), here / "out")
    torch.set_num_threads(threads)
    return Walk(here / "out", recipe, summary, said.getvalue())
