"""Which of the usual formats a row is in, told by its fields: there is nothing to register.

    parse(row.value, "conversation")  ->  Conversation(messages=[{"role": "user", ...}, {"role": "assistant", ...}])

    kind           taken by        formats
    text           pretraining     {"text"}
    conversation   SFT             {"messages"}, {"conversations"} (ShareGPT), {"prompt", "completion"},
                                   {"instruction", "input", "output"} (Alpaca), {"question", "answer"} and the like
    pair           preference      {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as two whole
                                   conversations that begin alike (or HH-RLHF's strings, "\\n\\nHuman: ...")

A row that does not fit raises ``RowError``: the reason names what was seen and what to write.
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Any, Literal

Message = dict[str, Any]
Kind = Literal["text", "conversation", "pair"]

TAKEN_BY = {"text": "pretraining", "conversation": "SFT", "pair": "preference"}

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}

# One good example per format, the fields in it being those the format needs. The first of a kind is what is advised.
EXAMPLES: dict[Kind, tuple[dict[str, str], ...]] = {
    "text": ({"text": '"..."'},),
    "conversation": (
        {"messages": '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]'},
        {"prompt": '"..."', "completion": '"..."'},
        {"conversations": '[{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]'},
        {"instruction": '"..."', "output": '"..."'},
        {"question": '"..."', "answer": '"..."'},
    ),
    "pair": ({"prompt": '"..."', "chosen": '"..."', "rejected": '"..."'},),
}

ASK = ("prompt", "instruction", "question")
ANSWER = ("completion", "output", "response", "answer")


class RowError(Exception):
    """One row cannot be used; ``str()`` is the reason. It is set aside and counted, the rest goes on."""


@dataclass(frozen=True)
class Text:
    """A document."""

    text: str


@dataclass(frozen=True)
class Conversation:
    """Messages ``{"role", "content", ...}`` of which at least one is the assistant's; tools as the row gave them."""

    messages: list[Message]
    tools: list[Any] | None = None


@dataclass(frozen=True)
class Pair:
    """One prompt and two different answers to it, each a list of messages that begins with the assistant's."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    tools: list[Any] | None = None


def parse(row_value: dict[str, Any], kind: Kind) -> Text | Conversation | Pair:
    """The row as a thing of ``kind``. Raises RowError with the reason."""
    row = {k: v for k, v in row_value.items() if v is not None}
    seen = _kinds(row)
    if kind not in seen:
        raise RowError(_misfit(row, kind, seen))
    if kind == "text":
        if not isinstance(row["text"], str):
            raise RowError(f"'text' is {_a(row['text'])}, not a string")
        if not row["text"].strip():
            raise RowError("empty text")
        return Text(row["text"])
    return _pair(row) if kind == "pair" else _conversation(row)


def _kinds(row: dict[str, Any]) -> set[str]:
    """Every kind whose fields are there (a row may carry several)."""
    asks, answers = any(f in row for f in ASK), any(f in row for f in ANSWER)
    found = {"text"} if "text" in row else set()
    if "messages" in row or "conversations" in row or (asks and answers):
        found.add("conversation")
    if "chosen" in row and "rejected" in row:
        found.add("pair")
    return found


def _misfit(row: dict[str, Any], kind: Kind, seen: set[str]) -> str:
    if seen:
        other = next(k for k in ("pair", "conversation", "text") if k in seen)
        what = {"text": "plain text", "conversation": "a conversation", "pair": "a preference pair"}[other]
        return (
            f"{what} (fields {_named(row)}), which the {TAKEN_BY[other]} stage takes; "
            f"the {TAKEN_BY[kind]} stage takes rows like {_example(EXAMPLES[kind][0])}"
        )
    if not row:
        return f"no fields; write {_example(EXAMPLES[kind][0])}"

    def likeness(example: dict[str, str]) -> float:
        return sum(max(difflib.SequenceMatcher(None, f, r).ratio() for r in row) for f in example) / len(example)

    best = max(EXAMPLES[kind], key=likeness)
    best = best if likeness(best) >= 0.5 else EXAMPLES[kind][0]
    lacking = ", ".join(f"'{f}'" for f in best if f not in row)
    return f"fields {_named(row)} fit no {kind} format; nearest lacks {lacking}: write {_example(best)}"


def _example(fields: dict[str, str]) -> str:
    return "{" + ", ".join(f'"{k}": {v}' for k, v in fields.items()) + "}"


def _named(row: dict[str, Any]) -> str:
    names = [f"'{str(k)[:40]}'" for k in row]
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _a(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


# --- conversations


def _conversation(row: dict[str, Any]) -> Conversation:
    if "messages" in row:
        messages = _messages(row["messages"], "messages")
    elif "conversations" in row:
        messages = _messages(row["conversations"], "conversations")
    else:
        answer_field = _answer_field(row)
        messages = _prompt(row) + _turn(row[answer_field], "assistant", answer_field)
    messages = _with_system(messages, row)
    _must_answer(messages, "the conversation")
    first = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
    if first == 0:
        raise RowError("begins with the assistant's message: nothing asks for it; put a user message before it")
    return Conversation(messages, _tools(row))


def _prompt(row: dict[str, Any]) -> list[Message]:
    """The asking side of a row that keeps question and answer in fields of their own; Alpaca's input is appended."""
    fields = [f for f in ASK if f in row]
    if len(fields) > 1 and "prompt" not in fields:
        raise RowError(f"{_named(dict.fromkeys(fields))} could each be the prompt: keep one")
    field = fields[0]
    value = row[field]
    more = row.get("input", row.get("context", "")) if field == "instruction" else ""
    if isinstance(value, str) and isinstance(more, str) and more.strip():
        value = f"{value}\n\n{more}"
    return _turn(value, "user", field)


