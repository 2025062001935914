"""The documents cannot lie: what README and CONTRIBUTING show is run here."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

import trivium
from trivium.chain import run_recipe
from trivium.cli.main import app
from trivium.demo import world
from trivium.recipe_file import parse_recipe

ROOT = Path(__file__).parents[1]
TINY = {"architecture": "llama", "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 400}
SHORT = {"max_steps": 2, "batch_size": 2, "eval_data": 0}


def blocks(document: str, language: str) -> list[str]:
    text = (ROOT / document).read_text(encoding="utf-8")
    return re.findall(rf"```{language}\n(.*?)```", text, flags=re.DOTALL)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Rows under the names that the README uses."""
    world.write(tmp_path, seed=0, stories=60, requests=40, pairs=40, held_out=8)
    for theirs, ours in {"text": "stories", "chats": "requests", "pairs": "pairs"}.items():
        shutil.copy(tmp_path / f"{ours}.jsonl", tmp_path / f"my_{theirs}.jsonl")
    faq = "".join(f"Who is {n}?,A turtle called {n}.\n" for n in range(9))
    (tmp_path / "my_faq.csv").write_text(f"asked,replied\n{faq}", encoding="utf-8")
    return tmp_path


def test_contributing_adds_a_loss_a_method_and_a_stage(folder: Path) -> None:
    shutil.copytree(ROOT / "src", folder / "src", ignore=shutil.ignore_patterns("__pycache__"))
    for block in blocks("CONTRIBUTING.md", "python"):
        for part in re.split(r"(?m)^(?=# src/)", block):
            if part.strip():
                name, _, code = part.partition("\n")
                with (folder / name.removeprefix("# ").strip()).open("a", encoding="utf-8") as file:
                    file.write("\n\n" + code)
    recipe = {
        "name": "added",
        "model": TINY,
        "stages": [
            {"name": "base", "stage": "pretrain", "data": "my_text.jsonl", **SHORT},
            {"name": "more", "stage": "continue", "from": "base", "data": "my_text.jsonl", **SHORT},
            {"name": "chat", "stage": "sft", "from": "more", "data": "my_chats.jsonl", "method": "gain", **SHORT},
            {
                "name": "aligned",
                "stage": "preference",
                "from": "chat",
                "data": "my_pairs.jsonl",
                "loss": "sppo",
                **SHORT,
            },
        ],
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    code = "from trivium.cli.main import main; main()"
    environment = {**os.environ, "PYTHONPATH": str(folder / "src")}
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "recipe.yaml", "--out", "out"],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "proof: sppo(beta=0.1) starts at 50.000000" in done.stderr
    assert "goes on training the gain adapter" in done.stderr
    record = json.loads((folder / "out" / "aligned" / "trivium.json").read_text(encoding="utf-8"))
    assert [link["stage"] for link in record["lineage"]] == [
        "random weights",
        "pretrain",
        "continue",
        "sft",
        "preference",
    ]
    assert record["trained_parameters"] == 2 * TINY["hidden_size"]


def test_the_readmes_recipes_run(folder: Path) -> None:
    found = blocks("README.md", "yaml")
    assert found
    for number, text in enumerate(found):
        recipe: dict[str, Any] = yaml.safe_load(text)
        parse_recipe(text, folder / "recipe.yaml")  # as it stands
        recipe["model"] = TINY  # then small: a new model stands for the one that the README names
        recipe["stages"].insert(0, {"name": "small", "stage": "pretrain", "data": "my_text.jsonl"})
        for stage in recipe["stages"]:
            for key in ("epochs", "batch_tokens"):
                stage.pop(key, None)
            stage |= SHORT
            if stage["name"] != "small":
                stage.setdefault("from", "small")
        summary = run_recipe(parse_recipe(yaml.safe_dump(recipe), folder / "recipe.yaml"), folder / f"out{number}")
        assert [s["name"] for s in summary["stages"]] == [s["name"] for s in recipe["stages"]]


def test_the_readmes_python_runs(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    rows, pairs = (
        [json.loads(line) for line in (folder / f"my_{name}.jsonl").read_text(encoding="utf-8").splitlines()]
        for name in ("chats", "pairs")
    )
    sizes = {k: v for k, v in TINY.items() if k not in ("architecture", "vocab_size")}
    trivium.new(rows=[{"text": "Once upon a time."}], vocab_size=400, **sizes).save(folder / "small")
    for name, method in (("anna", "lora"), ("ben", "houlsby")):
        trivium.load(folder / "small").attach(method).save(folder / "runs" / name / "chat")
    found = blocks("README.md", "python")
    assert len(found) == 3
    for block in found:
        block = block.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "small").replace("max_steps=30", "max_steps=1")
        exec(block, {"rows": rows, "pairs": pairs})
    assert (folder / "my-adapter" / "adapter_model.safetensors").is_file()


def test_the_readmes_commands_exist() -> None:
    lines = [
        line.strip("$ ") for b in blocks("README.md", "console") for line in b.splitlines() if line.startswith("$ ")
    ]
    assert any(line.startswith("trivium") for line in lines)
    targets = re.findall(r"(?m)^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"))
    command = get_command(app)
    for line in lines:
        words = line.split("#")[0].split()
        if words[0] == "torchrun":  # tests/crash runs it
            at = words.index("-m")
            assert words[at : at + 3] == ["-m", "trivium", "run"], line
            words = words[at + 1 :]
        if words[0] == "make":
            assert words[1] in targets, line
        elif words[0] == "trivium":
            sub = command.commands[words[1]]  # type: ignore[attr-defined]
            sub = sub.commands[words[2]] if hasattr(sub, "commands") else sub
            options = {o for p in sub.params for o in [*p.opts, *p.secondary_opts]}
            assert {w.split("=")[0] for w in words[2:] if w.startswith("--")} <= options, line
            assert all((ROOT / w).exists() for w in words if w.startswith("recipes/")), line


def test_every_recipe_reads() -> None:
    found = sorted((ROOT / "recipes").glob("*.yaml"))
    assert {p.stem for p in found} >= {"tinystories", "smollm2"}
    for path in found:
        parse_recipe(path.read_text(encoding="utf-8"), path)
