"""What does not fit is told what it is, what it lacks, what to write and which mapping would help."""

from __future__ import annotations

import re
from typing import Any

import pytest

from trivium.data.formats import RowError, mapped, parse
from trivium.data.misfit import named, shown

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
OTHER = {"role": "assistant", "content": "Go away"}


def reason(row: dict[str, Any], kind: Any) -> str:
    with pytest.raises(RowError) as caught:
        parse(row, kind)
    assert len(str(caught.value)) <= 400
    return str(caught.value)


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({}, "text", 'no fields; write {"text": "Once upon a time ..."}'),
        ({"messages": None}, "conversation", 'no fields; write {"messages": '),
        ({"messages": [USER, ANSWER]}, "text", "a conversation .*'messages'.* SFT stage takes; the pretraining stage"),
        ({"messages": [USER, ANSWER]}, "pair", 'SFT stage takes; .*"chosen"'),
        (
            {"messages": [USER, ANSWER]},
            "rating",
            r'SFT stage takes; the preference \(loss: kto\) stage takes rows like {.*"label": true}',
        ),
        ({"text": "x"}, "conversation", "plain text .* pretraining stage takes; the SFT stage takes rows like"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "conversation", "preference pair .* preference stage takes"),
        ({"prompt": "a", "answers": ["b"], "scores": [1]}, "conversation", "preference pair .* preference stage takes"),
        (
            {"prompt": "a", "completion": "b", "label": 1},
            "pair",
            r"a rating .* the preference \(loss: kto\) stage takes; the pref",
        ),
        ({"prompt": "a"}, "conversation", "a prompt without an answer .* for sampling, which no stage does"),
        ({"messages": [USER]}, "pair", "a prompt without an answer .* for sampling, which no stage does"),
        ({"mesages": []}, "conversation", "fields 'mesages' fit no conversation format; nearest lacks 'messages'"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "pair", "nearest lacks 'chosen': write"),
        ({"prompt": "a", "responses": ["b", "c"]}, "pair", "nearest lacks 'scores': write"),
        ({"contents": "x"}, "text", "nearest lacks 'text'"),
        ({"a": 1}, "prompt", "nearest lacks 'prompt'"),
    ],
)
def test_what_is_said(row: dict[str, Any], kind: Any, words: str) -> None:
    assert re.search(words.replace("{", r"\{"), reason(row, kind))


@pytest.mark.parametrize(
    ("row", "kind", "fields"),
    [
        ({"question_text": "a", "reply": "b"}, "conversation", {"prompt": "question_text", "completion": "reply"}),
        ({"prompt": "a", "reply": "b"}, "conversation", {"completion": "reply"}),
        ({"reply": "b", "question_text": "a"}, "conversation", {"prompt": "question_text", "completion": "reply"}),
        ({"ask": "a", "meta": {"reply": "b"}}, "conversation", {"prompt": "ask", "completion": "meta.reply"}),
        ({"id": "7", "col_1": "a", "col_2": "b"}, "conversation", {"prompt": "col_1", "completion": "col_2"}),
        ({"mesages": [USER, ANSWER]}, "conversation", {"messages": "mesages"}),
        ({"data": {"messages": [USER, ANSWER]}, "n": 3}, "conversation", {"messages": "data.messages"}),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "pair", {"chosen": "choosen"}),
        ({"query": "a", "good": "b", "bad": "c"}, "pair", {"chosen": "good", "rejected": "bad"}),
        ({"prompt": "a", "candidate_answers": ["b", "c"], "scores": [1, 2]}, "pair", {"answers": "candidate_answers"}),
        ({"story": "a", "title": "b"}, "text", {"text": "story"}),
        ({"raw": "a", "year": 1900}, "text", {"text": "raw"}),
    ],
)
def test_the_mapping_that_is_advised_would_do(row: dict[str, Any], kind: Any, fields: dict[str, str]) -> None:
    said = reason(row, kind)
    assert f", or fields: {{{', '.join(f'{o}: {t}' for o, t in fields.items())}}}; the row begins" in said
    assert parse(mapped(row, fields), kind)


