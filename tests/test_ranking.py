"""Rows ranked by a reward model: their answers, answers drawn for them, ties, and rows that cannot be ranked."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from trivium.data.formats import parse
from trivium.data.rows import Mix
from trivium.data.tokenizer import train_tokenizer
from trivium.errors import DataError, UserError
from trivium.evaluate.score import rewards
from trivium.judging import best_answer, sampler
from trivium.model.language_model import LanguageModel
from trivium.model.load import wrap
from trivium.model.new import new_model
from trivium.model.reward import as_reward_model
from trivium.ranking import TOGETHER, Ranked, Tally, Unranked, prompts_of, rank, scores, write_ranked
from trivium.talk import Talker

SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
ASK = [{"role": "user", "content": "Who won?"}]


@pytest.fixture(scope="module")
def base() -> LanguageModel:
    tokenizer = train_tokenizer(["A turtle and a hare. The hare ran. Who won? It said no."], 300)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "vocab_size": len(tokenizer)}
    config = AutoConfig.for_model("llama", **SIZES, **ids, max_position_embeddings=96, initializer_range=0.3)
    return wrap(new_model(config, seed=0).eval(), tokenizer, "float32", torch.float32)


@pytest.fixture(scope="module")
def reward(base) -> LanguageModel:
    return as_reward_model(base, seed=0)


@pytest.fixture
def rows(tmp_path) -> Callable[..., list[Mix]]:
    """``rows({...}, "broken", ...)``: a file of them."""

    def write(*values: Any) -> list[Mix]:
        path = tmp_path / "rows.jsonl"
        text = "".join((v if isinstance(v, str) else json.dumps(v)) + "\n" for v in values)
        path.write_text(text, encoding="utf-8")
        return [Mix(path)]

    return write


def of(reward, answers, prompt=ASK, **more):
    return rewards(reward, [[*prompt, {"role": "assistant", "content": a}] for a in answers])


LISTS = {
    "unscored": {"prompt": "Who won?", "answers": ["the hare", "no", "It said no."]},
    "of messages": {"messages": ASK, "responses": [[{"role": "assistant", "content": a}] for a in ("the hare", "no")]},
    "scored": {"prompt": "Who won?", "answers": ["the hare", "no", "It said no."], "scores": [1, 2, 3]},
    "scored inside": {"prompt": "Who won?",
                      "completions": [{"text": "no", "score": 1}, {"text": "the hare", "score": 2}]},
    "a pair": {"prompt": "Who won?", "chosen": "the hare", "rejected": "no"},
    "whole": {"chosen": [*ASK, {"role": "assistant", "content": "the hare"}],
              "rejected": [*ASK, {"role": "assistant", "content": "no"}]},
}  # fmt: skip
BEFORE = {"scored": [1, 2, 3], "scored inside": [1, 2], "a pair": [1, 0], "whole": [1, 0]}


@pytest.mark.parametrize("kind", LISTS)
def test_every_kind_of_answers_is_ranked(kind, rows, reward):
    row = LISTS[kind]
    (found,) = rank(rows(row), reward)
    assert isinstance(found, Ranked)
    answers = {"unscored": 3, "scored": 3}.get(kind, 2)
    said = ["the hare", "no", "It said no."][:answers]
    said = said[::-1] if kind == "scored inside" else said
    expected = of(reward, said)
    assert found.in_order == pytest.approx(expected, abs=1e-6)
    assert found.rewards == sorted(found.in_order, reverse=True)
    assert found.answers == sorted(said, key=dict(zip(said, expected, strict=True)).__getitem__, reverse=True)
    assert (found.prompt, found.origin.rsplit(":", 1)[1]) == (ASK, "1")
    pair, every = found.pair(), found.every()
    assert pair == {"prompt": ASK, "chosen": found.answers[0], "rejected": found.answers[-1],
                    "scores": [found.rewards[0], found.rewards[-1]]}  # fmt: skip
    assert every == {"prompt": ASK, "answers": found.answers, "scores": found.rewards}
    for written in (pair, every):
        parse(json.loads(json.dumps(written)), "pair")  # a preference stage takes it
    before = BEFORE.get(kind)
    if before is None:
        assert found.agrees is None
    else:
        of_best, of_worst = (before[said.index(found.answers[n])] for n in (0, -1))
        assert found.agrees == (of_best > of_worst)


def test_ties(rows, reward):
    alike = {"prompt": "Who won?", "answers": ["no", "no"]}
    other = {"prompt": "Who won?", "answers": ["no", "no", "the hare"]}
    even = {"prompt": "Who won?", "answers": ["no", "the hare"], "scores": [2, 2]}
    found = [one for one in rank(rows(alike, other, even), reward) if isinstance(one, Ranked)]
    assert [one.pair() is None for one in found] == [True, False, False]
    assert found[0].rewards[0] == found[0].rewards[1]
    assert found[2].agrees is None, "the row said nothing"
    tally = Tally()
    for one in found:
        tally.add(one)
    assert "7 answers of 3 rows have a reward; 1 rows tell no answer from another" in tally.line()


BAD = {
    "one answer": ({"prompt": "x", "answers": ["no"]}, "only one answer"),
    "no answers": ({"prompt": "x", "answers": []}, "answer"),
    "an empty answer": ({"prompt": "x", "answers": ["", "no"]}, "empty answer"),
    "an answer that is a number": ({"prompt": "x", "answers": [3, "no"]}, "is a number"),
    "a list where text belongs": ({"prompt": ["x"], "answers": ["a", "no"]}, "prompt"),
    "a weight of nothing": ({**LISTS["a pair"], "weight": 0}, "weight is 0"),
    "a weight that is text": ({**LISTS["a pair"], "weight": "heavy"}, "'weight' is"),
    "a list of no weight": ({**LISTS["unscored"], "weight": -1}, "weight is -1"),
    "alike": ({"prompt": "x", "chosen": "no", "rejected": "no"}, "are the same"),
    "over-long": ({"prompt": "x " * 200, "answers": ["a", "no"]}, "tokens, and the model reads 96"),
    "plain text": ({"text": "hello"}, "plain text"),
    "a prompt alone": ({"prompt": "x"}, "prompt"),
    "cut off": ('{"prompt": "x", "ans', "not JSON"),
    "a list": ("[1, 2]", "an array"),
    "half a character": ('{"prompt": "\\ud800", "answers": ["a", "no"]}', "half a character"),
    "an unknown role": ({"messages": [{"role": "elder", "content": "x"}], "answers": ["a", "no"]}, "elder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_cannot_be_ranked_says_where_and_why(name, rows, reward):
    row, says = BAD[name]
    first, bad, last = rank(rows(LISTS["unscored"], row, LISTS["a pair"]), reward)
    assert isinstance(bad, Unranked)
    assert bad.origin.endswith("rows.jsonl:2")
    assert says in bad.reason
    assert "\n" not in bad.reason
    assert isinstance(first, Ranked)
    assert isinstance(last, Ranked)
    tally = Tally()
    for one in (first, bad, last):
        tally.add(one)
    assert f"1 rows not used (first {bad.origin}: {bad.reason})" in tally.line()


def test_more_rows_than_one_round_keep_their_order(rows, reward):
    values: list[Any] = []
    for n in range(2 * TOGETHER + 3):
        values.append({"prompt": f"{n}", "answers": ["no", f"{n}", "a hare"]} if n % 5 else "broken")
    found = list(rank(rows(*values), reward))
    assert [one.origin.rsplit(":", 1)[1] for one in found] == [str(n + 1) for n in range(len(values))]
    for n, one in enumerate(found):
        assert isinstance(one, Ranked) == bool(n % 5)
        if isinstance(one, Ranked):
            assert one.prompt[0]["content"] == str(n)
    some = found[TOGETHER + 2]
    assert isinstance(some, Ranked)
    assert some.in_order == pytest.approx(
        of(reward, ["no", some.prompt[0]["content"], "a hare"], some.prompt), abs=1e-5
    )


def test_tools_are_read_and_kept(rows, base):
    """A reward model that was trained on rows with tools reads them, and what is ranked still has them."""
    model = as_reward_model(base, seed=0)
    template = (
        "{% for t in tools or [] %}{{ t }}{% endfor %}"
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    model.tokenizer.chat_template = template
    tools = [{"type": "function", "function": {"name": "run", "parameters": {}}}]
    plain, armed = LISTS["unscored"], {**LISTS["unscored"], "tools": tools}
    one, other = rank(rows(plain, armed), model)
    assert isinstance(one, Ranked)
    assert isinstance(other, Ranked)
    assert one.rewards != other.rewards
    for written in (other.pair(), other.every()):
        assert written is not None
        assert written["tools"] == tools
        assert parse(written, "pair").tools == tools
    assert "tools" not in one.every()
    (alone,) = scores(rows(armed), model, Tally())
    assert alone["rewards"] == pytest.approx(other.in_order)


def drawing(*texts):
    """A sampler that says these for every prompt, and keeps what it was asked."""
    asked = []

    def draw(prompts):
        asked.extend(prompts)
        return [list(texts) if prompt[-1]["content"] != "hush" else "it does not fit" for prompt in prompts]

    draw.asked = asked
    return draw


def test_answers_that_are_drawn(rows, reward):
    kinds = [
        {"prompt": "Who won?"},
        LISTS["a pair"],
        {"messages": [*ASK, {"role": "assistant", "content": "x"}, *ASK]},
        {"messages": [*ASK, {"role": "assistant", "content": "x"}]},
        {"prompt": "Who won?", "completion": "no", "label": True},
        {"prompt": "hush"},
        {"messages": [{"role": "system", "content": "s"}, {"role": "assistant", "content": "x"}]},
        {"text": "no prompt"},
        LISTS["unscored"],
    ]
    draw = drawing("no", "the hare", "", "  ")
    found = list(rank(rows(*kinds), reward, draw))
    assert [len(p) for p in draw.asked] == [1, 1, 3, 1, 1, 1, 1]
    good = [one for one in found if isinstance(one, Ranked)]
    assert len(good) == 6
    for one in good:
        assert sorted(one.answers) == ["no", "the hare"], "an empty answer is none"
        assert one.agrees is None
    bad = {one.origin.rsplit(":", 1)[1]: one.reason for one in found if isinstance(one, Unranked)}
    assert bad["6"] == "it does not fit"
    assert bad["7"] == "no user message asks for an answer"
    assert "plain text" in bad["8"]
    (empty,) = rank(rows({"prompt": "Who won?"}), reward, drawing("", "\n"))
    assert isinstance(empty, Unranked)
    assert "empty" in empty.reason


def test_a_sampler_draws_what_the_model_says(base, monkeypatch):
    monkeypatch.setattr(Talker, "open", lambda *_: Talker.of(base))
    draw = sampler("x", 3, 1.0, 6, seed=5)
    long = [{"role": "user", "content": "turtle " * 200}]
    first, bad, second = draw([ASK, long, ASK])
    assert [len(first), len(second)] == [3, 3]
    assert "the model's context is 96" in bad
    (refused,) = draw([[{"role": "elder", "content": "x"}]])
    assert isinstance(refused, str)
    talker = Talker.of(base)
    assert [*first, *second] == talker.answers([ASK, ASK], 6, 1.0, 5, 3)
    (third,) = draw([ASK])
    assert third == talker.answers([ASK], 6, 1.0, 11, 3), "no answer is drawn with the seed of another"
    again = sampler("x", 3, 1.0, 6, seed=5)
    assert again([ASK, long, ASK]) == [first, bad, second]
    assert sampler("x", 2, 1.0, 3, seed=2**63 - 2)([ASK, ASK])


def test_a_prompt_that_the_template_refuses_is_no_end(rows, base, reward, monkeypatch):
    monkeypatch.setattr(Talker, "open", lambda *_: Talker.of(base))
    refused = [{"role": "elder", "content": "x"}, *ASK]
    found = list(rank(rows({"messages": refused}, {"prompt": "Who won?"}), reward, sampler("x", 2, 1.0, 4, 0)))
    assert isinstance(found[0], Unranked)
    assert isinstance(found[1], Ranked)


def test_best_of_n(base, reward, monkeypatch):
    monkeypatch.setattr("trivium.judging.reward_model", lambda _: reward)
    talker = Talker.of(base)
    drawn = talker.answers([ASK], 6, 1.0, 3, 8)
    found = best_answer(talker, "Who won?", "x", 8, 6, 1.0, 3)
    worth = dict(zip(drawn, of(reward, drawn), strict=True))
    assert found == max(worth, key=worth.__getitem__)


def test_scores_in_the_rows_own_order(rows, reward):
    kinds = [
        LISTS["scored"],
        {"messages": [{"role": "system", "content": "Be kind."}, *ASK, {"role": "assistant", "content": "no"}, *ASK]},
        {"prompt": "Who won?", "completion": "no", "label": False},
        {"prompt": "x"},
        LISTS["a pair"],
        {"messages": [*ASK, {"role": "assistant", "content": "no", "weight": 0}]},
    ]
    tally = Tally()
    found = list(scores(rows(*kinds), reward, tally))
    assert [list(one) for one in found] == [
        ["origin", "rewards"], ["origin", "reward"], ["origin", "reward"], ["origin", "reason"], ["origin", "rewards"],
        ["origin", "reward"],
    ]  # fmt: skip
    assert found[0]["rewards"] == pytest.approx(of(reward, LISTS["scored"]["answers"]), abs=1e-6)
    kind = [{"role": "system", "content": "Be kind."}, *ASK]
    assert found[1]["reward"] == pytest.approx(of(reward, ["no"], kind)[0], abs=1e-6)
    assert found[2]["reward"] == pytest.approx(of(reward, ["no"])[0], abs=1e-6)
    assert found[5]["reward"] == pytest.approx(found[2]["reward"], abs=1e-6)
    assert [one["origin"].rsplit(":", 1)[1] for one in found] == list("123456")
    assert (tally.ranked, tally.answers, tally.bad, tally.compared) == (5, 8, 1, 2)
    json.dumps(found, allow_nan=False)


def test_prompts_each_once(rows):
    other = [{"role": "system", "content": "Be kind."}, *ASK]
    given = rows("broken", LISTS["a pair"], LISTS["unscored"], {"messages": other}, {"prompt": "é😀"}, {"prompt": "x"})
    assert prompts_of(given, 3) == [ASK, other, [{"role": "user", "content": "é😀"}]]
    assert len(prompts_of(given, 99)) == 4


@pytest.mark.parametrize("values", [[], ['{"text": "x"}', "broken"]])
def test_no_prompt_at_all(rows, values):
    with pytest.raises(DataError) as raised:
        prompts_of(rows(*values), 9)
    assert "no prompt" in raised.value.what or "rows.jsonl" in raised.value.what
    if values:
        assert "rows.jsonl:1" in raised.value.what, "the first of them is named"


def test_what_is_written(rows, reward, tmp_path):
    out = tmp_path / "out.jsonl"
    given = rows(LISTS["scored"], "broken", LISTS["a pair"], {"prompt": "Who won?", "answers": ["no", "no"]}, {
        "prompt": "é😀\u2028", "answers": ["نعم", "no"]})  # fmt: skip
    told = write_ranked(given, reward, None, out, every=False)
    lines = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n")[:-1]]
    assert told[0].startswith("3 rows written to ")
    assert "1 rows tell no answer from another; 1 rows not used" in told[1]
    assert [set(line) for line in lines] == [{"prompt", "chosen", "rejected", "scores"}] * 3
    assert lines[-1]["prompt"][0]["content"] == "é😀\u2028"
    again = list(rank([Mix(out)], reward))
    assert [one.rewards for one in again if isinstance(one, Ranked)] == [pytest.approx(x["scores"]) for x in lines]
    assert all(isinstance(one, Ranked) and one.agrees for one in again)
    write_ranked(given, reward, None, out, every=True)
    assert len(out.read_text(encoding="utf-8").split("\n")) == 5
    before = out.read_bytes()
    with pytest.raises(UserError, match="no row could be ranked") as raised:
        write_ranked(rows({"text": "x"}), reward, None, out, every=True)
    assert "rows.jsonl:1" in str(raised.value)
    assert out.read_bytes() == before, "whole or not at all"


def test_fields_of_other_names(reward, tmp_path):
    path: Path = tmp_path / "theirs.jsonl"
    path.write_text(json.dumps({"ask": "Who won?", "good": "the hare", "bad": "no"}) + "\n", encoding="utf-8")
    names = (("chosen", "good"), ("prompt", "ask"), ("rejected", "bad"))
    (found,) = rank([Mix(path, None, names)], reward)
    assert isinstance(found, Ranked)
    assert found.in_order == pytest.approx(of(reward, ["the hare", "no"]), abs=1e-6)
