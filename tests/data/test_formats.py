"""Formats are told by their fields; what does not fit says what was seen and what to write."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from trivium.data.formats import Conversation, Pair, RowError, Text, parse

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
SYSTEM = {"role": "system", "content": "Be brief"}
OTHER = {"role": "assistant", "content": "Go away"}


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [USER, ANSWER], "prompt": "x", "answer": "y"},
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER], "completion": "Hello"},
        {"prompt": "Hi", "response": "Hello"},
        {"question": "Hi", "answer": "Hello"},
        {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
        {"instruction": "Hi", "input": "", "output": "Hello"},
        {"instruction": "Hi", "context": None, "response": "Hello", "category": "x"},
        {"messages": [{"role": "Human", "content": "Hi"}, {"role": "model", "content": "Hello"}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, {**ANSWER, "tool_calls": None}]},
    ],
)
def test_conversations(row: dict[str, Any]) -> None:
    assert parse(row, "conversation") == Conversation([USER, ANSWER])


def test_system_input_tools_and_weights() -> None:
    row = {"instruction": "Add", "input": "1 and 2", "output": "3", "system": "Be brief"}
    assert parse(row, "conversation").messages[:2] == [SYSTEM, {"role": "user", "content": "Add\n\n1 and 2"}]
    row = {"messages": [USER, {**ANSWER, "weight": 0}, USER, ANSWER], "tools": [{"type": "function"}]}
    parsed = parse(row, "conversation")
    assert isinstance(parsed, Conversation)
    assert parsed.messages[1]["weight"] == 0
    assert parsed.tools == [{"type": "function"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": {}}}]}
    assert parse({"messages": [USER, call]}, "conversation").messages[1]["content"] == ""


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"prompt": [USER], "chosen": ANSWER, "rejected": [OTHER]},
        {"question": "Hi", "chosen": "Hello", "rejected": "Go away"},
        {"chosen": [USER, ANSWER], "rejected": [USER, OTHER]},
        {"prompt": "Hi", "chosen": [USER, ANSWER], "rejected": [USER, OTHER], "score": 1},
        {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello", "rejected": "\n\nHuman: Hi\n\nAssistant: Go away"},
        {"prompt": "\n\nHuman: Hi\n\nAssistant:", "chosen": "Hello", "rejected": "Go away"},
    ],
)
def test_pairs(row: dict[str, Any]) -> None:
    assert parse(row, "pair") == Pair([USER], [ANSWER], [OTHER])


def test_text() -> None:
    assert parse({"text": " a ", "meta": 1}, "text") == Text(" a ")


@pytest.mark.parametrize(
    ("row", "kind", "words"),
    [
        ({"messages": [USER, ANSWER]}, "text", "a conversation .*'messages'.* SFT stage"),
        ({"text": "x"}, "conversation", "plain text .* pretraining stage"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "conversation", "preference pair .* preference stage"),
        ({"messages": [USER, ANSWER]}, "pair", 'SFT stage takes; .*"chosen"'),
        ({"text": 3}, "text", "a number, not a string"),
        ({"text": "  \n"}, "text", "empty text"),
        ({}, "text", "no fields"),
        ({"mesages": []}, "conversation", "fields 'mesages' fit no conversation format; nearest lacks 'messages'"),
        ({"prompt": "a", "choosen": "b", "rejected": "c"}, "pair", "nearest lacks 'chosen': write"),
        ({"content": "x"}, "text", "nearest lacks 'text'"),
        ({"messages": "Hi"}, "conversation", "'messages' is a string, not a list"),
        ({"messages": []}, "conversation", "'messages' is empty"),
        ({"messages": ["Hi"]}, "conversation", "message 1 of 'messages' is a string"),
        ({"messages": [{"content": "Hi"}]}, "conversation", "message 1 of 'messages' has no role"),
        ({"messages": [{"role": "", "content": "Hi"}]}, "conversation", "has no role"),
        ({"messages": [{"role": "usr", "content": "Hi"}]}, "conversation", "unknown role 'usr'; known: system"),
        ({"messages": [{"role": 1, "content": "Hi"}]}, "conversation", "unknown role 1"),
        ({"messages": [{"role": "user"}]}, "conversation", "content of message 1 .* is missing"),
        ({"messages": [{"role": "user", "content": 5}]}, "conversation", "is a number, not a string"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "conversation", r"not text \(image\)"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "conversation", "empty answer: message 2"),
        ({"messages": [USER]}, "conversation", "no assistant turn"),
        ({"messages": [SYSTEM]}, "conversation", "only a system message"),
        ({"messages": [ANSWER, USER]}, "conversation", "begins with the assistant"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "conversation", "weight 0.5"),
        ({"prompt": "", "completion": "x"}, "conversation", "empty 'prompt'"),
        ({"prompt": "x", "completion": ""}, "conversation", "empty answer"),
        ({"prompt": "x", "response": "a", "answer": "b"}, "conversation", "could each be the answer"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "pair", "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": ""}, "pair", "empty answer: 'rejected'"),
        ({"chosen": "b", "rejected": "c"}, "pair", "without a prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [SYSTEM, USER, OTHER]}, "pair", "without a common prompt"),
        ({"chosen": [USER, ANSWER], "rejected": [USER, ANSWER, USER]}, "pair", "empty answer: 'chosen'"),
        ({"chosen": [USER, SYSTEM], "rejected": [USER, OTHER]}, "pair", "part at message 2"),
        ({"prompt": 7, "chosen": "b", "rejected": "c"}, "pair", "'prompt' is a number"),
    ],
)
def test_reasons(row: dict[str, Any], kind: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        parse(row, kind)


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["role", "content", "from", "value", "type", "text", "weight"]), inner, max_size=3
        )
    ),
    max_leaves=8,
)
FIELDS = [
    "text",
    "messages",
    "conversations",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "system",
    "tools",
    "answer",
]


@given(row=st.dictionaries(st.sampled_from(FIELDS), JUNK), kind=st.sampled_from(["text", "conversation", "pair"]))
@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_any_row_is_parsed_or_refused_with_a_reason(row: dict[str, Any], kind: Any) -> None:
    reason = "parsed"
    try:
        parse(row, kind)
    except RowError as error:
        reason = str(error)
    assert reason
