"""Preparation: the same whatever the processes, interruptions and damage; nothing is prepared twice."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from trivium.data import prepare as preparing
from trivium.data.blocks import Block
from trivium.data.encoder import Encoder
from trivium.data.examples import Maker, Spec
from trivium.data.overlap import overlap
from trivium.data.prepare import Prepared, prepare
from trivium.data.rows import Listed, Mix
from trivium.data.templates import chat_template
from trivium.data.tokenizer import train_tokenizer
from trivium.data.workers import Job, Workers
from trivium.errors import DataError

TOKENIZER = train_tokenizer(["Once upon a time there was a turtle. What is it? It is a hare."] * 3, 320)
TEMPLATE = chat_template(TOKENIZER)


def chat(n: int) -> dict[str, Any]:
    turns = [("user", f"What is {n}?"), ("assistant", f"It is {n}, é😀. " * (n % 5 + 1))]
    return {"messages": [{"role": role, "content": text} for role, text in turns * (n % 3 + 1)]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return path


def run(source: Any, **more: Any) -> Prepared:
    given = {"kind": "conversation", "tokenizer": TOKENIZER, "template": TEMPLATE, "context": 512, "bad_rows": 1.0}
    return prepare(source, **(given | more))


def same(a: Prepared, b: Prepared) -> bool:
    """Examples and account, to the last token."""
    pairs = list(zip(a.examples, b.examples, strict=True))
    tokens = all(np.array_equal(s.tokens, t.tokens) and np.array_equal(s.weights, t.weights)
                 for x, y in pairs for s, t in zip(x.sequences, y.sequences, strict=True))  # fmt: skip
    told = all(
        (x.origin.rpartition(":")[2], x.text_bytes) == (y.origin.rpartition(":")[2], y.text_bytes) for x, y in pairs
    )
    return tokens and told and a.ledger.as_dict() == b.ledger.as_dict()


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Many small blocks, and a cache of this test's own."""
    monkeypatch.setattr("trivium.data.blocks.BLOCK", 2000)
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "cache"))


@pytest.mark.promise(9)
@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("processes", [1, 4])
def test_any_number_of_processes_gives_the_same(
    processes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tried: Any
) -> None:
    file = write(tmp_path / "a.jsonl", [*map(chat, range(300)), "{broken", {"messages": []}])
    here = run(file)
    assert len(here.examples.store.parts) > 10
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr(preparing, "LITTLE", 0)
    monkeypatch.setattr(preparing, "cores", lambda: 4)
    monkeypatch.setattr(preparing, "Workers", lambda maker, _: Workers(maker, processes))
    there = run(file)
    assert same(here, there)
    tried(examples=len(there.examples))
    assert same(here, run(Listed([json.loads(line) for line in file.read_text().splitlines()[:300]]))) is False
    assert [p.line for p in there.ledger.bad()] == [301, 302]


