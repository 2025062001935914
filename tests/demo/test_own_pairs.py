"""Pairs out of a model's own answers: the first that keeps its request, the first that does not."""

from __future__ import annotations

import json

import pytest

from trivium.demo import own_pairs, world
from trivium.demo.checker import check


@pytest.fixture
def answering(monkeypatch):
    """``answering(samples)``: a model whose answers to every request are ``samples``, "right" being the right one."""
    monkeypatch.setattr(own_pairs, "QUESTIONS", 5)
    monkeypatch.setattr(own_pairs, "STORIES", 3)
    right = {json.dumps(r["messages"][:-1]): r["messages"][-1]["content"] for r in own_pairs._prompts(0)}

    def answer(samples: list[str]) -> None:
        class Model:
            def answers(self, conversations, most, temperature, seed, count):
                assert (temperature, count) == (1.0, own_pairs.SAMPLES)
                return [right[json.dumps(c)] if s == "right" else s for c in conversations for s in samples]

        monkeypatch.setattr("trivium.talk.Talker.open", lambda folder, device: Model())

    return answer


def test_a_kept_and_a_broken_answer_make_a_pair(answering, tmp_path):
    answering(["no", "right", "never", "right"])
    rows = own_pairs.own_pairs(tmp_path, 0)
    prompts = list(own_pairs._prompts(0))
    assert len(rows) == len(prompts) == 8
    for row, asked in zip(rows, prompts, strict=True):
        assert row == {"prompt": asked["messages"][:-1], "chosen": asked["messages"][-1]["content"], "rejected": "no"}
        assert all(check(asked["request"], row["chosen"]).values())


def test_nothing_kept_takes_the_worlds_answer_and_nothing_broken_is_no_pair(answering, tmp_path):
    answering(["no", "nor", "never", "neither"])
    assert {row["chosen"] for row in own_pairs.own_pairs(tmp_path, 0)} == {
        asked["messages"][-1]["content"] for asked in own_pairs._prompts(0)
    }
    answering(["right"] * 4)
    assert own_pairs.own_pairs(tmp_path, 0) == []


def test_prompts_are_neither_trained_on_nor_held_out():
    asked = {json.dumps(row["messages"]) for row in own_pairs._prompts(0)}
    assert len(asked) == own_pairs.QUESTIONS + own_pairs.STORIES
    for rows in (world.requests(4000, 0), world.held_out_requests(200, 0)):
        assert asked.isdisjoint(json.dumps(row["messages"]) for row in rows)
    assert not any(world.is_held_out(row["request"]) for row in own_pairs._prompts(0))
