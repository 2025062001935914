"""Messages as they come, in whatever field and spelling, made the messages that chat templates know.

    messages_of([{"from": "human", "value": "Hi"}], "conversations")  ->  [{"role": "user", "content": "Hi"}]

A message keeps its other fields (``name``, ``tool_call_id``, reasoning, ``train``, ``weight``); the row stays as
it is. Whatever cannot be read is a ``RowError`` whose reason is one line.

Cost: about a microsecond for a message of a role and a content.
"""

from __future__ import annotations

import json
import re
from typing import Any

from trivium.data.misfit import RowError, a, ask_field, named, shown

Message = dict[str, Any]

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "ai": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

CALLS = ("function_call", "tool_call")  # ShareGPT's roles for an assistant's message that is nothing but a call
CONTENT = ("content", "value", "text")
REASONING = ("reasoning_content", "thinking", "reasoning")


# --- one message


def messages_of(value: Any, field: str, wanted: str = "a list of messages") -> list[Message]:
    """OpenAI's ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}`` messages, or JSON for such a list.

    Raises RowError naming the message and what is wrong with it.
    """
    if isinstance(value, str):
        value = decoded(value, field, wanted)
    if not isinstance(value, list):
        raise RowError(f"'{field}' is {a(value)}, not {wanted}")
    if not value:
        raise RowError(f"'{field}' is empty")
    return [_message(m, number, field) for number, m in enumerate(value, start=1)]


def _message(message: Any, number: int, field: str) -> Message:
    # Nearly every message has a role and a string and nothing else; only the others are worth a closer look.
    if message.__class__ is dict and len(message) == 2:
        role = message.get("role") or message.get("from")
        content = message.get("content") or message.get("value")
        if role.__class__ is str and content.__class__ is str:
            known = ROLES.get(role)
            if known is not None and (known != "assistant" or not content.isspace()):
                return {"role": known, "content": content}
    return _any_message(message, f"message {number} of '{field}'")


def _any_message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {a(message)}, not an object with 'role' and 'content'")
    message = {k: v for k, v in message.items() if v is not None}
    role = message.pop("role", None) or message.pop("from", None)
    content = next((message.pop(f) for f in CONTENT if f in message), None)
    if not role:
        raise RowError(f"{where} has no role (its fields: {named(message)})")
    known = ROLES.get(role.lower()) if isinstance(role, str) else None
    if isinstance(role, str) and role.lower() in CALLS and "tool_calls" not in message:
        known, content, message["tool_calls"] = "assistant", "", _calls_in(content, where)
    if known is None:
        raise RowError(f"{where} has the unknown role {_quoted(role)}; known: {', '.join(ROLES)}")
    _read_calls(message, where)
    _check_weight(message, where)
    for field in REASONING:
        if field in message:
            message[field] = plain(message[field], f"'{field}' of {where}")
    if known == "assistant" and "tool_calls" in message:
        content = "" if content is None else content
    elif known == "assistant" and content is None:
        raise RowError(f"empty answer: {where} is the assistant's and has neither 'content' nor 'tool_calls'")
    content = plain(content, f"the content of {where}")
    if known == "assistant" and not content.strip() and "tool_calls" not in message:
        raise RowError(f"empty answer: {where} is the assistant's and holds no text")
    return {"role": known, "content": content, **message}


def _quoted(role: Any) -> str:
    return repr(role[:40]) if isinstance(role, str) else shown(role)


def has_answer(value: Any) -> bool:
    """Whether any of a field's messages is the assistant's."""
    try:
        value = decoded(value, "messages", "a list") if isinstance(value, str) else value
    except RowError:
        return True
    if not isinstance(value, list):
        return True
    roles = [str(m.get("role") or m.get("from")).lower() for m in value if isinstance(m, dict)]
    return any(r in CALLS or ROLES.get(r) == "assistant" for r in roles)


_SAID = ("role", "content", "tool_calls", "tool_call_id", "name", *REASONING)


def alike(one: list[Message], other: list[Message]) -> bool:
    """Whether two lists of messages say the same, whatever else their messages carry."""
    if len(one) != len(other):
        return False
    for m, n in zip(one, other, strict=True):
        if m != n and (m["content"] != n["content"] or any(m.get(f) != n.get(f) for f in _SAID)):
            return False
    return True


