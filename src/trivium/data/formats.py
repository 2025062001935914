"""Which of the usual formats a row is in, told by its fields: there is nothing to register.

    parse(row.value, "conversation")  ->  Conversation(messages=[{"role": "user", ...}, {"role": "assistant", ...}])
    format_of(row.value)              ->  Format(name="ShareGPT", kind="conversation")

    kind           taken by        formats
    text           pretraining     {"text"}; {"content"}, {"document"} or {"body"} where no other field is known
    conversation   SFT             {"messages"}, {"conversations"} (ShareGPT), {"prompt", "completion"},
                                   {"instruction", "input", "output"} (Alpaca), {"question", "answer"} and the like
    pair           preference      {"prompt", "chosen", "rejected"}, or {"chosen", "rejected"} as two whole
                                   conversations that begin alike (or HH-RLHF's strings, "\\n\\nHuman: ..."), or
                                   {"prompt", "answers", "scores"}, the scores also inside the answers
    rating         KTO             {"prompt", "completion", "label": true}; also pairs, as one good and one bad answer
    prompt         sampling        {"prompt"}, or {"messages"} that end with the user's turn

A row of preferences may say its ``weight`` against other rows, and a pair by what ``margin`` the better is better.

The formats are listed in ``misfit.FORMATS``, the names that a field goes by beside them. Names in capitals are known
too. Where a row could be several things, it is what it is asked for; what ``format_of`` says is the most it could be.

A row that does not fit raises ``RowError``: the reason names what was seen and what to write.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from trivium.data.messages import (
    Message,
    alike,
    from_hh,
    has_answer,
    is_hh,
    messages_of,
    prompt_of,
    tools_of,
    turn,
    with_system,
)
from trivium.data.misfit import (
    ANSWER_TEXT,
    FORMATS,
    SCORE,
    SCORES,
    TAKEN_BY,
    Fields,
    Format,
    Kind,
    RowError,
    a,
    answer_field,
    answers,
    ask_field,
    asks,
    list_field,
    mapped,
    misfit,
    scored_field,
    shown,
    sides,
    text_field,
)
from trivium.data.parsed import Conversation, Pair, Pairs, Parsed, Preference, Prompt, Rating, Scored, Text

__all__ = [
    "FORMATS", "TAKEN_BY", "Conversation", "Fields", "Format", "Kind", "Message", "Pair", "Pairs", "Parsed",
    "Preference", "Prompt", "Rating", "RowError", "Scored", "Text", "format_of", "mapped", "parse",
]  # fmt: skip

# What a field of another name can be said to be.
FIELDS = tuple(
    dict.fromkeys([*(n for one in FORMATS for n in one.example), "system", "tools", "history", "weight", "margin"])
)


# --- recognising


def parse(row_value: dict[str, Any], kind: Kind) -> Parsed:
    """The row as a thing of ``kind``; a "pair" may be a ``Scored``, and a "rating" these, too, which rate several
    answers. Raises RowError with the reason."""
    row = _given(row_value)
    if kind == "rating" and not _is(row, kind) and (_is(row, "pair") or _is(_in_small_letters(row), "pair")):
        kind = "pair"
    if not _is(row, kind):
        small = _in_small_letters(row)
        if not _is(small, kind):
            raise RowError(misfit(row, kind, _kinds(row) or _kinds(small)))
        row = small
    return _READ[kind](row)


def format_of(row_value: dict[str, Any]) -> Format | None:
    """The format whose fields the row has, whatever they hold; None where it has those of none."""
    row = _given(row_value)
    row = row if _kinds(row) else _in_small_letters(row)
    found = _kinds(row)
    return next(f for f in FORMATS if f.name == _name(row, found[0])) if found else None


def _name(row: dict[str, Any], kind: Kind) -> str:
    if kind == "pair":
        found = sides(row)
        if found is None:
            return "scored answers"
        if is_hh(row[found[0]]) or is_hh(row.get("prompt")):
            return "HH-RLHF text"
        return "preference pairs" + ("" if asks(row) or list_field(row) else " with an implicit prompt")
    if kind == "conversation":
        if field := list_field(row):
            value = row[field]
            first = value[0] if isinstance(value, list) and value else None
            shared = "from" in first if isinstance(first, dict) else isinstance(value, str) and '"from"' in value[:99]
            return "ShareGPT" if shared else "messages"
        field = next((k for k in ("prompt", "instruction") if k in row), "")
        return {"prompt": "prompt and completion", "instruction": "Alpaca"}.get(field, "question and answer")
    return {"text": "text", "rating": "ratings", "prompt": "prompts"}[kind]


_JSON = frozenset((str, int, float, bool, list, dict))


def _given(row: dict[str, Any]) -> dict[str, Any]:
    """The fields that hold something. Tables in memory have NaN for nothing, and numpy's arrays for lists."""
    row = {k: v for k, v in row.items() if v is not None}
    types = set(map(type, row.values()))
    if types <= _JSON and float not in types:
        return row
    row = row if types <= _JSON else {k: _as_json(v) for k, v in row.items()}
    return {k: v for k, v in row.items() if not isinstance(v, float) or v == v}


