"""Formats are told by their fields: a good row of each becomes the same thing, a bad one a reason."""

from __future__ import annotations

import copy
import gzip
import json
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.data.formats import (
    FORMATS,
    Conversation,
    Format,
    Pair,
    Prompt,
    Rating,
    RowError,
    Scored,
    Text,
    format_of,
    parse,
)

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
OTHER = {"role": "assistant", "content": "Go away"}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}
HH = "\n\nHuman: Hi\n\nAssistant:"
SHARED = Path(__file__).parents[3] / "shared" / "data"


def parsed_of(row: dict[str, Any], kind: Any) -> Any:
    """Parsed, with the row left as it was."""
    before = copy.deepcopy(row)
    parsed = parse(row, kind)
    assert row == before
    return parsed


# --- good rows


@pytest.mark.parametrize("known", FORMATS, ids=lambda f: f.name)
def test_every_example_is_of_its_format(known: Format) -> None:
    row = dict(known.example)
    assert format_of(row) == known
    assert parse(row, known.kind)
    assert len({f.name for f in FORMATS}) == len(FORMATS)


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"messages": [USER, ANSWER], "prompt": "x", "answer": "y"}, "messages"),
        ({"messages": json.dumps([USER, ANSWER])}, "messages"),
        ({"messages": 2, "prompt": "Hi", "completion": "Hello"}, "prompt and completion"),
        ({"messages": [], "prompt": "Hi", "completion": "Hello"}, "prompt and completion"),
        ({"conversations": [USER, ANSWER]}, "messages"),
        ({"conversation": [USER, ANSWER]}, "messages"),
        ({"dialog": [HUMAN, GPT]}, "ShareGPT"),
        ({"conversations": json.dumps([HUMAN, GPT])}, "ShareGPT"),
        ({"prompt": "Hi", "completion": "Hello"}, "prompt and completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt and completion"),
        ({"prompt": [USER], "completion": "Hello", "label": "greeting"}, "prompt and completion"),
        ({"prompt": json.dumps([USER]), "completion": json.dumps([ANSWER])}, "prompt and completion"),
        ({"prompt": "Hi", "response": "Hello", "label": 3}, "prompt and completion"),
        ({"question": "Hi", "answer": "Hello"}, "question and answer"),
        ({"Question": "Hi", "ANSWER ": "Hello"}, "question and answer"),
        ({"query": "Hi", "response": "Hello"}, "question and answer"),
        ({"problem": "Hi", "solution": "Hello", "answer": "5"}, "question and answer"),
        ({"inputs": "Hi", "targets": "Hello"}, "question and answer"),
        ({"input": "Hi", "output": "Hello"}, "question and answer"),
        ({"conversations": [HUMAN, GPT]}, "ShareGPT"),
        ({"instruction": "Hi", "input": "", "output": "Hello", "text": "the two as one text"}, "Alpaca"),
        ({"instruction": "Hi", "context": None, "response": "Hello", "category": "x"}, "Alpaca"),
        ({"instruction": "Hi", "output": "Hello", "history": [], "system": ""}, "Alpaca"),
        ({"instruction": "Hi", "output": "Hello", "history": "of Rome"}, "Alpaca"),
        ({"prompt": "Hi", "completion": "Hello", "system": float("nan"), "score": 0.5}, "prompt and completion"),
        ({"messages": np.array([USER, ANSWER], object), "system": np.float64("nan")}, "messages"),
    ],
)
def test_conversations(row: dict[str, Any], name: str) -> None:
    assert parse(row, "conversation") == Conversation([USER, ANSWER])
    assert format_of(row) == Format(name, "conversation")


