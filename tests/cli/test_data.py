"""``trivium data``: what it finds, how it says it, and how it ends."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

CHAT = {"messages": [{"role": "user", "content": "a red cat"}, {"role": "assistant", "content": "sat"}]}


@pytest.fixture(scope="session")
def tokenizer(walk: Any) -> str:
    """The folder of the walk's tokenizer."""
    return str(walk.folder / "tokenizer")


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def test_check_finds_formats_and_passes(trivium, tmp_path):
    chats = write(tmp_path / "a.jsonl", [CHAT] * 3)
    pairs = write(tmp_path / "b.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}])
    done = trivium("data", "check", chats, pairs)
    assert done.code == 0, done.err
    assert f"messages, for SFT: {chats}" in done.out
    assert f"preference pairs, for preference: {pairs}" in done.out
    assert "3 of 3 rows can be used" in done.out
    assert "2 rows that stood there before" in done.out


def test_check_with_a_model_counts_tokens(trivium, tmp_path, tokenizer):
    file = write(tmp_path / "a.jsonl", [CHAT, {**CHAT, "n": 1}])
    done = trivium("data", "check", file, "--model", tokenizer)
    assert done.code == 0, done.err
    assert re.search(r"tokens an example: min \d+, p10 \d+, p50", done.out)
    assert re.search(r"0 \|.*█.*\| \d+", done.out)
    assert "shared beginnings save" in done.out
    report = json.loads(trivium("data", "check", file, "--model", tokenizer, "--json").out)
    assert report["lengths"]["min"] == report["lengths"]["max"] == report["tokens"] // 2
    assert 0 < report["trained_tokens"] < report["tokens"]


def test_json_is_whole_also_where_a_run_would_stop(trivium, tmp_path, tokenizer):
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "sat " * 100}]}
    file = write(tmp_path / "a.jsonl", [CHAT, "{broken", {"messages": []}, long])
    done = trivium("data", "check", file, "--model", tokenizer, "--max-length", "30", "--json")
    assert done.code == 2
    report = json.loads(done.out)
    assert {k: report[k] for k in ("files", "format", "rows", "used", "over_long", "set_aside")} == {
        "files": [str(file)], "format": "messages", "rows": 4, "used": 1, "over_long": 1, "set_aside": 2,
    }  # fmt: skip
    assert [(r["file"], r["line"]) for r in report["bad_rows"]] == [(str(file), n) for n in (2, 3, 4)]
    assert "over-long: " in report["bad_rows"][2]["reason"]
    assert done.error.startswith(f"error: {file}:2: not JSON")
    assert len(done.error.splitlines()) <= 3


def test_over_long_rows_stop_unless_it_is_said_what_becomes_of_them(trivium, tmp_path, tokenizer):
    long = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": "sat " * 100}]}
    file = write(tmp_path / "a.jsonl", [CHAT, long])
    asked = ("data", "check", file, "--model", tokenizer, "--max-length", "30")
    stopped = trivium(*asked)
    assert stopped.code == 2
    assert "1 of 2 rows have more than 30 tokens" in stopped.error
    assert "on_overflow: drop" in stopped.error
    for how in ("drop", "truncate_right"):
        assert trivium(*asked, "--on-overflow", how).code == 0
    # cut from the left, an answer of this length has no prompt left
    assert "nothing is left of its prompt" in trivium(*asked, "--on-overflow", "truncate_left").error


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere.jsonl"], r"no such file or folder: nowhere\.jsonl"),
        (["rows.jsonl", "--max-length", "9"], r"no tokenizer to count with\n.*add --model DIR"),
        (["rows.jsonl", "--field", "prompt"], r"not OURS=THEIRS"),
        (["rows.jsonl", "--model", "nowhere"], "no such"),
        (["odd.jsonl"], r"odd\.jsonl:1: .*'question_text', 'reply'.*fields: \{prompt: question_text"),
        (["empty.jsonl"], "no rows in empty.jsonl"),
    ],
)
def test_mistakes_get_a_line_and_a_remedy(trivium, tmp_path, monkeypatch, arguments, words):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "rows.jsonl", [CHAT])
    write(tmp_path / "odd.jsonl", [{"question_text": "a", "reply": "b"}])
    write(tmp_path / "empty.jsonl", [])
    done = trivium("data", "check", *arguments)
    assert done.code == 2
    assert re.search(words, done.error), done.error
    assert len(done.error.splitlines()) <= 3


