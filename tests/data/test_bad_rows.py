"""Ten thousand rows, three hundred bad ones of fifteen kinds at known lines: every one is named, and nothing else."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken

from trivium.data.blocks import LONGEST_LINE
from trivium.data.check import Asked, as_json, check
from trivium.data.ledger import BadPlace
from trivium.data.prepare import prepare
from trivium.data.rows import Mix
from trivium.data.templates import chat_template
from trivium.data.tokenizer import train_tokenizer

pytestmark = pytest.mark.promise(7)

ROWS, EACH = 10_000, 20
LIMIT = 200


def tokenizer() -> Any:
    """One whose template takes no two users in a row."""
    made = train_tokenizer(["Once upon a time there was a turtle."], 300)
    made.add_special_tokens({"additional_special_tokens": [AddedToken("<|tool|>", special=True)]})
    made.chat_template = (
        "{{- bos_token }}{% if messages[0].role == 'system' %}"
        "{{ '<|system|>' + messages[0].content + eos_token }}{% endif %}"
        "{% for m in messages if m.role != 'system' %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
        "{{ '<|' + m.role + '|>' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
    )
    return made


def chat(*turns: tuple[Any, Any]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": text} for role, text in turns]}


def good(n: int) -> dict[str, Any]:
    return chat(("system", "Be kind."), ("user", f"What is {n}?"), ("assistant", f"It is {n}, é😀."))


def over_long(n: int, made: Any) -> dict[str, Any]:
    """A row of exactly one token more than the limit."""
    template = chat_template(made)
    row = chat(("user", "a"), ("assistant", f"{n} "))
    have = len(template.encode(row["messages"])[0].tokens)
    row["messages"][1]["content"] += "\x01" * (LIMIT + 1 - have)  # a byte that nothing merges with
    assert len(template.encode(row["messages"])[0].tokens) == LIMIT + 1
    return row


BAD: dict[str, tuple[Any, str]] = {  # kind: (what is made of the row's number, a part of the reason)
    "broken JSON": (lambda n: b'{"messages": [{"role" "user"}]}', "not JSON"),
    "invalid UTF-8": (lambda n: b'{"messages": [{"role": "user", "content": "\xff\xfe"}]}', "not UTF-8"),
    "lone surrogate": (lambda n: json.dumps(chat(("user", "\ud83d"), ("assistant", "b"))).encode(), "surrogate"),
    "no object": (lambda n: b'["a", "list"]', "an array, not an object"),
    "wrong types": (lambda n: chat(("user", 7), ("assistant", "b")), "not a string"),
    "no messages": (lambda n: {"messages": "text"}, "'messages'"),
    "no role": (lambda n: {"messages": [{"content": "a"}, {"role": "assistant", "content": "b"}]}, "no role"),
    "empty role": (lambda n: chat(("", "a"), ("assistant", "b")), "role"),
    "unknown role": (lambda n: chat(("wizard", "a"), ("assistant", "b")), "unknown role 'wizard'"),
    "two users": (lambda n: chat(("user", "a"), ("user", "b"), ("assistant", "c")), "roles must alternate"),
    "empty answer": (lambda n: chat(("user", "a"), ("assistant", "  ")), "empty answer"),
    "only a system message": (lambda n: chat(("system", "a")), "only a system message"),
    "other fields": (lambda n: {"mesages": [], "n": n}, "'mesages'"),
    "over-long": (over_long, f"over-long: {LIMIT + 1} tokens, more than {LIMIT}"),
}


def written(path: Path) -> dict[int, str]:
    """The file; its bad lines and their kinds. The fifteenth kind is a line cut off at the end, and one is huge."""
    made, draw = tokenizer(), random.Random(0)
    kinds = [kind for kind in BAD for _ in range(EACH)]
    kinds += ["broken JSON"] * (EACH - 2)
    draw.shuffle(kinds)
    places = sorted(draw.sample(range(2, ROWS), len(kinds)))
    bad = dict(zip(places, kinds, strict=True))
    with path.open("wb") as file:
        for line in range(1, ROWS):
            if line in bad:
                make = BAD[bad[line]][0]
                row = make(line, made) if bad[line] == "over-long" else make(line)
                file.write((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n")
            elif line == 1:
                file.write(b'{"text": "' + b"x" * (LONGEST_LINE + 1) + b'"}\n')
            else:
                file.write(json.dumps(good(line), ensure_ascii=False).encode() + b"\n")
        file.write(json.dumps(good(ROWS)).encode()[:-20])
    return {1: "huge", **bad, ROWS: "cut"}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[int, str]]:
    path = tmp_path_factory.mktemp("hostile") / "rows.jsonl"
    return path, written(path)


def named(places: list[BadPlace]) -> dict[int, str]:
    return {place.line: place.reason for place in places}


def test_every_bad_row_is_named_and_every_row_accounted_for(hostile: tuple[Path, dict[int, str]], tried: Any) -> None:
    path, bad = hostile
    made = tokenizer()
    done = prepare(path, kind="conversation", tokenizer=made, template=chat_template(made), max_length=LIMIT,
                   context=2048, on_overflow="drop", bad_rows=1.0)  # fmt: skip
    ledger = done.ledger
    assert len(bad) == 300
    found = named(list(ledger.bad()))
    assert set(found) == set(bad)
    for line, kind in bad.items():
        word = {"huge": "a line of 33,554,446 bytes", "cut": "cut off"}.get(kind) or BAD[kind][1]
        assert word in found[line], (line, kind, found[line])
    assert (ledger.read, ledger.used, ledger.over_long, ledger.set_aside) == (ROWS, ROWS - 300, EACH, 300 - EACH)
    tried(rows=ROWS, bad_rows=len(found))
    assert [e.origin for e in done.examples[:2]] == [f"{path}:{n}" for n in range(2, 9) if n not in bad][:2]


def test_check_tells_the_same_with_and_without_a_tokenizer(hostile: tuple[Path, dict[int, str]]) -> None:
    path, bad = hostile
    made = tokenizer()
    with_model = Asked(tokenizer=made, template=chat_template(made), context=2048, max_length=LIMIT)
    report = as_json(check([Mix(path)], with_model))
    assert {place["line"] for place in report["bad_rows"]} == set(bad)
    assert {place["file"] for place in report["bad_rows"]} == {str(path)}
    assert report["rows"] == report["used"] + report["over_long"] + report["set_aside"] == ROWS
    assert len(report["stops"]) == 1
    bare = as_json(check([Mix(path)], Asked()))
    unseen = {line for line, kind in bad.items() if kind in ("two users", "over-long")}  # by the template, by tokens
    assert {place["line"] for place in bare["bad_rows"]} == set(bad) - unseen
    assert bare["rows"] == bare["used"] + bare["set_aside"] == ROWS


def test_bad_pairs_are_named(tmp_path: Path) -> None:
    pairs: list[tuple[Any, str]] = [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen and rejected are the same"),
        ({"prompt": "a", "chosen": "", "rejected": "b"}, "empty"),
        ({"prompt": "a", "chosen": "b"}, "rejected"),
        ({"chosen": "b", "rejected": "c"}, "without a prompt"),
        ({"prompt": "a", "chosen": 1, "rejected": "c"}, "'chosen'"),
    ]
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row, _ in pairs), encoding="utf-8")
    found = named(list(check([Mix(path)], Asked(kind="pair"))[0].ledger.bad()))
    assert set(found) == {1, 2, 3, 4, 5}
    for line, (_, word) in enumerate(pairs, 1):
        assert word in found[line], found[line]