def test_system_input_history_and_tools() -> None:
    row = {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief"}
    assert parsed_of(row, "conversation").messages[:2] == [SYSTEM, {"role": "user", "content": "Add\n\n1 and 2"}]
    row = {"instruction": "And 2?", "output": "3", "history": [["Hi", "Hello"]], "system": "Be brief"}
    assert parsed_of(row, "conversation").messages[:3] == [SYSTEM, USER, ANSWER]
    spelled = {**row, "history": json.dumps(row["history"])}
    assert parsed_of(spelled, "conversation") == parsed_of(row, "conversation")
    assert parsed_of({**row, "history": [USER, ANSWER]}, "conversation") == parsed_of(row, "conversation")
    tools = [{"type": "function", "function": {"name": "f"}}]
    for offered in (
        {"tools": tools}, {"tools": json.dumps(tools)}, {"functions": [{"name": "f"}]}, {"functions": '[{"name": "f"}]'}
    ):  # fmt: skip
        assert parsed_of({"messages": [USER, ANSWER], **offered}, "conversation").tools == tools
    for offered in ({"tools": ""}, {"tools": []}, {"functions": "sin"}, {"functions": ["sin"]}):
        assert parsed_of({"messages": [USER, ANSWER], **offered}, "conversation").tools is None


@pytest.mark.parametrize(
    ("row", "name"),
    [
        ({"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}, "preference pairs"),
        ({"prompt": [USER], "chosen": ANSWER, "rejected": [OTHER]}, "preference pairs"),
        ({"question": "Hi", "chosen": "Hello", "rejected": "Go away"}, "preference pairs"),
        ({"question": "Hi", "response_j": "Hello", "response_k": "Go away"}, "preference pairs"),
        ({"instruction": "Hi", "chosen_response": "Hello", "rejected_response": "Go away"}, "preference pairs"),
        ({"input": "Hi", "response_chosen": "Hello", "response_rejected": "Go away"}, "preference pairs"),
        ({"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "Go away"}},
         "preference pairs"),
        ({"input": {"messages": [USER]}, "preferred_output": [ANSWER], "non_preferred_output": [OTHER]},
         "preference pairs"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score": 1}, "preference pairs"),
        ({"prompt": "", "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}, "preference pairs"),
        ({"chosen": [USER, ANSWER], "rejected": [{**USER, "score": 4}, OTHER]},
         "preference pairs with an implicit prompt"),
        ({"chosen": json.dumps([USER, ANSWER]), "rejected": json.dumps([USER, OTHER])},
         "preference pairs with an implicit prompt"),
        ({"chosen": f"{HH} Hello", "rejected": f"{HH} Go away"}, "HH-RLHF text"),
        ({"chosen": f"{HH} Hello".strip(), "rejected": f"{HH} Go away".strip()}, "HH-RLHF text"),
        ({"prompt": HH, "chosen": f"{HH} Hello", "rejected": f"{HH} Go away"}, "HH-RLHF text"),
        ({"prompt": HH, "chosen": " Hello", "rejected": " Go away"}, "HH-RLHF text"),
    ],
)  # fmt: skip
def test_pairs(row: dict[str, Any], name: str) -> None:
    assert parsed_of(row, "pair") == Pair([USER], [ANSWER], [OTHER])
    assert format_of(row) == Format(name, "pair")


def test_whole_conversations_are_cut_where_they_part() -> None:
    more = {"role": "user", "content": "And now?"}
    good, bad = [USER, ANSWER, more, ANSWER], [USER, ANSWER, more, OTHER]
    assert parse({"chosen": good, "rejected": bad}, "pair") == Pair(good[:3], [ANSWER], [OTHER])
    # The people's turns differ too: only the row's own prompt says where the answers begin.
    bad = [USER, ANSWER, {"role": "user", "content": "Why?"}, OTHER]
    assert parse({"prompt": "Hi", "chosen": good, "rejected": bad}, "pair") == Pair([USER], good[1:], bad[1:])
    with pytest.raises(RowError, match="part at message 3"):
        parse({"chosen": good, "rejected": bad}, "pair")
    row = {"prompt": [SYSTEM, USER], "chosen": [USER, ANSWER], "rejected": [USER, OTHER]}
    assert parse(row, "pair") == Pair([SYSTEM, USER], [ANSWER], [OTHER])


@pytest.mark.parametrize(
    ("row", "scores"),
    [
        ({"prompt": "Hi", "answers": ["Hello", "Go away"], "scores": [5, 1]}, [5, 1]),
        ({"question": "Hi", "responses": ["Hello", [OTHER]], "ratings": ["5", "1.5"]}, [5, 1.5]),
        ({"messages": [USER], "completions": [ANSWER, OTHER], "rewards": [0.5, -1]}, [0.5, -1]),
        ({"prompt": HH, "answers": ["Hello", "Go away"], "ranks": [1, 2]}, [-1, -2]),
        ({"prompt": HH, "answers": [{"answer": "Hello", "rank": 1}, {"answer": "Go away", "rank": 7}]}, [-1, -7]),
        ({"instruction": "Hi", "completions": [{"response": "Hello", "overall_score": 8, "model": "x"},
                                               {"response": "Go away", "overall_score": 2}]}, [8, 2]),
        ({"prompt": "Hi", "answers": [{**ANSWER, "score": 2}, {**OTHER, "score": 1}]}, [2, 1]),
        ({"prompt": "Hi", "answers": [{"text": "Hello"}, {"content": "Go away"}], "scores": [2, 1]}, [2, 1]),
    ],
)  # fmt: skip
def test_scored_answers(row: dict[str, Any], scores: list[float]) -> None:
    assert parsed_of(row, "pair") == Scored([USER], [[ANSWER], [OTHER]], scores)
    assert format_of(row) == Format("scored answers", "pair")
    assert parse(row, "pair").answers_by_score() == [([ANSWER], 1.0), ([OTHER], -1.0)]  # type: ignore[union-attr]


def answers_of(*texts: str) -> list[list[dict[str, Any]]]:
    return [[{"role": "assistant", "content": t}] for t in texts]


def test_pairs_of_scored_answers() -> None:
    scored = Scored([USER], answers_of("a", "b", "c", "d"), [3, 1, 3, 2])
    a, b, c, d = scored.answers
    assert scored.answers_by_score("best_worst") == [(a, 1), (b, -1)]
    assert scored.answers_by_score("all") == [(a, 3), (c, 3), (d, 2), (b, 1)]
    same = Scored([USER], answers_of("a", "a", "b"), [3, 1, 2], [{"name": "f"}])
    assert same.answers_by_score() == [(same.answers[0], 1), (same.answers[2], -1)]
    with pytest.raises(RowError, match="all answers have the same score"):
        Scored([USER], answers_of("a", "b"), [1, 1]).answers_by_score()
    with pytest.raises(RowError, match="are the same text"):
        Scored([USER], answers_of("a", "a"), [1, 2]).answers_by_score("all")


@given(st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 3)), min_size=2, max_size=6))
@settings(deadline=None)
def test_pairs_prefer_the_higher_score(held: list[tuple[str, int]]) -> None:
    texts, scores = zip(*held, strict=True)
    scored = Scored([USER], answers_of(*texts), list(scores))
    wanted = [(s - z, t, u) for t, s in held for u, z in held if s > z and t != u]
    if not wanted:
        with pytest.raises(RowError):
            scored.answers_by_score("all")
        return
    every = scored.answers_by_score("all")
    assert sorted((a[0]["content"], s) for a, s in every) == sorted(held)
    assert [s for _, s in every] == sorted(scores, reverse=True)
    (best, _), (worst, _) = scored.answers_by_score()
    got = best[0]["content"], worst[0]["content"]
    assert max(wanted)[0] == max(g for g, t, u in wanted if (t, u) == got)


def test_pairs_and_scored_answers_are_ratings_too() -> None:
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    assert parse(pair, "rating") == parse(pair, "pair")
    assert isinstance(parse({"prompt": "Hi", "answers": ["a", "b"], "scores": [1, 2]}, "rating"), Scored)
    assert parse({**pair, "Prompt": 1}, "rating") == parse(pair, "pair")
    both = {"prompt": "Hi", "completion": "a", "label": False, "chosen": "x", "rejected": "y"}
    assert parse(both, "rating") == Rating([USER], answers_of("a")[0], False)


def test_weights_and_margins_of_rows() -> None:
    pair = {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}
    found = parse({**pair, "weight": "0.5", "margin": 2}, "pair")
    assert (found.weight, found.margin) == (0.5, 2.0)  # type: ignore[union-attr]
    plain = parse(pair, "pair")
    assert (plain.weight, plain.margin) == (1.0, 0.0)  # type: ignore[union-attr]
    for wrong, why in (({"weight": "heavy"}, "'weight' is \"heavy\", not a finite number"), ({"weight": 0}, "above 0"),
                       ({"margin": [1]}, "'margin' is")):  # fmt: skip
        with pytest.raises(RowError, match=why):
            parse({**pair, **wrong}, "pair")
    rated = parse({"prompt": "Hi", "completion": "a", "label": True, "weight": 3}, "rating")
    assert rated.weight == 3  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("label", "good"),
    [(True, True), (False, False), (1, True), (0, False), (-1, False), (1.0, True), ("true", True), ("False", False),
     ("+1", True), ("-1", False), ("0", False)],
)  # fmt: skip
def test_ratings(label: Any, good: bool) -> None:
    for row in ({"prompt": "Hi", "completion": "Hello"}, {"prompt": [USER], "completion": [ANSWER]},
                {"messages": [USER, ANSWER]}):  # fmt: skip
        rated = {**row, "label": label}
        assert parsed_of(rated, "rating") == Rating([USER], [ANSWER], good)
        assert format_of(rated) == Format("ratings", "rating")
        with pytest.raises(
            RowError, match=r"a rating .* the preference \(loss: kto\) stage takes; .*leave 'label' out"
        ):
            parse(rated, "conversation")


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi"},
        {"prompt": [USER]},
        {"messages": [USER]},
        {"conversations": json.dumps([HUMAN])},
        {"prompt": HH},
    ],
)
def test_prompts(row: dict[str, Any]) -> None:
    assert parsed_of(row, "prompt") == Prompt([USER])
    assert format_of(row) == Format("prompts", "prompt")


def test_a_row_may_be_several_things() -> None:
    assert parse({"question": "Hi", "answer": "Hello"}, "prompt") == Prompt([USER])
    assert parse({"messages": [USER, ANSWER, USER]}, "prompt") == Prompt([USER, ANSWER, USER])
    assert format_of({"messages": [USER, ANSWER, USER]}) == Format("messages", "conversation")
    assert format_of({"text": "x", "prompt": "Hi"}) == Format("text", "text")
    assert format_of({"text": "x", "messages": [USER, ANSWER]}) == Format("messages", "conversation")
    assert parse({"text": "x", "messages": [USER, ANSWER]}, "text") == Text("x")


def test_text() -> None:
    assert parsed_of({"text": " a ", "meta": 1}, "text") == Text(" a ")
    assert parsed_of({"text": "a", "label": 3}, "text") == Text("a")
    for row in ({"content": "a", "title": "x"}, {"document": "a"}, {"body": "a", "date": "2020"}, {"Text": "a"}):
        assert parsed_of(row, "text") == Text("a")
        assert format_of(row) == Format("text", "text")
    for row in ({"content": "a", "role": "user"}, {"content": "a", "body": "b"}, {"body": "a", "answer": "b"}):
        with pytest.raises(RowError, match="lacks 'text'"):
            parse(row, "text")


def test_rows_of_no_format() -> None:
    assert format_of({}) is None
    assert format_of({"a": 1, "b": None}) is None
    assert format_of({"prompt": None, "text": float("nan")}) is None


# --- bad rows


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"text": 3}, "text", "a number, not a string"),
        ({"text": "  \n"}, "text", "empty text"),
        ({"text": ""}, "text", "empty text"),
        ({"messages": "Hi"}, "conversation", "'messages' is a string, not a list"),
        ({"messages": "[{'role': 'user'}]"}, "conversation", "a string, not a list of messages, and not JSON for it"),
        ({"messages": []}, "conversation", "'messages' is empty"),
        ({"messages": {"role": "user"}}, "conversation", "'messages' is an object, not a list"),
        ({"messages": [USER]}, "conversation", "no assistant turn; prompts alone are for sampling"),
        ({"messages": [SYSTEM]}, "conversation", "only a system message"),
        ({"messages": [ANSWER, USER]}, "conversation", "begins with the assistant"),
        ({"prompt": "", "completion": "x"}, "conversation", "empty 'prompt'"),
        ({"prompt": "x", "completion": ""}, "conversation", "empty answer: 'completion'"),
        ({"prompt": "x", "completion": 5}, "conversation", "'completion' is a number, not a string or a list"),
        ({"prompt": "x", "response": "a", "answer": "b"}, "conversation", "could each be the answer"),
        ({"question": "x", "instruction": "a", "answer": "b"}, "conversation", "could each be the prompt"),
        ({"prompt": "x", "completion": "y", "system": 3}, "conversation", "'system' is a number"),
        ({"prompt": "x", "completion": "y", "tools": {}, "history": 3}, "conversation", "'history' is 3, not a list"),
        ({"prompt": "x", "completion": "y", "history": [["a"]]}, "conversation", "not a list of .question, answer"),
        ({"prompt": "x", "completion": "y", "history": [["a", ""]]}, "conversation", "empty answer: 'history'"),
        ({"prompt": "x", "completion": "y", "tools": {"a": 1}}, "conversation", "'tools' is an object, not a list"),
        ({"prompt": "x", "completion": "y", "tools": "hammer"}, "conversation", "'tools' is a string, not a list"),
        ({"instruction": "x", "output": "y", "input": ["z"]}, "conversation", "'input' is a list, not a string"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pair", "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": ANSWER, "rejected": {**ANSWER, "score": 1}}, "pair", "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "pair", "empty answer: 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "pair", "without a prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, "pair", "without a common prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER]}, "pair", "empty answer: 'chosen'"),
        ({"chosen": [USER, ANSWER, USER], "rejected": [USER, ANSWER]}, "pair", "empty answer: 'rejected'"),
        ({"chosen": [USER, SYSTEM], "rejected": [USER, OTHER]}, "pair", "part at message 2"),
        ({"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": "c"}, "pair", "'chosen' is a whole conversation"),
        ({"prompt": "Hi", "chosen": "c", "rejected": [USER, ANSWER]}, "pair", "'rejected' is a whole conversation"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "pair", "'prompt' is a number"),
        ({"prompt": [SYSTEM], "chosen": "b", "rejected": "c"}, "pair", "'prompt' has only a system message"),
        ({"messages": [USER, ANSWER], "chosen": "b", "rejected": "c"}, "pair", "'messages' ends with the assistant's"),
        ({"prompt": "x", "answers": ["a"], "scores": [1]}, "pair", "only one answer in 'answers'"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1]}, "pair", "2 answers in 'answers', but 1 scores"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, None]}, "pair", "score of answer 2 .* is missing"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, True]}, "pair", "is true, not a finite number"),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, "N/A"]}, "pair", 'is "N/A", not a finite number'),
        ({"prompt": "x", "answers": ["a", "b"], "scores": [1, float("nan")]}, "pair", "NaN, not a finite"),
        (
            {"prompt": "x", "answers": [{"text": "a", "score": 1}, {"text": "b"}]},
            "pair",
            "score of answer 2 .* missing",
        ),
        ({"prompt": "x", "answers": ["a", ""], "scores": [1, 2]}, "pair", "empty answer: 'answer 2 of 'answers''"),
        ({"messages": [USER], "label": True}, "rating", "no assistant's message follows the last user message"),
        ({"messages": [ANSWER], "label": True}, "rating", "no user message"),
        ({"prompt": "x", "completion": " ", "label": True}, "rating", "empty answer"),
        ({"prompt": " "}, "prompt", "empty 'prompt'"),
        ({"messages": [USER, ANSWER]}, "prompt", "ends with the assistant's message"),
        ({"messages": [SYSTEM]}, "prompt", "only a system message"),
    ],
)
def test_reasons(row: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        parsed_of(row, kind)


# --- any rows

TURNS = st.lists(
    st.builds(lambda r, c: {"role": r, "content": c}, st.sampled_from(["user", "assistant"]), st.sampled_from("abc")),
    max_size=3,
)


@given(common=TURNS, good=TURNS, bad=TURNS)
@settings(deadline=None)
def test_an_implicit_prompt_is_the_common_beginning(common: Any, good: Any, bad: Any) -> None:
    good, bad = [USER, *common, *good], [USER, *common, *bad]
    try:
        pair = parse({"chosen": good, "rejected": bad}, "pair")
    except RowError:
        return
    assert isinstance(pair, Pair)
    assert (pair.prompt + pair.chosen, pair.prompt + pair.rejected) == (good, bad)
    assert len(pair.prompt) >= 1 + len(common)
    assert pair.chosen[0] != pair.rejected[0]
    assert pair.chosen[0]["role"] == pair.rejected[0]["role"] == "assistant"


IN_MESSAGES = ["role", "content", "from", "value", "type", "text", "weight", "train", "tool_calls", "function_call",
               "function", "name", "arguments", "reasoning", "score", "response", "messages", "tools"]  # fmt: skip
WORDS = st.sampled_from(
    ["user", "assistant", "function_call", "Hi", "true", "[]", "[{}]", "[[[", '[{"role": "user", "content": "Hi"}]',
     '{"name": "f"}', "\n\nHuman: Hi\n\nAssistant: a", "\u2028\x1c", '["\\ud83d"]', "\ud83d"]
)  # fmt: skip
FIELDS = ["text", "content", "messages", "conversations", "dialog", "prompt", "instruction", "input", "completion",
          "answer", "chosen", "rejected", "response_j", "response_k", "answers", "scores", "ranks", "label", "system",
          "tools", "functions", "history", "Prompt", "other", "a\nb"]  # fmt: skip
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(IN_MESSAGES), inner, max_size=3),
    max_leaves=8,
)
LIKELY = st.lists(st.fixed_dictionaries({"role": WORDS, "content": JUNK}, optional={"tool_calls": JUNK}), max_size=3)
KINDS: dict[str, tuple[type, ...]] = {
    "text": (Text,), "conversation": (Conversation,), "pair": (Pair, Scored), "rating": (Rating, Pair, Scored),
    "prompt": (Prompt,),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@given(row=st.dictionaries(st.sampled_from(FIELDS), JUNK | WORDS | LIKELY, max_size=6))
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_parsed_or_refused_with_a_reason(kind: Any, row: dict[str, Any]) -> None:
    before = repr(row)
    reason = "none"
    try:
        parsed = parse(row, kind)
        assert isinstance(parsed, KINDS[kind])
        assert format_of(row) is not None
    except RowError as error:
        reason = str(error)
    assert len(reason.splitlines()) == 1
    assert len(reason) <= 450
    reason.encode("utf-8")
    assert repr(row) == before


@pytest.mark.parametrize("folder", ["tinystories", "pretrain", "sft", "pref"])
def test_real_rows_are_what_they_seem(folder: str) -> None:
    files = sorted((SHARED / folder).glob("*.jsonl.gz"))
    if not files:
        pytest.skip(f"no data in {SHARED / folder}")
    for file in files:
        wanted = "pair" if "pref" in file.parts[-1] or folder == "pref" else "text" if folder == "pretrain" else None
        with gzip.open(file, "rt", encoding="utf-8") as stream:
            for line in islice(stream, 1000):
                row = json.loads(line)
                known = format_of(row)
                assert known is not None
                assert wanted in (None, known.kind)
                parse(row, known.kind)
