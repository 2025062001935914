"""The demo from end to end, made small: the same three stages, a few steps, a few rows."""

from __future__ import annotations

import json
import re

import pytest
import torch

from trivium.demo import show, world
from trivium.recipe_file import parse_recipe

SMALL = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.vocab_size=400", "stages.base.max_steps=2", "stages.base.batch_tokens=512", "stages.chat.epochs=null",
    "stages.chat.max_steps=1", "stages.aligned.max_steps=1", "stages.aligned.batch_size=2",
]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    write = world.write
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(world, "write", lambda folder, seed: write(folder, seed, 40, 20, 20, 6))
    monkeypatch.setattr(show, "parse_recipe", lambda text, path, given: parse_recipe(text, path, [*given, *SMALL]))
    monkeypatch.setattr(show, "REQUESTS", 4)
    monkeypatch.setattr(show, "MOST_TOKENS", 5)
    yield
    torch.set_num_threads(threads)


def test_the_demo(small, tmp_path, capsys):
    summary = show.run_demo(tmp_path / "demo", seed=3)
    out = capsys.readouterr().out
    names = ["base", "chat", "aligned"]
    assert [s["name"] for s in summary["stages"]] == names
    assert list(summary["requests_met"]) == names
    assert all(0 <= share <= 1 for share in summary["requests_met"].values())
    assert json.loads((tmp_path / "demo" / "summary.json").read_text(encoding="utf-8")) == summary
    assert out.count("\nrequest: ") == 2
    assert all(len(re.findall(rf"(?m)^  {name}:", out)) == 2 for name in names), "every stage answers both requests"
    assert "held-out requests met in all: base" in out
    assert f"trivium chat {tmp_path / 'demo' / 'aligned'}" in out
    assert (tmp_path / "demo" / "data" / "held_out.jsonl").is_file()
    record = json.loads((tmp_path / "demo" / "chat" / "trivium.json").read_text(encoding="utf-8"))
    assert record["settings"]["seed"] == 3


def test_a_long_answer_is_shortened_at_a_word():
    assert show._shortened("a  b\nc") == "a b c"
    shortened = show._shortened("word " * 100)
    assert shortened.endswith("word ...")
    assert len(shortened) <= 304
