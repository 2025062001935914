"""What all models of a run are asked: chosen from the data or the recipe, answered once, kept with each identity."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import trivium
from trivium.demo import world
from trivium.measures import Measures

SHORT = {"max_steps": 1, "batch_size": 2, "learning_rate": 1e-2}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A small model, and rows beside it; read only."""
    folder = tmp_path_factory.mktemp("given")
    world.write(folder, 0, stories=60, requests=40, pairs=20, held_out=8)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 512}
    trivium.new(folder / "stories.jsonl", vocab_size=400, **sizes).save(folder / "small")
    return folder


def run(given: Path, out: Path, judge: Any = None, **more: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    stages = [{"name": "chat", "stage": "sft", "data": str(given / "requests.jsonl"), "method": "lora", **SHORT}]
    recipe = {"name": "x", "model": str(given / "small"), "stages": stages, **more}
    summary = trivium.run(recipe, out, judge=judge)
    return summary, json.loads((out / "measures.json").read_text(encoding="utf-8"))


def test_the_given_model_and_every_stage_are_asked_the_same(given, tmp_path) -> None:
    summary, found = run(
        given, tmp_path / "out", prompts=["Hello", "Who are you?"], eval_text=str(given / "valid.jsonl")
    )
    assert found["prompts"] == ["Hello", "Who are you?"]
    assert list(found["models"]) == ["model", "chat"]
    before, after = found["models"].values()
    assert len(before["answers"]) == len(after["answers"]) == 2
    model = trivium.load(tmp_path / "out" / "chat")
    assert after["answers"] == model.generate(["Hello", "Who are you?"], 160)
    assert after["bits_per_byte"] == pytest.approx(
        model.evaluate(given / "valid.jsonl", "pretrain")["bits_per_byte"], rel=1e-5
    )
    (stage,) = summary["stages"]
    assert stage["text_bits_per_byte"] == {"before": before["bits_per_byte"], "after": after["bits_per_byte"]}
    page = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "the given model" in page
    assert "Who are you?" in page


def test_left_out_held_out_rows_are_asked_and_nothing_is_read(given, tmp_path) -> None:
    summary, found = run(given, tmp_path / "out")
    assert 1 <= len(found["prompts"]) <= 3
    assert all(m["bits_per_byte"] is None for m in found["models"].values()), "no text in this run to be measured on"
    assert "text_bits_per_byte" not in summary["stages"][0]


def test_nothing_is_asked_where_a_recipe_says_so(given, tmp_path) -> None:
    trivium_out = tmp_path / "out"
    stages = [{"name": "chat", "stage": "sft", "data": str(given / "requests.jsonl"), "method": "lora", **SHORT}]
    trivium.run({"name": "x", "model": str(given / "small"), "prompts": [], "stages": stages}, trivium_out)
    assert not (trivium_out / "measures.json").exists()
    assert "The same prompts" not in (trivium_out / "report.html").read_text(encoding="utf-8")


def test_what_was_measured_so_before_is_not_measured_again(given, tmp_path, monkeypatch) -> None:
    measured: list[str] = []
    real = Measures._measured
    monkeypatch.setattr(
        Measures,
        "_measured",
        lambda self, i, source, *more: measured.append(Path(source).name) or real(self, i, source, *more),
    )
    first = run(given, tmp_path / "out", prompts=["Hello"])
    assert measured == ["small", "chat"]
    assert run(given, tmp_path / "out", prompts=["Hello"]) == first
    assert measured == ["small", "chat"]
    run(given, tmp_path / "out", prompts=["Good day"])
    assert measured == ["small", "chat"] * 2, "another exam"
    (tmp_path / "out" / "measures.json").write_text('{"models": [1]', encoding="utf-8")
    run(given, tmp_path / "out", prompts=["Good day"])
    assert measured == ["small", "chat"] * 3, "what cannot be read is measured again"


def test_a_judge_with_a_key_is_asked_once(given, tmp_path) -> None:
    seen: list[int | None] = []

    def judge(talker: Any, most: int | None) -> dict[str, Any]:
        seen.append(most)
        return {"good": (1, 1)}

    run(given, tmp_path / "out", judge)
    count = len(seen)
    run(given, tmp_path / "out", judge)
    assert seen[count:] == [None, None], "without a key it may ask something else now"
    judge.key = "the same"  # type: ignore[attr-defined]
    run(given, tmp_path / "out", judge)
    count = len(seen)
    _, found = run(given, tmp_path / "out", judge)
    assert len(seen) == count
    assert found["models"]["chat"]["judged"]["good"]["share"] == 1.0