def _as_json(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _as_json(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_as_json(v) for v in value]
    return _as_json(value.tolist()) if hasattr(value, "tolist") else value


def _in_small_letters(row: dict[str, Any]) -> dict[str, Any]:
    small = {k.strip().lower(): v for k, v in row.items()}
    return small if len(small) == len(row) else row


def _kinds(row: dict[str, Any]) -> list[Kind]:
    """Every kind whose fields are there, the one that says most first."""
    order: tuple[Kind, ...] = ("pair", "rating", "conversation", "text", "prompt")
    found = [k for k in order if _is(row, k)]
    if found[:1] == ["conversation"] and (field := list_field(row)) and not has_answer(row[field]):
        found.sort(key=lambda k: k != "prompt")
    return found


def _is(row: dict[str, Any], kind: Kind) -> bool:
    """Whether the fields of a ``kind`` are there."""
    if kind == "text":
        return "text" in row or text_field(row) is not None
    if kind == "pair":
        return sides(row) is not None or scored_field(row) is not None
    if kind == "prompt":
        return asks(row) or list_field(row) is not None
    talks = list_field(row) is not None or (asks(row) and answers(row))
    # Someone's "bad" must not be learnt as an answer: what carries a verdict is no conversation.
    return talks and ("label" in row and _verdict(row["label"]) is not None) == (kind == "rating")


def _verdict(label: Any) -> bool | None:
    """True or false, 1 or 0, +1 or -1, or such a word; None for any other label."""
    if isinstance(label, str):
        return {"true": True, "1": True, "+1": True, "false": False, "0": False, "-1": False}.get(label.strip().lower())
    return label > 0 if isinstance(label, (bool, int, float)) and label in (0, 1, -1) else None


# --- texts, conversations, prompts, ratings


def _text(row: dict[str, Any]) -> Text:
    field = "text" if "text" in row else str(text_field(row))
    if not isinstance(row[field], str):
        raise RowError(f"'{field}' is {a(row[field])}, not a string")
    if not row[field] or row[field].isspace():
        raise RowError("empty text")
    return Text(row[field])


def _conversation(row: dict[str, Any]) -> Conversation:
    if (field := list_field(row)) is not None:
        messages = messages_of(row[field], field)
    else:
        field = answer_field(row)
        messages = prompt_of(row) + turn(row[field], "assistant", field)
    messages = with_system(messages, row)
    if not any(m["role"] == "assistant" for m in messages):
        if all(m["role"] == "system" for m in messages):
            raise RowError("the conversation has only a system message")
        raise RowError(f"the conversation has no assistant turn; prompts alone are for {TAKEN_BY['prompt']}")
    if messages[0]["role"] == "assistant":
        raise RowError("begins with the assistant's message: nothing asks for it; put a user message before it")
    return Conversation(messages, tools_of(row))


def _asked(row: dict[str, Any]) -> list[Message]:
    """What is to be answered, from the prompt's field or a list of messages. Raises RowError."""
    field = None if asks(row) else list_field(row)
    messages = with_system(prompt_of(row) if field is None else messages_of(row[field], field), row)
    last = messages[-1]["role"]
    if last == "system" and all(m["role"] == "system" for m in messages):
        raise RowError(f"'{field or ask_field(row)}' has only a system message")
    if last == "assistant":
        raise RowError(f"'{field or ask_field(row)}' ends with the assistant's message: a prompt ends with the user's")
    return messages


def _prompt(row: dict[str, Any]) -> Prompt:
    return Prompt(_asked(row), tools_of(row))


def _rating(row: dict[str, Any]) -> Rating:
    good = bool(_verdict(row["label"]))
    if asks(row) and answers(row):
        field = answer_field(row)
        prompt, answer = _asked(row), turn(row[field], "assistant", field)
    else:
        field = str(list_field(row))
        messages = with_system(messages_of(row[field], field), row)
        asked = [i for i, m in enumerate(messages, start=1) if m["role"] == "user"]
        if not asked:
            raise RowError("no user message asks for the answer that is rated")
        prompt, answer = messages[: asked[-1]], messages[asked[-1] :]
    if not answer or answer[0]["role"] != "assistant":
        raise RowError(f"no assistant's message follows the last user message of '{field}': there is no answer to rate")
    return Rating(prompt, answer, good, tools_of(row), _weight(row))


# --- pairs


def _pair(row: dict[str, Any]) -> Pair | Scored:
    fields = sides(row)
    if fields is None:
        return _scored(row)
    chosen, rejected = _side(row, fields[0]), _side(row, fields[1])
    if alike(chosen, rejected):
        raise RowError("chosen and rejected are the same")
    whole = chosen[0]["role"] != "assistant"
    if whole != (rejected[0]["role"] != "assistant"):
        raise RowError(f"'{fields[not whole]}' is a whole conversation and the other only an answer: make them alike")
    if whole:
        prompt, chosen, rejected = _parted(chosen, rejected, row)
        prompt = with_system(prompt, row)
    elif asks(row) or list_field(row):
        prompt = _asked(row)
        if asks(row) and is_hh(row[ask_field(row)]):  # there, a space parts the answer from its marker
            chosen, rejected = ([{**m, "content": m["content"].strip()} for m in s] for s in (chosen, rejected))
    else:
        raise RowError("a pair without a prompt: add 'prompt', or make chosen and rejected whole conversations")
    return Pair(prompt, chosen, rejected, tools_of(row), _weight(row), _margin(row))


def _weight(row: dict[str, Any]) -> float:
    """What the row counts against others."""
    weight = _number(row["weight"], "'weight'") if "weight" in row else 1.0
    if not weight > 0:
        raise RowError(f"the row's weight is {weight:g}: leave the row out, or give a number above 0")
    return weight


def _margin(row: dict[str, Any]) -> float:
    return _number(row["margin"], "'margin'") if "margin" in row else 0.0


def _side(row: dict[str, Any], field: str) -> list[Message]:
    return from_hh(row[field]) if is_hh(row[field]) else turn(row[field], "assistant", field)


def _parted(
    chosen: list[Message], rejected: list[Message], row: dict[str, Any]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Two whole conversations, cut where they part, or where the row's own prompt ends: (prompt, chosen, rejected)."""
    n = 0
    while n < min(len(chosen), len(rejected)) and alike(chosen[n : n + 1], rejected[n : n + 1]):
        n += 1
    if n == 0:
        raise RowError("a pair without a common prompt: chosen and rejected differ from their first message on")
    if n in (len(chosen), len(rejected)):
        raise RowError(f"empty answer: '{'chosen' if n == len(chosen) else 'rejected'}' ends where the other goes on")
    try:
        given = prompt_of(row) if asks(row) else []
    except RowError:
        given = []  # nothing is lost: the conversations hold it too
    first = given[:1] if given and given[0]["role"] == "system" != chosen[0]["role"] else []
    if chosen[n]["role"] != "assistant" or rejected[n]["role"] != "assistant":
        part, n = n, len(given)  # people's turns may differ too, after the prompt
        if not 0 < n < part or not alike(given, chosen[:n]) or chosen[n]["role"] != "assistant":
            raise RowError(f"chosen and rejected part at message {part + 1}, which is not the assistant's in both")
    return first + chosen[:n], chosen[n:], rejected[n:]


def _scored(row: dict[str, Any]) -> Scored:
    prompt = _asked(row)
    field = str(scored_field(row))
    values = row[field]
    by = next((f for f in SCORES if isinstance(row.get(f), list)), None)
    if by is not None and len(row[by]) != len(values):
        raise RowError(f"{len(values)} answers in '{field}', but {len(row[by])} scores in '{by}'")
    if len(values) < 2:
        raise RowError(f"only one answer in '{field}': there is nothing to prefer it to")
    found, scores = [], []
    for number, value in enumerate(values, start=1):
        where = f"answer {number} of '{field}'"
        key, score = (by, row[by][number - 1]) if by is not None else _score_in(value)
        scores.append(_number(score, f"the score of {where}") * (-1 if key in ("rank", "ranks") else 1))
        if isinstance(value, dict) and "role" not in value and "from" not in value:
            value = next((value[k] for k in ANSWER_TEXT if value.get(k) is not None), None)
        elif isinstance(value, dict):
            value = {k: v for k, v in value.items() if k not in SCORE}
        found.append(turn(value, "assistant", where))
    return Scored(prompt, found, scores, tools_of(row), _weight(row), _margin(row))


def _score_in(answer: Any) -> tuple[str, Any]:
    """The name and value of the score that an answer carries."""
    held = answer if isinstance(answer, dict) else {}
    return next(((k, held[k]) for k in SCORE if held.get(k) is not None), ("", None))


def _number(value: Any, what: str) -> float:
    """A finite number; tables have them as strings too."""
    try:
        found = float(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found):
        raise RowError(f"{what} is {'missing' if value is None else shown(value)}, not a finite number")
    return found


_READ: dict[Kind, Callable[[dict[str, Any]], Parsed]] = {
    "text": _text, "conversation": _conversation, "pair": _pair, "rating": _rating, "prompt": _prompt,
}  # fmt: skip
