"""The table of formats, the names that fields go by, and what is said of a row that does not fit.

    misfit(row, "conversation", [])  ->  "fields 'question_text', 'reply' fit no conversation format; nearest lacks ..."
    mapped(row, {"prompt": "question_text", "completion": "meta.reply"})  ->  {"prompt": ..., "completion": ..., ...}

What is said is one line of at most ``ROOM`` characters and names what was seen, what to write, and the mapping of
fields that would do, where the names or the number of the row's fields point to one.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal

Kind = Literal["text", "conversation", "pair", "rating", "prompt"]

# The stage that takes a kind; what follows a comma says why none does.
TAKEN_BY: dict[Kind, str] = {
    "text": "pretraining",
    "conversation": "SFT",
    "pair": "preference",
    "rating": "preference (loss: kto)",
    "prompt": "sampling, which no stage does",
}

Fields = tuple[tuple[str, str], ...]  # what fields are called: ours, theirs

ROOM = 400  # characters of a reason, about


@dataclass(frozen=True)
class Format:
    """A usual format: its name, the kind of thing its rows become, and one good row."""

    name: str
    kind: Kind
    example: Mapping[str, Any] = field(default_factory=dict, compare=False, repr=False)


_ASKED, _ANSWERED = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
_HH = "\n\nHuman: Hi\n\nAssistant:"

# Each format once; the first of a kind is the one that is advised. Documentation and messages are made from this.
FORMATS = (
    Format("text", "text", {"text": "Once upon a time ..."}),
    Format("messages", "conversation", {"messages": [_ASKED, _ANSWERED]}),
    Format("prompt and completion", "conversation", {"prompt": "Hi", "completion": "Hello"}),
    Format("ShareGPT", "conversation",
           {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}),
    Format("Alpaca", "conversation", {"instruction": "Add", "input": "1 and 2", "output": "3"}),
    Format("question and answer", "conversation", {"question": "Hi", "answer": "Hello"}),
    Format("preference pairs", "pair", {"prompt": "Hi", "chosen": "Hello", "rejected": "Go away"}),
    Format("preference pairs with an implicit prompt", "pair",
           {"chosen": [_ASKED, _ANSWERED], "rejected": [_ASKED, {"role": "assistant", "content": "Go away"}]}),
    Format("HH-RLHF text", "pair", {"chosen": f"{_HH} Hello", "rejected": f"{_HH} Go away"}),
    Format("scored answers", "pair", {"prompt": "Hi", "answers": ["Hello", "Go away"], "scores": [5, 1]}),
    Format("ratings", "rating", {"prompt": "Hi", "completion": "Hello", "label": True}),
    Format("prompts", "prompt", {"prompt": "Hi"}),
)  # fmt: skip

# --- the names that fields go by, the usual one first

LISTS = ("messages", "conversations", "conversation", "dialog")  # a whole conversation
ASK = ("prompt", "instruction", "question")
ASK_TOO = ("query", "problem", "inputs", "input")  # looked at where none of ASK is there
ANSWER = ("completion", "output", "response", "answer")
ANSWER_TOO = ("solution", "targets")  # likewise
PARTNERS = {"prompt": "completion", "instruction": "output", "question": "answer", "query": "response",
            "problem": "solution", "inputs": "targets", "input": "output"}  # fmt: skip
PAIRED = (
    ("chosen", "rejected"),
    ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"),
    ("response_j", "response_k"),
    ("preferred_output", "non_preferred_output"),
)
ANSWERS = ("answers", "completions", "responses")  # lists of answers to one prompt,
SCORES = ("scores", "rewards", "ratings", "ranks")  # and their scores; of ranks the lowest is the best
SCORE = ("score", "overall_score", "rating", "reward", "rank")  # the same inside an answer that is an object
ANSWER_TEXT = ("text", "response", "content", "completion", "answer")  # its text there
TEXTS = ("content", "document", "body")  # stand for "text" in a row with no other known field

# The names that stand for ours, and words that say that a field may be meant for it.
_ASKED_BY, _ANSWERED_BY = ((*ASK, *ASK_TOO), ("ask", "user", "human")), ((*ANSWER, *ANSWER_TOO), ("reply", "assistant"))
_LIKE: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    **dict.fromkeys(("prompt", "instruction", "question"), _ASKED_BY),
    **dict.fromkeys(("completion", "output", "answer"), _ANSWERED_BY),
    "chosen": (tuple(p[0] for p in PAIRED), ("better", "preferred", "accepted", "good", "win")),
    "rejected": (tuple(p[1] for p in PAIRED), ("worse", "dispreferred", "bad", "lose")),
    "answers": (ANSWERS, ()),
    "scores": (SCORES, ()),
    "text": (("text",), (*TEXTS, "article", "story", "passage")),
}


class RowError(Exception):
    """One row cannot be used; ``str()`` is the reason. It is set aside and counted, the rest goes on."""


# --- which fields a row has

_LISTS, _ASKS, _ANSWERS = frozenset(LISTS), frozenset((*ASK, *ASK_TOO)), frozenset((*ANSWER, *ANSWER_TOO))


def asks(row: dict[str, Any]) -> bool:
    return not _ASKS.isdisjoint(row)


def answers(row: dict[str, Any]) -> bool:
    return not _ANSWERS.isdisjoint(row)


def list_field(row: dict[str, Any]) -> str | None:
    """The field that holds a whole conversation, as a list or JSON for one; None where no field is meant for it."""
    if _LISTS.isdisjoint(row):
        return None
    for name in LISTS:
        value = row.get(name)
        if (value.__class__ is list and value) or (isinstance(value, str) and value[:20].lstrip().startswith("[")):
            return name
    # A column of this name beside a prompt and an answer is about them, a count of the messages say.
    return None if asks(row) and answers(row) else next((f for f in LISTS[:2] if f in row), None)


def ask_field(row: dict[str, Any]) -> str:
    """The field that holds the prompt. Raises RowError where several could."""
    if "prompt" in row:
        return "prompt"
    fields = [f for f in ASK if f in row]
    if len(fields) > 1:
        raise RowError(f"{named(fields)} could each be the prompt: keep one")
    return fields[0] if fields else next(f for f in ASK_TOO if f in row)


def answer_field(row: dict[str, Any]) -> str:
    """The field that holds the answer: the partner of the prompt's, or the only one. Raises RowError."""
    for ask in (ask_field(row), *ASK):
        if ask in row and PARTNERS[ask] in row:
            return PARTNERS[ask]
    fields = [f for f in ANSWER if f in row] or [f for f in ANSWER_TOO if f in row]
    if len(fields) > 1:
        raise RowError(f"{named(fields)} could each be the answer: keep one, or name it 'completion'")
    return fields[0]


