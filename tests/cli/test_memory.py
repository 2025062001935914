"""``memory`` in a stage: passes and recomputation that keep to it, with the same result; and what cannot be."""

from __future__ import annotations

import json

import pytest
from tests.cli.conftest import LORA, SHORT

CHAT = {"name": "chat", "stage": "sft", "data": "chats.jsonl", "method": LORA, **SHORT}


def stages(data, **more):
    text = {"name": "base", "stage": "pretrain", "data": str(data / "text.jsonl"), **SHORT}
    return [text, {**CHAT, "from": "base", "data": str(data / "chats.jsonl"), **more}]


def losses(out) -> list[float]:
    lines = (out / "chat" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [row["loss"] for row in map(json.loads, lines) if "loss" in row]


def test_it_only_arranges_the_work(data, tmp_path, trivium, write_recipe):
    plain = trivium("run", write_recipe(tmp_path, stages(data), prompts=[]), "--out", tmp_path / "plain")
    assert plain.code == 0, plain.err
    ways = {"700MB": {"memory": "700MB"}, "one layer": {"recompute": 1}, "short": {"micro_batch_tokens": 64}}
    for amount, more in ways.items():
        recipe = write_recipe(tmp_path, stages(data, **more), prompts=[])
        done = trivium("run", recipe, "--out", tmp_path / amount)
        assert done.code == 0, done.err
        assert ("of 700MB at the peak" in done.err) == ("memory" in more)
        assert losses(tmp_path / amount) == pytest.approx(losses(tmp_path / "plain"), abs=1e-4)
        records = [json.loads((tmp_path / run / "chat" / "trivium.json").read_text()) for run in ("plain", amount)]
        assert records[0]["identity"] == records[1]["identity"], "another arrangement is no other stage"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ({"memory": "100MB"}, "stages.chat.memory: 100MB is too little: the longest row, of "),
        ({"memory": "lots"}, "'lots' is no amount of memory: write it as 2GB or 900MB"),
        ({"memory": "2GB", "recompute": "layers"}, "memory and recompute contradict each other"),
        ({"recompute": -1}, "recompute"),
    ],
)
def test_what_cannot_be_is_said(more, said, data, tmp_path, trivium, write_recipe):
    done = trivium("run", write_recipe(tmp_path, stages(data, **more), prompts=[]), "--out", tmp_path / "out")
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_stage_takes_it_over_and_its_own_word_counts(data, tmp_path, trivium, write_recipe):
    first, chat = stages(data)
    more = {**chat, "name": "more", "from": "chat", "recompute": "layers"}
    recipe = write_recipe(tmp_path, [{**first, "memory": "2GB"}, chat, more], prompts=[])
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.err
    assert done.err.count("  memory: ") == 2, "base says it, chat takes it over, more says how itself"
