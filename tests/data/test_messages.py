"""Messages in any usual spelling become those that chat templates know; what cannot be read is named."""

from __future__ import annotations

import json
from typing import Any

import pytest

from trivium.data.messages import from_hh, messages_of
from trivium.data.misfit import RowError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


def read(*messages: Any) -> list[dict[str, Any]]:
    return messages_of(list(messages), "messages")


@pytest.mark.parametrize(
    ("message", "role"),
    [
        ({"role": "developer", "content": "Hi"}, "system"),
        ({"role": "System", "content": "Hi"}, "system"),
        ({"role": "Human", "content": "Hi"}, "user"),
        ({"from": "human", "value": "Hi"}, "user"),
        ({"role": "prompter", "text": "Hi"}, "user"),
        ({"from": "gpt", "value": "Hi"}, "assistant"),
        ({"from": "model", "role": None, "value": "Hi", "content": None}, "assistant"),
        ({"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}, "user"),
        ({"role": "assistant", "content": "Hi", "tool_calls": []}, "assistant"),
        ({"role": "assistant", "content": "Hi", "tool_calls": None, "function_call": None}, "assistant"),
        ({"role": "function", "content": "Hi"}, "tool"),
        ({"from": "observation", "value": "Hi"}, "tool"),
    ],
)
def test_roles_and_contents(message: dict[str, Any], role: str) -> None:
    assert read(message) == [{"role": role, "content": "Hi"}]


@pytest.mark.parametrize(
    "more",
    [
        {"name": "bo"},
        {"tool_call_id": "c1"},
        {"weight": 0},
        {"weight": 1, "train": True},
        {"weight": 0, "train": False},
        {"train": False},
        {"reasoning_content": "Hm"},
        {"thinking": "Hm"},
        {"reasoning": "Hm"},
    ],
)
def test_other_fields_are_kept(more: dict[str, Any]) -> None:
    assert read({**ANSWER, **more}) == [{**ANSWER, **more}]
    assert read({**ANSWER, "reasoning": [{"type": "text", "text": "Hm"}]}) == [{**ANSWER, "reasoning": "Hm"}]


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": json.dumps([CALL])},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "name": "f", "arguments": {"a": 1}}]},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{**CALL, "function": {"name": "f", "arguments": '{"a": 1}'}}],
        },
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"a": 1}'}},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
        {"from": "tool_call", "value": '[{"name": "f", "arguments": "{\\"a\\": 1}"}]'},
    ],
)
def test_calls_of_tools(message: dict[str, Any]) -> None:
    before = json.dumps(message)
    assert read(message) == [{"role": "assistant", "content": "", "tool_calls": [CALL]}]
    assert json.dumps(message) == before


@pytest.mark.parametrize("arguments", ["[1]", "", "a b", "{", '{"a": "\\ud83d"}', "[" * 5000, "9" * 5000])
def test_arguments_that_are_no_object_are_left(arguments: str) -> None:
    (message,) = read({"role": "assistant", "function_call": {"name": "f", "arguments": arguments}})
    assert message["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize(
    ("message", "words"),
    [
        ("Hi", "message 2 of 'messages' is a string, not an object"),
        (None, "message 2 of 'messages' is null"),
        ({"content": "Hi"}, "message 2 of 'messages' has no role"),
        ({"role": "", "content": "Hi", "id": 3}, r"has no role \(its fields: 'id'\)"),
        ({"role": "usr", "content": "Hi"}, "unknown role 'usr'; known: system, developer, user"),
        ({"role": "u\nv" * 50, "content": "Hi"}, r"unknown role 'u\\nvu.{,50}; known"),
        ({"role": 1, "content": "Hi"}, "unknown role 1"),
        ({"role": ["user"], "content": "Hi"}, r'unknown role \["user"\]'),
        ({"role": "user"}, "the content of message 2 of 'messages' is missing, not a string"),
        ({"role": "user", "content": 5}, "is a number, not a string"),
        ({"role": "tool", "content": {"a": 1}}, "is an object, not a string"),
        ({"role": "user", "content": [{"type": "image"}]}, r"has a part that is not text \(image\)"),
        ({"role": "user", "content": ["Hi"]}, r"has a part that is not text \(a string\)"),
        ({"role": "assistant"}, "empty answer: message 2 .* has neither 'content' nor 'tool_calls'"),
        ({"role": "assistant", "tool_calls": []}, "has neither 'content' nor 'tool_calls'"),
        ({"role": "assistant", "content": " "}, "empty answer: message 2 .* holds no text"),
        ({"role": "assistant", "content": "", "reasoning": "Hm"}, "holds no text"),
        ({**ANSWER, "reasoning": 3}, "'reasoning' of message 2 of 'messages' is a number, not a string"),
        ({**ANSWER, "weight": 0.5}, "has weight 0.5; 0"),
        ({**ANSWER, "weight": "1"}, 'has weight "1"; 0'),
        ({**ANSWER, "train": 1}, "has train 1; true or false is known"),
        ({**ANSWER, "train": "true"}, 'has train "true"; true or false is known'),
        ({**ANSWER, "train": True, "weight": 0}, "train true and weight 0, which contradict: keep one"),
        ({**ANSWER, "train": False, "weight": 1}, "train false and weight 1, which contradict: keep one"),
        ({**ANSWER, "tool_calls": {"name": "f"}}, "'tool_calls' of message 2 of 'messages' is an object, not a list"),
        ({**ANSWER, "tool_calls": "f(1)"}, "'tool_calls' is a string, not a list of calls"),
        ({**ANSWER, "tool_calls": ["f"]}, 'a call in message 2 of \'messages\' is "f", not {"function"'),
        ({**ANSWER, "tool_calls": [{"function": {}}]}, "a call in message 2 .* not"),
        ({**ANSWER, "tool_calls": [CALL], "function_call": {"name": "f"}}, "has both 'tool_calls' and 'function_call'"),
        ({"from": "function_call", "value": "f(1)"}, "'value' is a string, not JSON of a call"),
        ({"from": "function_call"}, "a call in message 2 .* is null"),
    ],
)
def test_reasons(message: Any, words: str) -> None:
    with pytest.raises(RowError, match=words):
        read(USER, message)


@pytest.mark.parametrize("text", ["[1", "[" * 5000, "[" + "9" * 5000 + "]", '[{"role": "user", "content": "\\ud83d"}]'])
def test_lists_in_strings_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RowError, match=r"'messages' is a string, not a list of messages, and not JSON for it: .+"):
        messages_of(text, "messages")


def test_hh_turns() -> None:
    assert from_hh("\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: Hi\n\nAssistant:") == [USER, ANSWER, USER]
    assert from_hh("Human: Hi\n\nthere\n\nAssistant: Hello") == [{**USER, "content": "Hi\n\nthere"}, ANSWER]
    with pytest.raises(RowError, match="empty answer: turn 2"):
        from_hh("\n\nHuman: Hi\n\nAssistant:\n\nHuman: Hello?")