def plain(content: Any, what: str) -> str:
    """A string, or a list of ``{"type": "text", "text": ...}`` parts, as a string. Raises RowError."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = shown(part.get("type", "?")).strip('"') if isinstance(part, dict) else a(part)
                raise RowError(f"{what} has a part that is not text ({kind})")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"{what} is {'missing' if content is None else a(content)}, not a string")
    return content


def _check_weight(message: Message, where: str) -> None:
    """``train`` (ours) and ``weight`` (OpenAI's) both say whether a message is trained on."""
    weight, train = message.get("weight"), message.get("train")
    if weight is not None and not (isinstance(weight, (int, float)) and weight in (0, 1)):
        raise RowError(f"{where} has weight {shown(weight)}; 0 (not trained) or 1 is known")
    if train is not None and not isinstance(train, bool):
        raise RowError(f"{where} has train {shown(train)}; true or false is known")
    if weight is not None and train is not None and bool(weight) != train:
        raise RowError(f"{where} has train {shown(train)} and weight {shown(weight)}, which contradict: keep one")


# --- calls of tools


def _read_calls(message: Message, where: str) -> None:
    """Sets ``tool_calls``, or takes it away where it is empty; the older ``function_call`` becomes one of them."""
    calls, old = message.pop("tool_calls", None), message.pop("function_call", None)
    if old and calls:
        raise RowError(f"{where} has both 'tool_calls' and 'function_call': keep one")
    if isinstance(calls, str) and calls:
        calls = decoded(calls, "tool_calls", f"a list of calls ({where})")
    calls = [old] if old else calls
    if not calls:
        return
    if not isinstance(calls, list):
        raise RowError(f"'tool_calls' of {where} is {a(calls)}, not a list")
    message["tool_calls"] = [_call(call, where) for call in calls]


def _calls_in(value: Any, where: str) -> list[Any]:
    """The call or calls that ShareGPT writes as JSON into a message of their own."""
    calls = decoded(value, "value", f"JSON of a call ({where})") if isinstance(value, str) else value
    return calls if isinstance(calls, list) else [calls]


def _call(call: Any, where: str) -> dict[str, Any]:
    """``{"type": "function", "function": {"name", "arguments"}}``; a bare ``{"name", "arguments"}`` is put into one."""
    if isinstance(call, dict) and "function" not in call and isinstance(call.get("name"), str):
        parts = {k: call[k] for k in ("name", "arguments") if k in call}
        call = {"type": "function", **{k: v for k, v in call.items() if k not in parts}, "function": parts}
    function = call.get("function") if isinstance(call, dict) else None
    if not (isinstance(call, dict) and isinstance(function, dict) and isinstance(function.get("name"), str)):
        raise RowError(f'a call in {where} is {shown(call)}, not {{"function": {{"name": ..., "arguments": ...}}}}')
    if isinstance(function.get("arguments"), str):
        # Chat templates print an object's fields; a string they would print once more as JSON.
        function = {**function, "arguments": _object_or_same(function["arguments"])}
    return {**call, "function": function}


def _object_or_same(text: str) -> Any:
    try:
        value = _loads(text)
    except ValueError:
        return text
    return value if isinstance(value, dict) else text


def tools_of(row: dict[str, Any]) -> list[Any] | None:
    """The tools a row offers: ``tools``, the older ``functions``, or JSON for such a list. Raises RowError."""
    tools, functions, inside = row.get("tools"), row.get("functions"), row.get("input")
    if not tools and isinstance(inside, dict):
        tools = inside.get("tools")
    if isinstance(functions, str) and functions.lstrip().startswith("["):
        functions = decoded(functions, "functions", "a list")
    if not tools and isinstance(functions, list) and all(isinstance(f, dict) and "name" in f for f in functions):
        tools = [{"type": "function", "function": f} for f in functions]
    if isinstance(tools, str):
        tools = decoded(tools, "tools", "a list") if tools.strip() else None
    if tools and not isinstance(tools, list):
        raise RowError(f"'tools' is {a(tools)}, not a list")
    return tools or None


# --- messages that are in a string


def decoded(text: str, field: str, wanted: str) -> Any:
    """A value that CSV and parquet files carry as JSON. Raises RowError."""
    if text.lstrip()[:1] not in ("[", "{"):
        raise RowError(f"'{field}' is a string, not {wanted}")
    try:
        return _loads(text)
    except ValueError as error:
        raise RowError(f"'{field}' is a string, not {wanted}, and not JSON for it: {error}") from None


def _loads(text: str) -> Any:
    """``json.loads``; whatever is wrong is a ValueError of one line."""
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{error.msg} at character {error.pos + 1}") from None
    except (RecursionError, ValueError):
        raise ValueError("nested too deeply, or a number too long") from None
    # The readers saw the escape as plain text; half a character comes to light only here.
    if re.search(r"\\u[dD][89a-fA-F]", text):
        try:
            json.dumps(value, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError("half a character: a lone surrogate") from None
    return value


def is_hh(text: Any) -> bool:
    """Whether a string is a conversation as Anthropic's HH-RLHF has them, or the beginning of one."""
    if not isinstance(text, str) or not text[:20].lstrip().startswith("Human:"):
        return False
    return text.startswith("\n\n") or "\n\nAssistant:" in text


def from_hh(text: str) -> list[Message]:
    """Turns marked by ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` in one string. Raises RowError."""
    pieces = re.split(r"\n\n(Human|Assistant):", "\n\n" + text.lstrip())
    turns = [(r, c.strip()) for r, c in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns[-1] == ("Assistant", "") and len(turns) > 1:
        turns.pop()  # a prompt that ends with the marker of the answer to come
    roles = {"Human": "user", "Assistant": "assistant"}
    return [_any_message({"role": roles[r], "content": c}, f"turn {i}") for i, (r, c) in enumerate(turns, start=1)]


# --- messages in fields of their own


def prompt_of(row: dict[str, Any]) -> list[Message]:
    """The asking side of a row that has it in a field: what was said before, then the prompt with Alpaca's input."""
    field = ask_field(row)
    value = row[field]
    more = row.get("input", row.get("context", "")) if field == "instruction" else ""
    if isinstance(value, str) and more:
        if not isinstance(more, str):
            raise RowError(f"'{'input' if 'input' in row else 'context'}' is {a(more)}, not a string")
        value = f"{value}\n\n{more}" if more.strip() else value
    return [*(_history(row["history"]) if "history" in row else ()), *turn(value, "user", field)]


def _history(past: Any) -> list[Message]:
    """Earlier turns as Alpaca's data has them, ``[[question, answer], ...]``."""
    if isinstance(past, str):  # in many tables a subject, which is nobody's turn
        past = decoded(past, "history", "a list of turns") if past[:20].lstrip().startswith("[") else []
    if isinstance(past, list) and past and isinstance(past[0], dict):
        return messages_of(past, "history")
    if not isinstance(past, list) or not all(isinstance(t, list) and len(t) == 2 for t in past):
        raise RowError(f"'history' is {shown(past)}, not a list of [question, answer]")
    return [m for q, r in past for m in (*turn(q, "user", "history"), *turn(r, "assistant", "history"))]


def turn(value: Any, role: str, field: str) -> list[Message]:
    """A field that may be a string, one message or a list of messages. Raises RowError."""
    if isinstance(value, str):
        if not value or value.isspace():
            raise RowError(f"empty {'answer: ' if role == 'assistant' else ''}'{field}'")
        if role == "user" and is_hh(value):
            return from_hh(value)
        return (value[0] == "[" and _spelled_out(value, field)) or [{"role": role, "content": value}]
    if isinstance(value, dict):  # OpenAI's preference rows have {"messages": [...]} for a prompt
        value = value["messages"] if "messages" in value and "role" not in value else [value]
    return messages_of(value, field, "a string or a list of messages")


def _spelled_out(text: str, field: str) -> list[Message]:
    """The messages that CSV carries as JSON; none where the text is anything else that begins with a bracket."""
    try:
        value = _loads(text)
    except ValueError:
        return []
    known = all(
        isinstance(m, dict) and ("role" in m or "from" in m) and ("content" in m or "value" in m) for m in value
    )
    return messages_of(value, field) if value and known else []


def with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """A system prompt may stand in a field of its own. Raises RowError where it is no string."""
    if "system" not in row and "system_prompt" not in row:
        return messages
    system = row.get("system", row.get("system_prompt"))
    if not isinstance(system, str):
        raise RowError(f"'system' is {a(system)}, not a string")
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]