def _answer_field(row: dict[str, Any]) -> str:
    """The field that holds the answer: the partner of the prompt's field, or the only one there is."""
    for ask, answer in (("prompt", "completion"), ("instruction", "output"), ("question", "answer")):
        if ask in row and answer in row:
            return answer
    fields = [f for f in ANSWER if f in row]
    if len(fields) > 1:
        raise RowError(f"{_named(dict.fromkeys(fields))} could each be the answer: keep one, or name it 'completion'")
    return fields[0]


def _turn(value: Any, role: str, field: str) -> list[Message]:
    """A field that may be a string, one message or a list of messages."""
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"empty {'answer: ' if role == 'assistant' else ''}'{field}'")
        human = role == "user" and value.startswith("\n\nHuman:")
        return _from_hh(value) if human else [{"role": role, "content": value}]
    return _messages([value] if isinstance(value, dict) else value, field)


def _messages(value: Any, field: str) -> list[Message]:
    """OpenAI's ``{"role", "content"}`` or ShareGPT's ``{"from", "value"}`` messages, with the roles' usual names."""
    if not isinstance(value, list):
        raise RowError(f"'{field}' is {_a(value)}, not a list of messages")
    if not value:
        raise RowError(f"'{field}' is empty")
    return [_message(m, f"message {i} of '{field}'") for i, m in enumerate(value, start=1)]