@pytest.mark.usefixtures("small")
def test_nothing_is_prepared_twice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", [*map(chat, range(100)), "{broken"])
    first = run(file)

    def again_made(*_: Any) -> int:
        raise AssertionError("prepared twice")

    monkeypatch.setattr(preparing, "_make_parts", again_made)
    moved = tmp_path / "elsewhere.jsonl"
    shutil.move(file, moved)
    again = run(moved)
    assert same(first, again)
    assert again.examples[0].origin == f"{moved}:1"
    assert next(iter(again.ledger.bad())).origin == f"{moved}:101"
    assert same(run(moved, holdout=0.2), run(moved, holdout=0.2))  # the share is decided when it is read


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("more", [{"train_on": "last"}, {"max_length": 64, "on_overflow": "drop"}, {"kind": "pair"}])
def test_what_changes_the_result_is_prepared_anew(tmp_path: Path, more: dict[str, Any]) -> None:
    rows = [{**chat(n), "prompt": "a", "chosen": f"b{n}", "rejected": "c"} for n in range(20)]
    file = write(tmp_path / "a.jsonl", rows)
    assert not np.array_equal(run(file).examples.store.key, run(file, **more).examples.store.key)


@pytest.mark.usefixtures("small")
def test_damage_in_the_cache_is_found_and_mended(tmp_path: Path) -> None:
    file = write(tmp_path / "a.jsonl", [chat(n) for n in range(200)])
    first = run(file)
    parts = sorted((tmp_path / "cache").rglob("*.arrow"))
    kept = [p.read_bytes() for p in parts]
    data = bytearray(kept[1])
    data[len(data) // 2] ^= 1
    parts[1].write_bytes(data)
    parts[2].write_bytes(kept[2][:100])
    parts[3].unlink()
    parts[4].with_suffix(".json").write_text("{")
    assert same(run(file), first)
    assert [p.read_bytes() for p in parts] == kept


CHILD = """
import sys, time
from pathlib import Path
sys.path.insert(0, {tests!r})
from trivium.data import blocks, prepare as preparing
blocks.BLOCK = 2000
write = preparing.write_bytes
def slowly(*a, **k):
    time.sleep(0.02)
    write(*a, **k)
preparing.write_bytes = slowly
import importlib.util
spec = importlib.util.spec_from_file_location("t", {tests!r} + "/test_prepare.py")
t = importlib.util.module_from_spec(spec); spec.loader.exec_module(t)
print("ready", flush=True)
t.run(Path(sys.argv[1]))
print("done", flush=True)
"""


@pytest.mark.usefixtures("small")
def test_an_interrupted_preparation_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(tmp_path / "a.jsonl", [chat(n) for n in range(300)])
    code = CHILD.format(tests=str(Path(__file__).parent))
    child = subprocess.Popen([sys.executable, "-c", code, str(file)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "ready\n"
    parts = tmp_path / "cache" / "prepared"
    while len(list(parts.rglob("*.json"))) < 4 and child.poll() is None:
        time.sleep(0.01)
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    left = {p: p.stat().st_mtime_ns for p in parts.rglob("*.arrow")}
    assert len(left) >= 4
    done = run(file)
    whole = [p for p in left if p.with_suffix(".json").exists()]
    assert len(whole) >= 4
    assert sum(p.stat().st_mtime_ns == left[p] for p in whole) >= 4  # kept as they were
    shutil.rmtree(parts)
    assert same(done, run(file))


def ask(work: Workers, first: int = 1) -> dict[str, Any]:
    job = Job(Block("lines", first, (json.dumps(chat(1)) + "\n").encode()), 0, "a.jsonl")
    return work.submit(job).result()[0]


@pytest.mark.promise(9, 19)
@pytest.mark.parametrize("at", ["idle", "starting"])
def test_a_process_that_dies_is_replaced_said_and_counted(at: str, capsys: Any) -> None:
    work = Workers(Maker(Spec("conversation", 512), TEMPLATE.encoder, TEMPLATE), 2)
    if at == "idle":
        assert ask(work)["read"] == 1
    for process in list(work.processes):
        process.kill()
    account = ask(work)
    assert account["read"] == 1
    assert account["counts"]["died"] == 1
    assert "a process that prepares data died (signal 9, as when memory runs out)" in capsys.readouterr().err
    assert ask(work)["counts"]["died"] == 1  # the other one's turn
    assert "died" not in ask(work)["counts"]
    work.close()
    assert len(work.processes) == 4
    assert all(process.poll() is not None for process in work.processes)


def test_rows_that_kill_every_process_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    work = Workers(Maker(Spec("conversation", 512), TEMPLATE.encoder, TEMPLATE), 1)
    started = work._started

    def dying() -> Any:
        process = started()
        process.kill()
        return process

    monkeypatch.setattr(work, "_started", dying)
    work.processes[0].kill()
    with pytest.raises(
        DataError, match=r"a.jsonl:7: 3 processes died preparing the rows from here on \(signal 9"
    ) as said:
        ask(work, 7)
    assert "look at these rows" in said.value.remedy
    work.close()
    assert all(process.poll() is not None for process in work.processes)


def test_a_cache_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("TRIVIUM_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr("tempfile.gettempdir", lambda: str(tmp_path))
    assert run(write(tmp_path / "a.jsonl", [chat(1)])).ledger.used == 1
    assert "TRIVIUM_CACHE says where else" in capsys.readouterr().err


@pytest.mark.promise(8, 19)
@pytest.mark.parametrize("how", ["truncate_left", "truncate_right"])
def test_rows_cut_on_request_say_what_it_costs(how: Any) -> None:
    rows = [
        chat(1),
        chat(4),
        {"messages": [{"role": "user", "content": "a" * 90}, {"role": "assistant", "content": "b"}]},
    ]
    whole = run(Listed(rows))
    limit = 40
    done = run(Listed(rows), max_length=limit, on_overflow=how)
    ledger = done.ledger
    assert all(len(s.tokens) <= limit for e in done.examples for s in e.sequences)
    assert ledger.counts["cut"] == sum(len(e.sequences[0].tokens) > limit for e in whole.examples) - ledger.set_aside
    if how == "truncate_right":
        assert [p.reason for p in ledger.bad()] == ["no trained token once cut to 40 tokens"]
    else:
        assert len(done.examples) == ledger.used > 0
        assert all(e.sequences[0].tokens[0] == TOKENIZER.bos_token_id for e in done.examples)
        assert all(e.sequences[0].tokens[-1] == TOKENIZER.eos_token_id for e in done.examples)
    kept = {e.origin: e.trained_tokens for e in done.examples}
    before = sum(e.trained_tokens for e in whole.examples if e.origin in kept)
    assert ledger.counts["cut_trained"] == before - sum(kept.values())
    assert any("lost by that" in line for line in ledger.lines())


def test_pairs_cut_from_the_left_keep_one_prompt() -> None:
    row = {"prompt": "x" * 60, "chosen": "yes", "rejected": "no, never"}
    (example,) = run(Listed([row]), kind="pair", max_length=30, on_overflow="truncate_left").examples
    chosen, rejected = example.sequences
    prompt = int(np.flatnonzero(chosen.weights)[0])
    assert chosen.tokens[:prompt].tolist() == rejected.tokens[:prompt].tolist()
    assert len(rejected.tokens) == 30 > len(chosen.tokens)
    row["rejected"] = "n" * 60
    done = run(Listed([row, {**row, "prompt": "x", "rejected": "z"}]), kind="pair", max_length=30,
               on_overflow="truncate_left")  # fmt: skip
    assert "its answers alone have more than 30 tokens" in next(iter(done.ledger.bad())).reason


@pytest.mark.promise(8)
def test_over_long_rows_stop_a_run_that_does_not_say_what_becomes_of_them() -> None:
    rows = Listed([chat(1), chat(4)])
    told = r"1 of 2 rows have more than 100 tokens \(first rows:2: .*\n.*on_overflow: drop"
    with pytest.raises(DataError, match=told):
        run(rows, max_length=100)
    assert run(rows, max_length=100, on_overflow="drop").ledger.over_long == 1
    assert run(rows, context=100).ledger.over_long == 1  # what the model cannot read is left out, and counted


def test_duplicates_are_counted_and_dropped_on_request() -> None:
    rows = Listed([chat(1), chat(2), dict(reversed(chat(1).items())), chat(1)])
    kept, dropped = run(rows), run(rows, duplicates="drop")
    assert (kept.ledger.used, kept.ledger.duplicates, kept.ledger.dropped) == (4, 2, 0)
    assert (dropped.ledger.used, dropped.ledger.duplicates, dropped.ledger.dropped) == (2, 2, 2)
    assert [e.origin for e in dropped.examples] == ["rows:1", "rows:2"]


def test_sources_with_other_names_for_their_fields() -> None:
    mine = Mix(Listed([{"ask": "a", "meta": {"reply": "b"}}]), None, (("completion", "meta.reply"), ("prompt", "ask")))
    done = run([mine, Listed([chat(1)])])
    assert done.ledger.used == 2
    assert TOKENIZER.decode(done.examples[0].sequences[0].tokens.tolist(), skip_special_tokens=True) == "ab"
    assert done.sources == ((1, None), (1, None))


def test_scored_answers_and_prompts_and_ratings() -> None:
    scored = {"prompt": "a", "answers": ["x", "y", "z"], "scores": [1, 3, 2]}
    assert len(run(Listed([scored]), kind="pair").examples) == 1
    every = run(Listed([scored]), kind="pair", pairs="all")
    (one,) = every.examples
    assert (len(one.sequences), one.scores, one.pairs) == (3, (3, 2, 1), ((0, 1), (0, 2), (1, 2)))
    assert run(Listed([scored]), kind="pair").examples[0].pairs == ((0, 1),)
    assert (every.ledger.used, every.ledger.read) == (1, 1)
    assert run(Listed([{"prompt": "a", "completion": "b", "label": True}]), kind="rating").ledger.trained_tokens == 2
    rated = run(Listed([{"prompt": "a", "completion": "b", "label": False, "weight": 2}]), kind="rating")
    assert (rated.examples[0].scores, rated.examples[0].weight) == ((-1,), 2)
    assert rated.ledger.lines()[1:] == ["1 answer rated bad", "1 row with a weight of its own"]
    assert run(Listed([scored]), kind="rating").examples[0].scores == (1, -1)
    asked = run(Listed([{"prompt": "a <|end|> b"}]), kind="prompt")
    assert asked.ledger.trained_tokens == 0
    messages = [{"role": "user", "content": "a <|end|> b"}]
    assert asked.examples[0].sequences[0].tokens.tolist() == TEMPLATE.encode_prompt(messages)
    assert asked.ledger.counts["control_as_text"] == 1


def test_overlap_of_held_out_rows() -> None:
    def told(n: int) -> dict[str, Any]:
        return {"messages": [{"role": "user", "content": f"q{n}"}, {"role": "assistant", "content": f"{n} " * 30}]}

    train = run(Listed([told(n) for n in range(50)])).examples
    other = {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "and " + "7 " * 20}]}
    apart = {"messages": [{"role": "user", "content": "q1"}, {"role": "assistant", "content": "z " * 30}]}
    found = overlap(train, run(Listed([told(3), other, apart])).examples)
    assert (found.rows, found.exact, found.run) == (3, 1, 2)
    (line,) = found.lines()
    assert line.startswith(
        "of 3 held-out examples 1 stand word for word among the training rows and 2 share 13 trained"
    )
    assert overlap(train, run(Listed([apart])).examples).lines() == []


def test_examples_are_views_that_read_when_asked() -> None:
    done = run(Listed([chat(n) for n in range(10)]))
    some = done.examples[3:6]
    assert [e.origin for e in some] == ["rows:4", "rows:5", "rows:6"]
    assert some.sizes.tolist() == [e.tokens for e in some]
    assert some.trained.tolist() == [e.trained_tokens for e in some]
    assert [e.origin for e in done.examples.at([7, 2])] == ["rows:8", "rows:3"]
    assert some[0].identity == done.examples[3].identity != done.examples[4].identity
    flat = list(done.examples.flat())
    assert np.concatenate([t for _, t, _, _ in flat]).tolist() == [
        t for e in done.examples for s in e.sequences for t in s.tokens.tolist()
    ]
    assert sum(int(w.sum()) for _, _, w, _ in flat) == done.ledger.trained_tokens
    assert Encoder.of(TOKENIZER).bos_id == TOKENIZER.bos_token_id