def test_no_mapping_where_none_suggests_itself() -> None:
    for row in ({"a": 1, "b": 2}, {"x": "a", "y": "b", "z": "c"}, {"prompt": "a", "n" * 50: "b"}):
        assert "fields: {" not in reason(row, "conversation")
    assert 'fields: {prompt: "col 1", completion: "col: 2"};' in reason({"col 1": "a", "col: 2": "b"}, "conversation")


def test_the_row_is_shown_shortened_and_on_one_line() -> None:
    said = reason({"a\nb": "x\u2028" * 10**6, "n": 10**5000, "deep": [[[[[[1]]]]]] * 9, "more": float("inf")}, "text")
    assert said.splitlines() == [said]
    assert 'the row begins {"a\\nb": "x x x' in said
    long = {f"field{i}" * 5: "x" * 100 for i in range(300)}
    assert "'field0field0field0field0field0', " in reason(long, "pair")


def test_named_and_shown() -> None:
    assert named(["a", "b"]) == "'a', 'b'"
    assert named(["a" * 60, "b"], room=10) == f"'{'a' * 40}', ..."
    assert shown({"a": [1, 2, 3, 4], "b": {1, 2}}) == '{"a": [1, 2, 3], "b": "a set"}'
    assert len(shown(["x" * 39] * 3)) == 60
    assert shown([[[[[5]]]]]) == '[[[["..."]]]]'


# --- mapped


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"prompt": "q", "completion": "m.r"}, {"id": 1, "a.b": 2, "prompt": "Q", "completion": "R"}),
        ({"prompt": "m.n.p"}, {"q": "Q", "id": 1, "a.b": 2, "prompt": 5}),
        ({"text": "a.b"}, {"q": "Q", "id": 1, "text": 2, "m": {"r": "R", "n": {"p": 5}}, "messages": [1]}),
        ({"a": "q", "b": "q"}, {"id": 1, "a.b": 2, "a": "Q", "b": "Q", "m": {"r": "R", "n": {"p": 5}},
                                "messages": [1]}),
        ({"chosen": "q", "rejected": "id"}, {"a.b": 2, "chosen": "Q", "rejected": 1, "m": {"r": "R", "n": {"p": 5}},
                                             "messages": [1]}),
    ],
)  # fmt: skip
def test_mapped(fields: dict[str, str], wanted: dict[str, Any]) -> None:
    row = {"q": "Q", "id": 1, "a.b": 2, "m": {"r": "R", "n": {"p": 5}}, "messages": [1]}
    before = repr(row)
    assert mapped(row, fields) == wanted
    assert repr(row) == before


def test_what_is_mapped_is_what_is_meant() -> None:
    row = {"messages": [USER, OTHER], "q": "Hi", "a": "Hello", "class": 1, "label": 1}
    fields = {"prompt": "q", "completion": "a", "category": "label"}
    assert parse(mapped(row, fields), "conversation").messages == [USER, ANSWER]  # type: ignore[union-attr]
    assert parse(mapped({"messages": "x", "chat": [USER, ANSWER]}, {"messages": "chat"}), "conversation")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (
            {"prompt": "questoin"},
            "no field 'questoin' to take 'prompt' from; there are 'question', 'meta', 'meta.reply'",
        ),
        ({"prompt": "questoin"}, "nearest 'question'"),
        ({"completion": "meta.repy"}, "no field 'meta.repy' to take 'completion' from; .*; nearest 'meta.reply'"),
        ({"completion": "meta.reply.text"}, "no field 'meta.reply.text'"),
        ({"completion": "zzz"}, "'meta.reply'$"),
    ],
)
def test_a_mapped_field_that_is_not_there(fields: dict[str, str], words: str) -> None:
    with pytest.raises(RowError, match=words):
        mapped({"question": "Q", "meta": {"reply": "R"}}, fields)
