"""The demo from end to end, made small: the same five stages, a few steps, a few rows."""

from __future__ import annotations

import json

import pytest
import torch

from trivium.demo import own_pairs, show, world
from trivium.recipe_file import parse_recipe

NAMES = ["base", "sft_full", "sft_lora", "sft_bottleneck", "preference"]
SMALL = [
    "model.hidden_size=32", "model.num_hidden_layers=1", "model.num_attention_heads=2", "model.num_key_value_heads=1",
    "model.vocab_size=400", "stages.base.max_steps=2", "stages.base.batch_tokens=512",
    *(f"stages.{name}.max_steps=1" for name in NAMES[1:]), "stages.preference.batch_size=2",
]  # fmt: skip


@pytest.fixture
def small(monkeypatch):
    write = world.write
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    monkeypatch.setattr(world, "write", lambda folder, seed, pairs: write(folder, seed, 40, 30, pairs, 12))
    monkeypatch.setattr(show, "parse_recipe", lambda text, path, given: parse_recipe(text, path, [*given, *SMALL]))
    for module in (show, own_pairs):
        monkeypatch.setattr(module, "MOST_TOKENS", 5)
    monkeypatch.setattr(own_pairs, "QUESTIONS", 8)
    monkeypatch.setattr(own_pairs, "STORIES", 12)
    yield
    torch.set_num_threads(threads)


def test_the_demo(small, tmp_path, capsys):
    out = tmp_path / "demo"
    summary = show.run_demo(out, seed=3)
    said = capsys.readouterr().out
    assert [s["name"] for s in summary["stages"]] == NAMES
    assert [s["from"] for s in summary["stages"]] == [None, "base", "base", "base", "sft_lora"]
    assert list(summary["requests_met"]) == NAMES
    assert all(0 <= share <= 1 for share in summary["requests_met"].values())
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == summary
    for stage in summary["stages"]:
        judged = stage["judged"]
        assert judged["requests met"]["of"] == 12, "all held-out requests"
        assert {"name", "end", "answer", "finished"} <= set(judged)
        assert judged["name"]["of"] + judged["answer"]["of"] == 12
        assert stage["text_bits_per_byte"]["after"] > 0
    table = [line.split() for line in said.splitlines() if line.split()[:1] and line.split()[0] in NAMES]
    assert [line[0] for line in table] == NAMES * 2, "what it cost, and what was met"
    assert f"report: {out / 'report.html'}" in said
    assert f"trivium chat {out / 'preference'}" in said
    assert max(len(line) for line in said.splitlines() if str(tmp_path) not in line) <= 110
    page = (out / "report.html").read_text(encoding="utf-8")
    for piece in ("Answers judged by program", "requests met against steps", "95% intervals"):
        assert piece in page
    record = json.loads((out / "sft_lora" / "trivium.json").read_text(encoding="utf-8"))
    assert record["settings"]["seed"] == 3
    records = [json.loads((out / name / "trivium.json").read_text(encoding="utf-8")) for name in NAMES[1:4]]
    assert len({json.dumps(r["data"]["sha256"]) for r in records}) == 1, "fine-tuned three ways on the same rows"


def test_the_demos_second_run_trains_nothing(small, tmp_path, capsys):
    first = show.run_demo(tmp_path / "demo", seed=3)
    assert "20 preference pairs from sft_lora's own answers" in capsys.readouterr().err
    pairs = (tmp_path / "demo" / "data" / "pairs.jsonl").read_bytes()
    assert show.run_demo(tmp_path / "demo", seed=3) == first
    said = capsys.readouterr().err
    assert said.count("not run again") == 2 * len(NAMES) - 1
    assert "own answers" not in said
    assert "measured" not in said
    assert (tmp_path / "demo" / "data" / "pairs.jsonl").read_bytes() == pairs


def test_the_judge_counts_what_the_checker_says():
    rows = list(world.held_out_requests(40, 0))

    class Parrot:
        """Answers with the row's own answer, the first three with nothing."""

        def answers(self, conversations, most):
            found = {json.dumps(r["messages"][:-1]): r["messages"][-1]["content"] for r in rows}
            return ["" if n < 3 else found[json.dumps(list(c))] for n, c in enumerate(conversations)]

    judge = show.judge_of(rows)
    verdicts = judge(Parrot(), None)
    assert verdicts["requests met"] == (37, 40)
    assert verdicts["finished"] == (37, 40)
    assert verdicts["unrepeated"] == (40, 40)
    stories = sum(r["request"]["task"] == "story" for r in rows)
    assert verdicts["name"][1] == verdicts["end"][1] == stories
    assert verdicts["answer"][1] == 40 - stories
    assert judge(Parrot(), 10)["requests met"] == (7, 10)
    assert all(of <= 1 for _, of in judge(Parrot(), 1).values())