def test_fields_by_other_names(trivium, tmp_path):
    file = write(tmp_path / "a.jsonl", [{"question_text": "a", "meta": {"reply": "b"}}])
    done = trivium("data", "check", file, "--field", "prompt=question_text", "--field", "completion=meta.reply")
    assert done.code == 0, done.err
    assert "prompt and completion, for SFT" in done.out


def test_show_marks_what_is_trained_and_what_is_shared(trivium, tmp_path, tokenizer):
    pairs = write(tmp_path / "b.jsonl", [{"prompt": "a red cat <|end|>", "chosen": "sat", "rejected": "ran"}] * 5)
    done = trivium("data", "show", pairs, "--model", tokenizer, "-n", "2")
    assert done.code == 0, done.err
    assert done.out.count(f"{pairs}:") == 2
    first = done.out.split(f"{pairs}:2")[0]
    assert "<|user|>a red cat <|end|><|end|><|assistant|>" in first
    assert re.search(r"├─ chosen\n│  ⟦sat<\|end\|>⟧", first)
    assert re.search(r"├─ rejected\n│  ⟦ran<\|end\|>⟧", first)
    page = tmp_path / "page.html"
    assert trivium("data", "show", pairs, "--model", tokenizer, "--html", page).code == 0
    html = page.read_text(encoding="utf-8")
    assert html.count('<div class="row">') == 3
    assert "default-src 'none'" in html
    assert "<script" not in html
    assert "&lt;|user|&gt;" in html


def test_show_colours_in_a_terminal(trivium, tmp_path, tokenizer, monkeypatch):
    file = write(tmp_path / "a.jsonl", [CHAT])
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert "\033[30;42msat\033[0m" in trivium("data", "show", file, "--model", tokenizer).out


def test_template_tells_what_is_in_use(trivium, tmp_path, walk):
    done = trivium("data", "template", walk.folder / "chat")
    assert done.code == 0, done.err
    assert "(the one it was trained with)" in done.out
    assert re.search(r"prefix-preserving: +yes", done.out)
    assert "⟦4.<|end|>⟧" in done.out
    copy = tmp_path / "base"
    shutil.copytree(walk.folder / "base", copy)
    file = copy / "chat_template.jinja"
    file.write_text(file.read_text(encoding="utf-8").replace("<|user|>", "<|user|> "), encoding="utf-8")
    assert "NOT the one it was trained with" in trivium("data", "template", copy).out
    said = trivium("generate", copy, "a red cat", "--max-new-tokens", "1")
    assert said.code == 0
    assert "its chat template is not the one it was trained with" in said.err
    assert "note" not in trivium("generate", walk.folder / "base", "a red cat", "--max-new-tokens", "1").err


def test_a_run_after_a_check_prepares_nothing_again(trivium, tmp_path, walk, monkeypatch, write_recipe):
    file = write(tmp_path / "a.jsonl", [{**CHAT, "n": n} for n in range(30)])
    assert trivium("data", "check", file, "--model", walk.folder / "base").code == 0

    def again(*_: Any) -> int:
        raise AssertionError("prepared twice")

    monkeypatch.setattr("trivium.data.prepare._make_parts", again)
    stage = {"name": "s", "stage": "sft", "data": str(file), "max_steps": 1, "batch_size": 4, "method": "lora"}
    recipe = write_recipe(tmp_path, [stage], str(walk.folder / "base"), prompts=[])
    done = trivium("run", recipe, "--out", tmp_path / "out")
    assert done.code == 0, done.err