def _message(message: Any, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {_a(message)}, not an object with 'role' and 'content'")
    message = {k: v for k, v in message.items() if v is not None}
    role = message.pop("role", None) or message.pop("from", None)
    if not role:
        raise RowError(f"{where} has no role (its fields: {_named(message)})")
    if not isinstance(role, str) or role.lower() not in ROLES:
        raise RowError(f"{where} has the unknown role {role!r}; known: {', '.join(ROLES)}")
    role = ROLES[role.lower()]
    content = message.pop("content", None)
    content = message.pop("value", None) if content is None else content
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {"role": role, "content": "", **message}
    content = _plain(content, where)
    if role == "assistant" and not content.strip() and not message.get("tool_calls"):
        raise RowError(f"empty answer: {where} is the assistant's and holds no text")
    if message.get("weight", 1) not in (0, 1):
        raise RowError(f"{where} has weight {message['weight']!r}; 0 (not trained) or 1 is known")
    return {"role": role, "content": content, **message}


def _plain(content: Any, where: str) -> str:
    """A string, or a list of ``{"type": "text", "text": ...}`` parts, as a string."""
    if isinstance(content, list):
        for part in content:
            if not isinstance(part, dict) or not isinstance(part.get("text"), str):
                kind = part.get("type", "?") if isinstance(part, dict) else _a(part)
                raise RowError(f"{where} has a part that is not text ({kind})")
        return "".join(part["text"] for part in content)
    if not isinstance(content, str):
        raise RowError(f"the content of {where} is {'missing' if content is None else _a(content)}, not a string")
    return content


def _with_system(messages: list[Message], row: dict[str, Any]) -> list[Message]:
    """A system prompt may stand in a field of its own."""
    system = row.get("system", row.get("system_prompt", ""))
    if not isinstance(system, str):
        raise RowError(f"'system' is {_a(system)}, not a string")
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def _must_answer(messages: list[Message], what: str) -> None:
    roles = {m["role"] for m in messages}
    if "assistant" not in roles:
        raise RowError(f"{what} has only a system message" if roles == {"system"} else f"{what} has no assistant turn")


def _tools(row: dict[str, Any]) -> list[Any] | None:
    tools = row.get("tools") or None
    if tools is not None and not isinstance(tools, list):
        raise RowError(f"'tools' is {_a(tools)}, not a list")
    return tools


# --- pairs


def _pair(row: dict[str, Any]) -> Pair:
    sides = []
    for field in ("chosen", "rejected"):
        value = row[field]
        whole_hh = isinstance(value, str) and value.startswith("\n\nHuman:")
        sides.append(_from_hh(value) if whole_hh else _turn(value, "assistant", field))
    chosen, rejected = sides
    if chosen == rejected:
        raise RowError("chosen and rejected are the same")
    if chosen[0]["role"] != "assistant" or rejected[0]["role"] != "assistant":
        prompt, chosen, rejected = _parted(chosen, rejected)
    elif not any(f in row for f in ASK):
        raise RowError("a pair without a prompt: add 'prompt', or make chosen and rejected whole conversations")
    else:
        prompt = _prompt(row)
    for field, answer in (("chosen", chosen), ("rejected", rejected)):
        _must_answer(answer, f"'{field}'")
    return Pair(_with_system(prompt, row), chosen, rejected, _tools(row))


def _parted(chosen: list[Message], rejected: list[Message]) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations, cut where they part: (prompt, chosen, rejected)."""
    n = 0
    while n < min(len(chosen), len(rejected)) and chosen[n] == rejected[n]:
        n += 1
    if n == 0:
        raise RowError("a pair without a common prompt: chosen and rejected differ from their first message on")
    if n == len(chosen) or n == len(rejected):
        raise RowError(f"empty answer: '{'chosen' if n == len(chosen) else 'rejected'}' ends where the other goes on")
    if chosen[n]["role"] != "assistant" or rejected[n]["role"] != "assistant":
        raise RowError(f"chosen and rejected part at message {n + 1}, which is not the assistant's in both")
    return chosen[:n], chosen[n:], rejected[n:]


def _from_hh(text: str) -> list[Message]:
    """Anthropic's HH-RLHF as published: turns marked by ``\\n\\nHuman:`` and ``\\n\\nAssistant:`` in one string."""
    pieces = re.split(r"\n\n(Human|Assistant):", text)
    turns = [(r, c.strip()) for r, c in zip(pieces[1::2], pieces[2::2], strict=True)]
    if turns[-1] == ("Assistant", "") and len(turns) > 1:
        turns.pop()  # a prompt that ends with the marker of the answer to come
    return [_message({"role": ROLES["human" if r == "Human" else "assistant"], "content": c}, f"turn {i}")
            for i, (r, c) in enumerate(turns, start=1)]  # fmt: skip
