"""The notebooks: executed as they are committed, and run again here, made small."""

from __future__ import annotations

import contextlib
import io
import json
import re
from pathlib import Path
from typing import Any

import pytest

import trivium
from trivium.demo import world

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))


def cells(path: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return found


def code_of(path: Path) -> list[str]:
    return ["".join(cell["source"]) for cell in cells(path) if cell["cell_type"] == "code"]


def test_there_are_two() -> None:
    assert {path.stem for path in NOTEBOOKS} >= {"three_steps", "your_own_data"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_they_are_executed_in_order_without_errors_or_paths_of_a_machine(path: Path) -> None:
    code = [cell for cell in cells(path) if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert len(outputs) > 4
    assert all(output["output_type"] != "error" for output in outputs)
    text = json.dumps(outputs)
    assert not re.search(r"/(tmp|home|root|work|Users)/", text)
    assert path.stat().st_size < 200_000


def run(path: Path, changes: dict[str, str]) -> dict[str, Any]:
    """Run the code of a notebook, its settings changed by patterns; returns what it has defined."""
    names: dict[str, Any] = {}
    for source in code_of(path):
        for pattern, value in changes.items():
            source = re.sub(pattern, value, source)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            exec(compile(source, str(path), "exec"), names)
    return names


def test_three_steps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    small = {
        r"STEPS = \d+": "STEPS = 12",
        r"hidden_size=\d+": "hidden_size=32",
        r"num_hidden_layers=\d+": "num_hidden_layers=1",
        r"vocab_size=\d+": "vocab_size=400",
        r"max_new_tokens=\d+": "max_new_tokens=4",
        r"world.stories\(20_000": "world.stories(200",
        r"world.requests\(\d_000": "world.requests(60",
        r"held_out_requests\(\d+": "held_out_requests(6",
    }
    names = run(EXAMPLES / "three_steps.ipynb", small)
    assert [link["stage"] for link in names["model"].lineage] == ["random weights", "pretrain", "sft", "preference"]
    assert (tmp_path / "tuned" / "adapter_model.safetensors").is_file()


def test_your_own_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    stories = list(world.stories(100, 0))
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    trivium.new(stories, vocab_size=400, **sizes).save(tmp_path / "small")
    names = run(EXAMPLES / "your_own_data.ipynb", {r'MODEL = ".*"': 'MODEL = "small"', r"STEPS = \d+": "STEPS = 2"})
    assert names["report"]["rows"]["set_aside"] == 0
    assert names["report"]["rows"]["read"] == len(names["rows"])
    assert (tmp_path / "shop" / "adapter_model.safetensors").is_file()
