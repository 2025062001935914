"""Preparation: every row and every token accounted for, from the file to the examples."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trivium.data.examples import split
from trivium.data.ledger import Ledger
from trivium.data.prepare import Prepared, prepare
from trivium.data.rows import Listed, read_rows
from trivium.data.templates import chat_template
from trivium.data.tokenizer import train_tokenizer
from trivium.errors import DataError

DATA = Path(__file__).parents[3] / "shared" / "data"
TOKENIZER = train_tokenizer(["Once upon a time there was a turtle. What is it? It is a hare."] * 3, 320)
TEMPLATE = chat_template(TOKENIZER)


def write(folder: Path, rows: list[Any], name: str = "a.jsonl") -> Path:
    file = folder / name
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows), encoding="utf-8")
    return file


def run(path: Path | list[Path], kind: Any, **more: Any) -> Prepared:
    settings = {"max_length": None, "context": 64, "template": None if kind == "text" else TEMPLATE} | more
    return prepare(path, kind=kind, tokenizer=TOKENIZER, **{"bad_rows": 1.0, **settings})


def bad(done: Prepared) -> list[tuple[str, str]]:
    return [(place.origin, place.reason) for place in done.ledger.bad() if place.tokens is None]


def text_bytes(examples: Iterable[Any]) -> int:
    return sum(e.text_bytes for e in examples)


def chat(ask: str, answer: str) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]}


@given(n=st.integers(2, 60), limit=st.integers(2, 20))
def test_split_trains_every_token_once(n: int, limit: int) -> None:
    tokens = np.arange(n)
    pieces = split(tokens, limit)
    assert all(2 <= len(p) <= limit for p in pieces)
    assert np.concatenate([p[1:] for p in pieces]).tolist() == list(range(1, n))
    assert all(a[-1] == b[0] for a, b in itertools.pairwise(pieces))


def test_texts(tmp_path: Path) -> None:
    long = "A turtle, é😀. " * 30
    done = run(write(tmp_path, [{"text": "Once upon"}, {"text": long}, {"text": ""}, {"text": "  x "}]), "text")
    ids = TOKENIZER(long)["input_ids"] + [TOKENIZER.eos_token_id]
    first, *pieces, last = [e.sequences[0] for e in done.examples]
    assert first.tokens.tolist() == [*TOKENIZER("Once upon")["input_ids"], TOKENIZER.eos_token_id]
    assert first.weights.tolist() == [0] + [1] * (len(first.tokens) - 1)
    assert [ids[0], *np.concatenate([p.tokens[1:] for p in pieces]).tolist()] == ids
    assert sum(p.trained_tokens for p in pieces) == len(ids) - 1
    assert TOKENIZER.decode(last.tokens[1:-1].tolist()) == "  x "
    ledger = done.ledger
    assert (ledger.read, ledger.used, ledger.counts["split"], ledger.set_aside) == (4, 3, 1, 1)
    assert bad(done) == [(f"{tmp_path}/a.jsonl:3", "empty text")]
    assert text_bytes(done.examples) == len(("Once upon" + long + "  x ").encode())
    assert ledger.longest == len(ids)
    for piece in done.examples[1:-1]:  # what a piece trains, but for characters that tokens cut in two
        text = TOKENIZER.decode(piece.sequences[0].tokens[1:].tolist(), skip_special_tokens=True)
        assert abs(piece.text_bytes - len(text.replace("\ufffd", "").encode())) <= 6
    assert done.examples[1].origin == f"{tmp_path}/a.jsonl:2"


def test_texts_without_bos_do_not_count_the_first_tokens_bytes(tmp_path: Path) -> None:
    from tokenizers import processors

    bare = train_tokenizer(["Once upon a time"], 320)
    bare.backend_tokenizer.post_processor = processors.Sequence([])
    done = prepare(write(tmp_path, [{"text": "Once upon"}]), kind="text", tokenizer=bare, max_length=None, context=9)
    first = bare.decode(bare("Once upon", add_special_tokens=False)["input_ids"][:1])
    assert done.examples[0].sequences[0].tokens[0] != bare.bos_token_id
    assert text_bytes(done.examples) == len("Once upon") - len(first)


def test_conversations_are_never_cut(tmp_path: Path) -> None:
    rows = [chat("What is it?", "A hare. é"), chat("What is it?", "a turtle " * 60), "{broken", {"text": "x"}]
    done = run(write(tmp_path, [*rows, rows[0]]), "conversation")
    assert [e.origin[-2:] for e in done.examples] == [":1", ":5"]
    (sequence,) = done.examples[0].sequences
    assert TOKENIZER.decode(sequence.tokens[sequence.weights > 0].tolist()) == "A hare. é<|end|>"
    ledger = done.ledger
    assert (ledger.read, ledger.used, ledger.over_long, ledger.set_aside, ledger.duplicates) == (5, 2, 1, 2, 1)
    assert ledger.first_over_long is not None
    assert ledger.first_over_long.line == 2
    assert ledger.first_over_long.tokens == ledger.longest > 64
    assert text_bytes(done.examples) == 2 * len("A hare. é".encode())
    assert [o[-2:] for o, _ in bad(done)] == [":3", ":4"]


def test_max_length_and_context(tmp_path: Path) -> None:
    file = write(tmp_path, [chat("What is it?", "A hare.")])
    n = len(run(file, "conversation").examples[0].sequences[0].tokens)
    assert run(file, "conversation", max_length=n).ledger.used == 1
    assert run(file, "conversation", max_length=9999).ledger.limit == 64
    with pytest.raises(DataError, match=rf"more than {n - 1} tokens \(first .*:1: {n};"):
        run(file, "conversation", max_length=n - 1)


def test_pairs(tmp_path: Path) -> None:
    rows = [
        {"prompt": "What is it?", "chosen": "A hare.", "rejected": "A turtle."},
        {"prompt": "What is it?", "chosen": "A hare.", "rejected": "A hare."},
        {"chosen": chat("a", "b")["messages"], "rejected": chat("a", "c")["messages"]},
    ]
    done = run(write(tmp_path, rows), "pair")
    assert [e.origin[-2:] for e in done.examples] == [":1", ":3"]
    chosen, rejected = done.examples[0].sequences
    assert TOKENIZER.decode(chosen.tokens[chosen.weights > 0].tolist()) == "A hare.<|end|>"
    assert TOKENIZER.decode(rejected.tokens[rejected.weights > 0].tolist()) == "A turtle.<|end|>"
    prompt = TEMPLATE.encode_prompt([{"role": "user", "content": "What is it?"}])
    assert chosen.tokens[: len(prompt)].tolist() == rejected.tokens[: len(prompt)].tolist() == prompt
    assert bad(done) == [(f"{tmp_path}/a.jsonl:2", "chosen and rejected are the same")]


def test_answers_that_differ_only_in_what_the_template_trims(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a"], 300)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "message['content'] + eos", "message['content']|trim + eos"
    )
    template = chat_template(tokenizer)
    rows = [{"prompt": "a", "chosen": "b", "rejected": r} for r in ("c", "d", " b ")]
    done = prepare(
        write(tmp_path, rows),
        kind="pair",
        tokenizer=tokenizer,
        template=template,
        max_length=None,
        context=64,
        bad_rows=1.0,
    )
    assert [r for _, r in bad(done)] == ["chosen and rejected are the same once tokenised"]


def test_several_answers_of_a_pair_are_all_trained_and_the_prompts_are_not(tmp_path: Path) -> None:
    turns = chat("a", "before")["messages"] + [{"role": "user", "content": "b"}]
    answer = [{"role": "assistant", "content": "one"}, *turns[:1], {"role": "assistant", "content": "two"}]
    done = run(write(tmp_path, [{"prompt": turns, "chosen": answer, "rejected": "c"}]), "pair")
    chosen = done.examples[0].sequences[0]
    assert TOKENIZER.decode(chosen.tokens[chosen.weights > 0].tolist()) == "one<|end|>two<|end|>"


def test_held_out_rows_stay_on_their_side(tmp_path: Path) -> None:
    rows = [{"text": f"Story {i}", "n": i} for i in range(300)]
    few = run(write(tmp_path, [*rows[:200], rows[3]]), "text", holdout=0.2)
    swapped = [{"n": r["n"], "text": r["text"]} for r in rows[::-1]]
    more = run(write(tmp_path, swapped, "b.jsonl"), "text", holdout=0.2)

    def texts(examples: list[Any]) -> set[str]:
        return {TOKENIZER.decode(e.sequences[0].tokens[1:-1].tolist()) for e in examples}

    assert texts(few.held_out) == texts(more.held_out) & {r["text"] for r in rows[:200]}
    assert not texts(few.held_out) & texts(few.examples)
    assert 30 < len(more.held_out) < 90
    assert few.ledger.held_out + few.ledger.used == few.ledger.read == 201
    assert text_bytes(more.held_out) + text_bytes(more.examples) == sum(len(r["text"]) for r in rows)


def test_several_paths(tmp_path: Path) -> None:
    a, b = write(tmp_path, [{"text": "one"}]), write(tmp_path, [{"text": "two"}], "b.jsonl")
    both = run([a, b], "text")
    assert [e.origin for e in both.examples] == [f"{a}:1", f"{b}:1"]


def test_rows_in_memory_are_rows_of_a_file_without_a_name(tmp_path: Path) -> None:
    rows = [chat("What is it?", "A hare."), "no row", {1: 2}, chat("What?", "A turtle.")]
    here, there = run(Listed(rows, "mine"), "conversation"), run(write(tmp_path, [rows[0], rows[3]]), "conversation")
    for mine, theirs in zip(here.examples, there.examples, strict=True):
        assert np.array_equal(mine.sequences[0].tokens, theirs.sequences[0].tokens)
    assert [e.origin for e in here.examples] == ["mine:1", "mine:4"]
    assert [origin for origin, _ in bad(here)] == ["mine:2", "mine:3"]
    assert here.ledger.source == "mine"


@pytest.mark.promise(8)
def test_nothing_to_learn_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no rows in"):
        run(write(tmp_path, []), "text")
    rows = [{"mesages": []}] * 3
    with pytest.raises(DataError, match=r"(?s)a\.jsonl:1: fields 'mesages'.*write.*3 of 3 rows.*no row"):
        run(write(tmp_path, rows), "conversation")
    many = write(tmp_path, [*rows[:1], *[chat("a", f"b{n}") for n in range(99)], *rows[:1]])  # 2 of 101
    with pytest.raises(DataError, match=r"2 of 101 rows cannot be used\)\n.*bad_rows: 0\.02"):
        run(many, "conversation", bad_rows=0.01)
    assert run(many, "conversation", bad_rows=0.02).ledger.used == 99
    with pytest.raises(DataError, match="raise max_length"):
        run(write(tmp_path, [chat("a", "b" * 200)]), "conversation")
    with pytest.raises(DataError, match="held out"):
        run(write(tmp_path, [{"text": "a"}]), "text", holdout=1.0)


def test_ledger_tells_and_writes(tmp_path: Path) -> None:
    rows = [chat("a", "b"), chat("a", "c"), chat("a", "d"), chat("a", "b" * 200), {"messages": []}]
    ledger = run(write(tmp_path, rows), "conversation").ledger
    assert "3 of 5 rows used" in ledger.lines()[0]
    assert "'messages' is empty" in ledger.lines()[-1]
    account = ledger.as_dict()
    assert json.loads(json.dumps(account)) == account
    assert account["reasons"] == {"'messages' is empty": 1}
    ledger.write_quarantine(tmp_path / "q.jsonl")
    written = [r.value for r in read_rows(tmp_path / "q.jsonl")]  # type: ignore[union-attr]
    assert [w["origin"][-2:] for w in written] == [":4", ":5"]
    assert [w["row"] for w in written] == rows[3:]
    with pytest.raises(AssertionError, match="accounted"):
        Ledger(read=1).balance()


@pytest.mark.skipif(not DATA.is_dir(), reason=f"no real data in {DATA}")
@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("tinystories/valid.jsonl.gz", "text"),
        ("sft/instruct1100_sft.jsonl.gz", "conversation"),
        ("tinystories/sft.jsonl.gz", "conversation"),
        ("pref/instruct1100_politeness_pref.jsonl.gz", "pair"),
    ],
)
def test_real_data(file: str, kind: Any) -> None:
    done = run(DATA / file, kind, context=4096)
    assert not done.ledger.set_aside
    assert done.ledger.used == done.ledger.read == len(done.examples)
    for example in done.examples:
        for s in example.sequences:
            assert s.tokens[np.flatnonzero(s.weights)[-1]] == TOKENIZER.eos_token_id