_OTHERS = frozenset((*LISTS, *ASK, *ASK_TOO, *ANSWER, *ANSWER_TOO, *ANSWERS, *sum(PAIRED, ()), "role", "from"))


def text_field(row: dict[str, Any]) -> str | None:
    """The field that stands for ``text``: the only one of its names, in a row that has no other known field."""
    fields = [f for f in TEXTS if isinstance(row.get(f), str)]
    return fields[0] if len(fields) == 1 and _OTHERS.isdisjoint(row) else None


def sides(row: dict[str, Any]) -> tuple[str, str] | None:
    for pair in PAIRED:
        if pair[0] in row and pair[1] in row:
            return pair
    return None


def scored_field(row: dict[str, Any]) -> str | None:
    """The field that holds the answers to be told apart by their scores; None where they have none."""
    field = next((f for f in ANSWERS if isinstance(row.get(f), list)), None)
    if field is None or not (asks(row) or list_field(row)):
        return None
    within = any(isinstance(v, dict) and not v.keys().isdisjoint(SCORE) for v in row[field])
    return field if within or any(isinstance(row.get(f), list) for f in SCORES) else None


# --- saying what was seen


def a(value: Any) -> str:
    """The kind of a value with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number" if isinstance(value, (int, float)) else f"a {type(value).__name__}")


def named(names: Iterable[str], room: int = 90) -> str:
    """Field names in quotes, as many as fit into about ``room`` characters (the first always)."""
    found: list[str] = []
    for name in names:
        found.append(f"'{_on_one_line(str(name)[:40])}'")
        if len(found) > 1 and len(", ".join(found)) > room:
            return ", ".join([*found[:-1], "..."])
    return ", ".join(found)


def shown(value: Any, room: int = 60) -> str:
    """The value as one line of JSON, cut at ``room`` characters; a large value costs no more than a small one."""
    text = _on_one_line(json.dumps(_shortened(value, 4), ensure_ascii=False, default=a))
    return text if len(text) <= room else text[: room - 3] + "..."


def _on_one_line(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text)


def _shortened(value: Any, depth: int) -> Any:
    if isinstance(value, str):
        return value if len(value) <= 40 else value[:37] + "..."
    if isinstance(value, (list, dict)) and not depth:
        return "..."
    if isinstance(value, list):
        return [_shortened(v, depth - 1) for v in value[:3]]
    if isinstance(value, dict):
        return {str(k)[:40]: _shortened(value[k], depth - 1) for k in list(value)[:8]}
    return a(value) if isinstance(value, int) and abs(value) > 10**20 else value


# --- rows that do not fit


def misfit(row: Mapping[str, Any], kind: Kind, seen: Sequence[Kind]) -> str:
    """Why ``row`` is no ``kind``; ``seen`` are the kinds that it could be, the likeliest first."""
    if not row:
        return f"no fields; write {_example(_advised(kind))}"
    others = [k for k in seen if not _by_the_way(row, k)]
    said = _of_another_kind(row, kind, others[0]) if others else _near(row, kind)
    return f"{said}; the row begins {shown(row, min(120, max(40, ROOM - 17 - len(said))))}"


def _by_the_way(row: Mapping[str, Any], kind: Kind) -> bool:
    """Whether a row is a ``kind`` only by one field, with others beside it that may have been meant for more."""
    by = (*LISTS, *ASK, *ASK_TOO) if kind == "prompt" else TEXTS if kind == "text" and "text" not in row else ()
    return bool(by) and any(isinstance(v, (str, list, dict)) for k, v in row.items() if k not in (*by, "system"))


def _of_another_kind(row: Mapping[str, Any], kind: Kind, other: Kind) -> str:
    what = {"text": "plain text", "conversation": "a conversation", "pair": "a preference pair",
            "rating": "a rating", "prompt": "a prompt without an answer"}[other]  # fmt: skip
    by, ours = TAKEN_BY[other], TAKEN_BY[kind]
    taken = f" for {by}" if "," in by else f", which the {by} stage takes"
    remedy = ""
    if other == "rating" and kind == "conversation":
        remedy = "keep the good answers and leave 'label' out, or, if it is no rating, fields: {category: label}; "
    takes = f"rows for {ours.split(',')[0]} are" if "," in ours else f"the {ours} stage takes rows"
    return f"{what} (fields {named(row)}){taken}; {remedy}{takes} like {_example(_advised(kind))}"


def _near(row: Mapping[str, Any], kind: Kind) -> str:
    values = {name: _reach(row, name) for name in _reachable(row)}
    lists = tuple(n for n, v in values.items() if isinstance(v, list) or (isinstance(v, str) and v[:1] == "["))
    strings = tuple(n for n, v in values.items() if isinstance(v, str) and not re.search(r"(?i)\bid$|_id$", n))
    best, lacking, mapping = _nearest(tuple(row)[:50], strings[:50], lists[:50], kind)
    lacks = "lacks " + ", ".join(f"'{o}'" for o in lacking) if lacking else f"is {best.name}, but the values do not fit"
    said = f"fields {named(row)} fit no {kind} format; nearest {lacks}: write {_example(best)}"
    return f"{said}, or fields: {mapping}" if mapping and len(said) + len(mapping) < ROOM - 65 else said


# Many rows of one file do not fit for one reason, so this is worked out once for all that have the same fields.
@lru_cache(1024)
def _nearest(
    names: tuple[str, ...], strings: tuple[str, ...], lists: tuple[str, ...], kind: Kind
) -> tuple[Format, list[str], str]:
    """The nearest format, the fields it lacks, and the mapping that would help, "" where none suggests itself."""
    formats = [f for f in FORMATS if f.kind == kind]
    apt: dict[type, tuple[str, ...]] = {list: lists, str: strings}
    alike = {(f, o): {n: _alike(o, n) for n in apt.get(type(v), names)} for f in formats for o, v in f.example.items()}
    likeness = {f: sum(max(alike[f, o].values(), default=0) for o in f.example) / len(f.example) for f in formats}
    best = max(formats, key=lambda f: likeness[f])
    if likeness[best] < 0.5:
        two = kind == "conversation" and len(strings) == 2
        best = next(f for f in formats if f.name == "prompt and completion") if two else formats[0]
    lacking = [o for o in best.example if max(alike[best, o].values(), default=0) < 1 and o != "input"]
    free = {n for n in (*strings, *lists) if max(_alike(o, n) for o in best.example) < 1}
    found: dict[str, str] = {}
    for ours in lacking:
        fitting = {n: like for n, like in alike[best, ours].items() if n in free and n not in found.values()}
        near = max(fitting, key=lambda n: fitting[n], default="")
        if near and fitting[near] >= 0.6:
            found[ours] = near
    rest = [o for o in lacking if o not in found]
    left = [n for n in strings if n in free and n not in found.values()]
    if len(rest) == len(left) and len(strings) == {"text": 1, "conversation": 2}.get(kind):
        found.update(zip(rest, left, strict=True))
    known = all(len(found.get(o, "x" * 41)) <= 40 for o in lacking)
    mapping = ", ".join(f"{o}: {_yaml(found[o])}" for o in lacking) if known else ""
    return best, lacking, f"{{{mapping}}}" if mapping else ""


def _alike(ours: str, theirs: str) -> float:
    """From 0 to 1: 1 for a name that stands for ours."""
    names, hints = _LIKE.get(ours, ((ours,), ()))
    if theirs.lower() in names:
        return 1.0
    words = re.split(r"[\W_]+", theirs.lower()[:60])
    if not {*names, *hints}.isdisjoint(words):
        return 0.9
    return max(difflib.SequenceMatcher(None, n, theirs.lower()[:60]).ratio() for n in names) * 0.9


def _yaml(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z_][\w.]*", name) else json.dumps(name)


def _advised(kind: Kind) -> Format:
    return next(f for f in FORMATS if f.kind == kind)


def _example(known: Format) -> str:
    return json.dumps(known.example)


# --- fields by other names


def mapped(row: Mapping[str, Any], fields: Mapping[str, str] | Fields) -> dict[str, Any]:
    """The row with ``fields`` (ours: theirs) set; a dot in theirs goes into a nested object.

    Its other fields stay as they are, but for those that were mapped (of a nested one the whole object), and for whole
    conversations where the mapping names the parts of one: what is mapped is what is meant.
    Raises RowError naming a field that is not there, the fields there are, and the nearest.
    """
    if not fields:
        return dict(row)
    found = {}
    gone = set()
    for ours, theirs in dict(fields).items():
        found[ours] = _reach(row, theirs, ours)
        gone.add(theirs if theirs in row else theirs.split(".")[0])
    if not found.keys().isdisjoint((*ASK, *ASK_TOO, *ANSWER, *ANSWER_TOO)):
        gone.update(LISTS)
    return {**{k: v for k, v in row.items() if k not in gone}, **found}


def _reach(row: Mapping[str, Any], theirs: str, ours: str = "") -> Any:
    if theirs in row:
        return row[theirs]
    value: Any = row
    for part in theirs.split("."):
        if not isinstance(value, Mapping) or part not in value:
            names = list(_reachable(row))
            near = difflib.get_close_matches(theirs, names, 1)
            nearest = f"; nearest '{_on_one_line(near[0][:40])}'" if near else ""
            raise RowError(f"no field {named([theirs])} to take '{ours}' from; there are {named(names)}{nearest}")
        value = value[part]
    return value


def _reachable(row: Mapping[str, Any]) -> Iterable[str]:
    """The names of a row's fields, and of those one level down with a dot."""
    for name in list(row)[:50]:
        yield name
        if isinstance(row[name], Mapping):
            yield from (f"{name}.{inner}" for inner in list(row[name])[:20] if isinstance(inner, str))
